"""realmap.shared_memory: names and how long they live, whose tree it is, and what is refused."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

import pytest
from blocks import HERE, clean, exists, program, run
from conftest import BOUND, in_threads, wait_until

import realmap
from realmap import ambient
from realmap.shared_memory import ShareableList, SharedMemory, lookup
from realmap.user import travel

# ---- names, and how long they live -----------------------------------------------------------------


def make_and_end(pipe: Any, close: bool) -> None:
    block = SharedMemory(create=True, size=50)
    block.buf[:5] = b"child"
    pipe.send(block.name)
    if close:
        block.close()


@pytest.mark.parametrize("close", [True, False])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_workers_block_outlives_its_end_in_good_order(tree: None, method: str, close: bool) -> None:
    """The worker is the first to need a kernel: it is the tree's all the same."""
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    worker = context.Process(target=make_and_end, args=(theirs, close))
    worker.start()
    name = ours.recv()
    worker.join(BOUND)
    worker.close()
    ours.close()
    theirs.close()
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]  # the standard library's own helper
    block = SharedMemory(name)
    assert bytes(block.buf[:5]) == b"child"
    block.close()
    block.unlink()
    assert not exists(name)


def test_who_reads_a_workers_output_does_not_wait_for_the_kernel(tree: None) -> None:
    """The worker boots the tree's kernel, which stays."""
    text = "block = SharedMemory(create=True, size=5); print(block.name)"
    done = run(text, "realmap", env=dict(os.environ))
    assert done.stderr == ""
    SharedMemory(done.stdout.strip()).unlink()


@contextmanager
def maker(**options: bool) -> Iterator[str]:
    """A process that makes a block and holds it, until it is killed at the end; the block's name."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        block = SharedMemory(create=True, size=10, **options)
        os.write(writer, block.name.encode())
        signal.pause()
    try:
        yield os.read(reader, 100).decode()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)
        os.close(writer)


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[realmap.KernelHandle]:
    """A kernel that is not the tree's, and outlives it."""
    with realmap.boot() as kernel:
        monkeypatch.setenv(ambient.VARIABLE, kernel.path)
        kernel.stats()
        yield kernel
        process = travel.made(kernel.path)
        assert process is not None
        process.close()


def test_one_whose_making_is_interrupted_is_not_there(outside: realmap.KernelHandle) -> None:
    def stop(*_: object) -> None:
        raise InterruptedError

    def nothing_is_left() -> bool:
        process.query(realmap.memory.USER_LAND.start)  # an answer that comes late is given back when it is read
        stats = outside.stats()
        return (stats["handles"], stats["bytes"]) == (0, 0)

    process = ambient.process()
    before, stopped = signal.signal(signal.SIGALRM, stop), 0
    try:
        for number in range(12):
            name = f"stopped_{os.getpid()}"
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.002 * (number % 4 + 1))
                block = SharedMemory(name, create=True, size=64 << 20)
                signal.setitimer(signal.ITIMER_REAL, 0)
                block.close()
                block.unlink()
            except InterruptedError:
                stopped += 1
            wait_until(nothing_is_left)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert stopped


def test_what_a_killed_maker_named_goes(outside: realmap.KernelHandle) -> None:
    with maker() as name:
        assert name
    wait_until(lambda: not exists(name), "the end of what a killed process had named")


def test_it_lives_while_somebody_has_attached_it(outside: realmap.KernelHandle) -> None:
    with maker() as name:
        block = SharedMemory(name)
    wait_until(lambda: outside.stats()["processes"] == 1)
    assert exists(name)
    block.unlink()
    assert not exists(name)
    block.close()


def test_untracked_it_outlives_its_killed_maker(outside: realmap.KernelHandle) -> None:
    ambient.process()
    with maker(track=False) as name:
        assert exists(name)
    wait_until(lambda: outside.stats()["processes"] == 1)
    block = SharedMemory(name)
    block.close()
    block.unlink()


def test_a_forked_child_that_ends_in_good_order_leaves_it(outside: realmap.KernelHandle) -> None:
    reader, writer = os.pipe()
    code = f"""
    pid = os.fork()
    if not pid:
        os.write({writer}, SharedMemory(create=True, size=3).name.encode())
        sys.exit(0)
    os.waitpid(pid, 0)
    """
    done = subprocess.run([sys.executable, "-c", program(code, "realmap")], pass_fds=[writer], timeout=BOUND)
    assert done.returncode == 0
    os.close(writer)
    name = os.read(reader, 100).decode()
    os.close(reader)
    wait_until(lambda: outside.stats()["processes"] <= 1)
    assert exists(name)
    SharedMemory(name).unlink()


def test_a_users_own_connection_may_be_closed(outside: realmap.KernelHandle) -> None:
    with realmap.connect():
        block = SharedMemory(create=True, size=3)
    assert exists(block.name)
    block.close()
    block.unlink()


def test_threads_that_use_it_first_at_the_same_time(outside: realmap.KernelHandle) -> None:
    made: list[str] = []
    barrier = threading.Barrier(6)

    def make(_: int) -> None:
        barrier.wait()
        block = SharedMemory(create=True, size=3)
        made.append(block.name)
        block.close()

    in_threads(6, make)
    gc.collect()
    assert outside.stats()["processes"] == 1
    for name in made:
        SharedMemory(name).unlink()


def test_a_stopped_kernel_of_somebody_else_is_not_waited_for(tree: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "PATIENCE", 0.2)
    with realmap.boot() as other:
        other.stats()
        assert not exists("nobody-has-this")  # a connection comes and goes
        os.kill(other.pid, signal.SIGSTOP)
        try:
            start = time.monotonic()
            for _ in range(5):
                block = SharedMemory("new", create=True, size=5)
                block.close()
                block.unlink()
            assert time.monotonic() - start < BOUND
        finally:
            os.kill(other.pid, signal.SIGCONT)
    lookup._silent.clear()


