"""realmap.shared_memory and /dev/shm: names that others see there, and names that others have put there."""

from __future__ import annotations

import errno
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing import shared_memory as standard
from pathlib import Path
from typing import Any

import pytest
from blocks import clean, end, exists, hear, program, start
from conftest import BOUND, PAGE, wait_until

import realmap
from realmap import ambient
from realmap.host import liveness
from realmap.observe.control import Control
from realmap.shared_memory import ShareableList, SharedMemory
from realmap.user import travel

SHM = Path("/dev/shm")


@pytest.fixture
def name() -> Iterator[str]:
    """A name that nobody has, and that is gone from /dev/shm afterwards."""
    chosen = f"chosen-{secrets.token_hex(4)}"
    yield chosen
    assert not (SHM / chosen).exists()


def run_here(text: str, *args: str, env: dict[str, str] | None = None) -> str:
    """What a program prints that knows nothing of realmap."""
    done = subprocess.run([sys.executable, "-c", text, *args], env=env, capture_output=True, text=True, timeout=BOUND)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


# ---- names that others see ----------------------------------------------------------------------


def test_others_see_it_and_write_into_it(tree: None) -> None:
    block = SharedMemory(create=True, size=5_000, visible=True)
    other = SharedMemory(create=True, size=5_000)
    assert block.name in os.listdir(SHM) and other.name not in os.listdir(SHM)
    status = (SHM / block.name).stat()
    assert (status.st_size, status.st_mode & 0o777, block.size) == (2 * PAGE, 0o600, 5_000)
    block.buf[:4] = b"from"
    text = """
import mmap, posix_ipc, sys
memory = posix_ipc.SharedMemory("/" + sys.argv[1])
view = mmap.mmap(memory.fd, memory.size)
print(view[:4].decode())
view[4_990:4_995] = b"there"
"""
    assert run_here(text, block.name) == "from"
    assert bytes(block.buf[4_990:4_995]) == b"there"
    for each in (block, other):
        each.close()
        each.unlink()


def test_unlinked_by_anybody_it_is_gone_there_at_once(tree: None, name: str) -> None:
    block = SharedMemory(name, create=True, size=100, visible=True)
    again = SharedMemory(name)
    again.unlink()
    assert not (SHM / name).exists() and not exists(name)
    block.buf[:3] = b"abc"
    assert bytes(again.buf[:3]) == b"abc"
    path = ambient.running()
    assert path is not None
    with Control(path) as control:
        report = control.audit()
        assert report, str(report)
    later = SharedMemory(name, create=True, size=10, visible=True)
    for each in (block, again):  # whose end does not take the later one's name
        each.close()
    assert (SHM / name).exists()
    later.close()
    later.unlink()


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[realmap.KernelHandle]:
    """A kernel that is not the tree's, and outlives it."""
    with realmap.boot() as kernel:
        monkeypatch.setenv(ambient.VARIABLE, kernel.path)
        kernel.stats()
        yield kernel
        travel.own_process_of(kernel.path).close()


def test_it_goes_when_its_last_holder_is_killed(outside: realmap.KernelHandle, name: str) -> None:
    text = f"""
    block = SharedMemory({name!r}, create=len(sys.argv) > 1, size=100, visible=True)
    print(block.size, flush=True)
    time.sleep(1000)
    """
    holders = []
    for args in (["make"], []):
        holder = subprocess.Popen(
            [sys.executable, "-c", program(text, "realmap"), *args],
            env=clean() | {ambient.VARIABLE: outside.path},
            stdout=subprocess.PIPE,
            text=True,
        )
        holders.append(holder)
        assert hear(holder) == "100"
    for left, holder in reversed(list(enumerate(reversed(holders)))):
        holder.kill()
        holder.communicate()
        wait_until(lambda left=left: outside.stats()["processes"] == left)  # type: ignore[misc]
        assert (SHM / name).exists() == bool(left)


