"""What programs that were written around the standard module's insides find in realmap.shared_memory."""

from __future__ import annotations

import fcntl
import gc
import mmap
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import managers, resource_tracker
from multiprocessing import shared_memory as standard
from typing import Any

import pytest
from blocks import clean, exists, run
from conftest import BOUND, PAGE
from forked import in_a_child

from realmap.shared_memory import ShareableList, SharedMemory, SharedMemoryManager


def descriptors() -> int:
    """How many this process has."""
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def block(tree: None) -> Any:
    """10,000 bytes."""
    made: Any = SharedMemory(create=True, size=10_000)
    yield made
    made.close()
    made.unlink()


# ---- _fd ----------------------------------------------------------------------------------------


def test_a_descriptor_is_opened_when_it_is_asked_for(block: Any) -> None:
    before = descriptors()
    fd = block._fd
    assert block._fd == fd and descriptors() == before + 1
    assert os.fstat(fd).st_size == 3 * PAGE and not os.get_inheritable(fd)
    os.posix_fallocate(fd, 0, 10_000)
    os.pwrite(fd, b"hello", 5_000)
    assert bytes(block.buf[5_000:5_005]) == b"hello"
    block.close()
    assert block._fd == -1 and descriptors() == before


def test_a_lock_on_it_is_its_objects_own(block: Any) -> None:
    other: Any = SharedMemory(block.name)
    fcntl.flock(block._fd, fcntl.LOCK_EX)
    with pytest.raises(BlockingIOError):
        fcntl.flock(other._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    block.close()
    fcntl.flock(other._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.lockf(other._fd, fcntl.LOCK_EX)
    other.close()


def test_who_closes_it_says_so(block: Any) -> None:
    before = descriptors()
    os.close(block._fd)
    block._fd = -1
    assert block._fd == -1 and descriptors() == before
    block.buf[:4] = b"data"
    assert bytes(block._mmap[:4]) == b"data"


def test_one_that_is_anothers_by_now_is_left_alone(block: Any) -> None:
    fd = block._fd
    other = os.open("/dev/null", os.O_RDONLY)
    os.dup2(other, fd)
    block.close()
    assert os.path.samestat(os.fstat(fd), os.stat("/dev/null"))
    os.close(fd)
    os.close(other)


def test_an_object_that_is_forgotten_closes_it(tree: None) -> None:
    block: Any = SharedMemory(create=True, size=10)
    block.unlink()
    fd, view = block._fd, block.buf[2:4]
    del block
    gc.collect()
    with pytest.raises(OSError):
        os.fstat(fd)
    view[0] = 1


def test_of_a_reader_it_cannot_be_written(block: Any) -> None:
    reader: Any = SharedMemory(block.name, readonly=True)
    with pytest.raises(OSError):
        os.pwrite(reader._fd, b"x", 0)
    with pytest.raises(TypeError):
        reader._mmap[0] = 1
    reader.close()


def test_a_forked_child_has_it_as_well(block: Any) -> None:
    in_a_child(lambda: os.pwrite(block._fd, b"child", 0))
    assert bytes(block.buf[:5]) == b"child"


# ---- _mmap, and what else is there --------------------------------------------------------------


def test_a_map_of_the_same_memory(block: Any) -> None:
    assert isinstance(block._mmap, mmap.mmap) and block._mmap is block._mmap
    block.buf[9_990:] = b"0123456789"
    assert (len(block._mmap), block._mmap.find(b"345"), block._mmap.size()) == (10_000, 9_993, 3 * PAGE)
    block._mmap.flush()
    view = memoryview(block._mmap)
    with pytest.raises(BufferError):
        block.close()
    assert block.buf[9_990] == ord("0")
    view.release()
    block.close()
    assert block._mmap is None


def test_who_takes_the_map_away_keeps_its_views(tree: None) -> None:
    """As programs do that would keep `close` from failing."""
    block: Any = SharedMemory(create=True, size=10)
    block.unlink()
    view = block.buf[2:4]
    block._buf = block._mmap = None
    block.close()
    view[:] = b"ab"
    assert bytes(view) == b"ab"


def test_names_and_types_are_the_standard_modules(block: Any) -> None:
    assert isinstance(block, standard.SharedMemory)
    assert block._name == "/" + block.name and block.name.startswith("psm_")
    assert (block._size, block._mode, block._prepend_leading_slash, block._track) == (10_000, 0o600, True, True)
    chosen = SharedMemory("chosen", create=True, size=5)
    assert (chosen.name, chosen._name) == ("chosen", "/chosen")
    chosen.close()
    chosen.unlink()


def test_space_that_is_not_taken_at_once(tree: None) -> None:
    taken: Any = SharedMemory(create=True, size=1 << 20)
    later: Any = SharedMemory(create=True, size=1 << 20, commit=False)
    assert os.fstat(taken._fd).st_blocks * 512 == 1 << 20
    assert os.fstat(later._fd).st_blocks == 0
    later.buf[5] = 1
    assert os.fstat(later._fd).st_blocks * 512 == PAGE
    for block in (taken, later):
        block.close()
        block.unlink()


# ---- the tracker --------------------------------------------------------------------------------

WORKAROUNDS: dict[str, str] = {
    "unregister": 'resource_tracker.unregister(block._name, "shared_memory")',
    "with the name": 'resource_tracker.unregister(block.name, "shared_memory")',
    "both": 'resource_tracker.register(block._name, "shared_memory")\n'
    'resource_tracker.unregister(block._name, "shared_memory")',
    "register": 'resource_tracker.register(block._name, "shared_memory")',
    "imported before": 'unregister(block._name, "shared_memory")',
    "patched": "resource_tracker.register = resource_tracker.unregister = lambda *_: None\n"
    'resource_tracker._CLEANUP_FUNCS.pop("shared_memory", None)\n'
    "other = SharedMemory(block.name)",
}


@pytest.mark.parametrize("workaround", WORKAROUNDS)
def test_the_tracker_never_hears_of_it(workaround: str) -> None:
    """Everything that people do about it leaves no noise, and no block that is gone."""
    text = f"""
from multiprocessing import resource_tracker
from multiprocessing.resource_tracker import unregister
from realmap.shared_memory import SharedMemory

resource_tracker.ensure_running()
block = SharedMemory(create=True, size=64)
{WORKAROUNDS[workaround]}
resource_tracker._resource_tracker._stop()
again = SharedMemory(block.name)
print(again.size)
block.unlink()
"""
    done = subprocess.run([sys.executable, "-c", text], env=clean(), capture_output=True, text=True, timeout=BOUND)
    assert (done.stdout, done.stderr) == ("64\n", "")


def test_the_tracker_hears_of_blocks_of_the_standard_module(block: Any) -> None:
    text = """
    from multiprocessing import shared_memory as standard
    kept = standard.SharedMemory(create=True, size=10)
    print(kept.name)
    """
    done = run(text, "realmap")
    assert "leaked shared_memory" in done.stderr
    assert not os.path.exists(f"/dev/shm/{done.stdout.strip()}")


# ---- the manager --------------------------------------------------------------------------------


def test_a_managers_blocks_end_with_it(tree: None) -> None:
    with SharedMemoryManager() as manager:
        assert isinstance(manager, managers.SharedMemoryManager)
        block, items = manager.SharedMemory(size=100), manager.ShareableList([1, "two"])
        assert (type(block), type(items), type(items.shm)) == (SharedMemory, ShareableList, SharedMemory)
        gone = manager.SharedMemory(5)
        gone.unlink()
        block.buf[:3] = b"abc"
        assert list(ShareableList(name=items.shm.name)) == [1, "two"]
        assert exists(block.name) and exists(items.shm.name)
    assert not exists(block.name) and not exists(items.shm.name)
    assert bytes(block.buf[:3]) == b"abc"
    for each in (block, gone, items.shm):
        each.close()


def test_a_manager_that_others_connect_to(tree: None) -> None:
    manager = SharedMemoryManager(address=None, authkey=b"key")
    manager.start()
    other = SharedMemoryManager(manager.address, b"key")
    other.connect()
    block = other.SharedMemory(size=3)
    block.close()
    assert exists(block.name)
    manager.shutdown()
    assert not exists(block.name)


def test_a_manager_that_does_not_run_makes_nothing(tree: None) -> None:
    made: list[SharedMemory] = []
    with SharedMemoryManager() as manager:
        manager.SharedMemory(3).close()
    with pytest.raises(OSError):
        made.append(manager.SharedMemory(3))
    assert made == []


def read_block(name: str, pipe: Any) -> None:
    block = SharedMemory(name)
    pipe.send(bytes(block.buf[:3]))
    block.close()


@pytest.mark.parametrize("make", [SharedMemoryManager, managers.SharedMemoryManager])
def test_workers_attach_what_a_manager_made(tree: None, make: Callable[[], Any]) -> None:
    context = multiprocessing.get_context("fork")
    with make() as manager:
        block = manager.SharedMemory(size=100)
        block.buf[:3] = b"xyz"
        ours, theirs = context.Pipe()
        worker = context.Process(target=read_block, args=(block.name, theirs))
        worker.start()
        assert ours.recv() == b"xyz"
        worker.join(BOUND)
        worker.close()
        ours.close()
        theirs.close()
        block.close()
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]  # the standard library's own helper