def test_threads_that_look_in_vain_do_not_disturb_each_other(tree: None) -> None:
    def look(_: int) -> None:
        for _ in range(20):
            with pytest.raises(FileNotFoundError):
                SharedMemory("nobody-has-this")

    with realmap.boot() as other:
        other.stats()
        in_threads(4, look)
        wait_until(lambda: other.stats()["processes"] == 0)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_import_it_and_the_parent_only_later(method: str) -> None:
    """The tree is the parent's all the same."""
    text = f"""
    import multiprocessing, os
    import worker_of_a_pool
    if __name__ == "__main__":
        with multiprocessing.get_context("{method}").Pool(2) as pool:
            names = pool.map(worker_of_a_pool.make, range(4))  # and its workers are killed here
        from realmap.shared_memory import SharedMemory
        for number, name in enumerate(names):
            block = SharedMemory(name)
            assert block.buf[0] == number
            block.close()
            block.unlink()
        print("there")
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(text)],
        env=clean(),
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=BOUND,
    )
    assert (done.stdout, done.stderr) == ("there\n", "")


def test_read_only_it_stays_through_a_pickle(tree: None) -> None:
    block = SharedMemory("/a-name", create=True, size=3)
    reader = pickle.loads(pickle.dumps(SharedMemory("a-name", readonly=True)))
    assert reader.buf.readonly
    assert not pickle.loads(pickle.dumps(block)).buf.readonly
    reader.close()
    block.close()
    block.unlink()


def test_other_programs_of_the_same_user_find_it(tree: None) -> None:
    block = SharedMemory(create=True, size=10)
    block.buf[:2] = b"hi"
    text = """
    other = SharedMemory(sys.argv[1])
    print(bytes(other.buf[:2]))
    try:
        SharedMemory(sys.argv[1], create=True, size=1)
    except FileExistsError:
        print("taken")
    other.close()
    other.unlink()
    """
    done = run(text, "realmap", block.name)
    assert (done.stdout, done.stderr) == ("b'hi'\ntaken\n", "")
    block.close()
    with pytest.raises(FileNotFoundError):
        block.unlink()


def test_a_name_is_free_again(tree: None) -> None:
    for data in (b"one", b"two"):
        block = SharedMemory("chosen", create=True, size=3)
        assert bytes(block.buf) == bytes(3)
        block.buf[:] = data
        with pytest.raises(FileExistsError):
            SharedMemory("chosen", create=True, size=3)
        block.unlink()
        block.close()


def test_memory_lives_while_it_is_mapped(tree: None) -> None:
    block = SharedMemory(create=True, size=3)
    other = pickle.loads(pickle.dumps(block))
    block.unlink()
    block.buf[:] = b"abc"
    block.close()
    block.close()
    assert bytes(other.buf) == b"abc"
    other.close()
    assert block.buf is None
    with pytest.raises(FileNotFoundError):
        pickle.loads(pickle.dumps(block))


def test_a_view_keeps_it_open(tree: None) -> None:
    block = SharedMemory(create=True, size=8)
    view = block.buf[2:4]
    with pytest.raises(BufferError):
        block.close()
    block.buf[2] = 7
    assert view[0] == 7
    view.release()
    block.close()
    block.unlink()


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: SharedMemory(create=True), ValueError, "at least one byte"),
        (lambda: SharedMemory(create=True, size=-1), ValueError, "positive"),
        (lambda: SharedMemory(size=1), ValueError, "give the name"),
        (lambda: SharedMemory("a\0b"), ValueError, "null"),
        (lambda: SharedMemory("new", create=True, size=1, readonly=True), ValueError, "read-only"),
        (lambda: SharedMemory(b"name"), TypeError, "bytes"),
        (lambda: SharedMemory("nobody-has-this"), FileNotFoundError, "nobody-has-this"),
        (lambda: SharedMemory("new", create=True, size=1 << 60), MemoryError, "bytes"),
        (lambda: SharedMemory("new", create=True, size=1.5), TypeError, "integer"),
    ],
)
def test_bad_input(tree: None, make: Callable[[], SharedMemory], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()
    assert not exists("new")


@pytest.mark.parametrize(
    ("name", "number"),
    [("a/b", errno.EINVAL), ("//", errno.EINVAL), ("", errno.EINVAL), ("x" * 256, errno.ENAMETOOLONG)],
)
def test_what_is_no_name(tree: None, name: str, number: int) -> None:
    for options in ({}, {"create": True, "size": 5}):
        with pytest.raises(OSError, match="name of a block") as caught:
            SharedMemory(name, **options)  # type: ignore[arg-type]
        assert caught.value.errno == number


def test_without_descriptors_nothing_is_left(tree: None) -> None:
    block = SharedMemory(create=True, size=8)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, limit[1]))
    taken: list[int] = []
    try:
        with pytest.raises(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        with pytest.raises((OSError, MemoryError)):
            SharedMemory("new", create=True, size=5)
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert not exists("new")
    block.close()
    block.unlink()


def test_a_list(tree: None) -> None:
    made = ShareableList([1, "two", b"3", None, 4.5, True])
    other = ShareableList(name=made.shm.name)
    other[1] = "2"
    assert list(made) == [1, "2", b"3", None, 4.5, True]
    assert isinstance(made.shm, SharedMemory)
    assert len(pickle.loads(pickle.dumps(made))) == 6
    other.shm.close()
    made.shm.close()
    made.shm.unlink()