@pytest.mark.alone
@pytest.mark.parametrize("how", ["gc", "looked for", "made again"])
def test_what_is_left_when_all_are_killed_is_swept(name: str, how: str) -> None:
    text = f"""
    from realmap import ambient
    block = SharedMemory({name!r}, create=True, size=100, visible=True)
    print(ambient.process()._own_client.kernel_pid, flush=True)
    time.sleep(1000)
    """
    holder = start(text, "realmap")
    kernel = os.pidfd_open(int(hear(holder)))
    signal.pidfd_send_signal(kernel, signal.SIGKILL)
    assert liveness.wait_death(kernel, BOUND)
    os.close(kernel)
    holder.kill()
    holder.communicate()
    assert (SHM / name).exists(), "gone too early, or swept by a kernel of another run that has started just now"
    if how == "gc":
        run_here("from realmap.cli import main; main()", "gc")  # or a kernel of somebody else's that starts just now
        assert not (SHM / name).exists()
    elif how == "looked for":
        assert not exists(name)
    else:
        again = start(f"block = SharedMemory({name!r}, create=True, size=3)\nprint(block.size)", "realmap")
        assert end(again) == ("3\n", "")


def test_for_a_whole_program(tree: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REALMAP_VISIBLE", "1")
    block, items = SharedMemory(create=True, size=3), ShareableList([1, 2])
    hidden = SharedMemory(create=True, size=3, visible=False)
    seen = os.listdir(SHM)
    assert block.name in seen and items.shm.name in seen and hidden.name not in seen
    for each in (block, items.shm, hidden):
        each.close()
        each.unlink()
    assert block.name not in os.listdir(SHM)


@pytest.mark.parametrize("bad", ["realmap.mine", "x" * 255])
def test_what_is_no_name_there(tree: None, bad: str) -> None:
    with pytest.raises(OSError) as caught:
        SharedMemory(bad, create=True, size=5, visible=True)
    assert caught.value.errno == errno.EINVAL and not isinstance(caught.value, FileExistsError)
    assert not exists(bad)


# ---- names that others have put there -----------------------------------------------------------


@pytest.fixture
def theirs() -> Iterator[Any]:
    """A block of the standard module, in a program of its own; its name."""
    text = """
    block = SharedMemory(create=True, size=5_000)
    block.buf[:3] = b"abc"
    print(block.name, flush=True)
    sys.stdin.readline()
    print(bytes(block.buf[:3]).decode(), flush=True)
    block.close()
    try:
        block.unlink()
    except FileNotFoundError:
        from multiprocessing import resource_tracker
        resource_tracker.unregister(block._name, "shared_memory")
    """
    maker = start(text, "multiprocessing")
    yield hear(maker), lambda: end(maker)
    if maker.poll() is None:
        end(maker)


def test_one_of_the_standard_module_is_attached_and_outlives_its_reader(tree: None, theirs: Any) -> None:
    name, finish = theirs
    block: Any = SharedMemory(name)
    assert (block.name, block.size, bytes(block.buf[:3])) == (name, 5_000, b"abc")
    block.buf[:3] = b"new"
    assert os.path.samestat(os.fstat(block._fd), os.stat(SHM / name)) and block._mmap[:3] == b"new"
    view = block.buf[1:2]
    with pytest.raises(BufferError):
        block.close()
    assert bytes(block.buf[:3]) == b"new"
    view.release()
    block.close()
    assert (block.buf, block._fd, block._mmap) == (None, -1, None)
    with pytest.raises(FileExistsError):
        SharedMemory(name, create=True, size=5)
    assert finish() == ("new\n", "")
    with pytest.raises(FileNotFoundError):
        block.unlink()


def test_it_is_read_only_and_unlinked_as_others(tree: None, theirs: Any) -> None:
    name, finish = theirs
    reader = SharedMemory(name, readonly=True)
    with pytest.raises(TypeError):
        reader.buf[0] = 1
    reader.close()
    reader.unlink()
    assert not (SHM / name).exists() and not exists(name)
    assert finish() == ("abc\n", "")


def test_an_empty_one(tree: None, name: str) -> None:
    assert not exists(name)  # connections are made now, if any
    before = len(os.listdir("/proc/self/fd"))
    (SHM / name).touch()
    with pytest.raises(ValueError, match="empty"):
        SharedMemory(name)
    assert len(os.listdir("/proc/self/fd")) == before
    (SHM / name).unlink()


def test_a_standard_block_of_this_process(tree: None) -> None:
    """The tracker hears of that one, as ever."""
    theirs = standard.SharedMemory(create=True, size=10)
    ours = SharedMemory(theirs.name)
    ours.buf[0] = 7
    assert theirs.buf[0] == 7
    ours.close()
    theirs.close()
    theirs.unlink()
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]  # the standard library's own helper
