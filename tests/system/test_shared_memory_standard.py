"""realmap.shared_memory: held against CPython's own tests, and against what people suffer from in the standard one."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import redirected
from blocks import HERE, clean, end, hear, program, run, start
from conftest import BOUND, long, wait_until

from realmap.host import runtime
from realmap.shared_memory import SharedMemory

BOTH = [long("multiprocessing"), "realmap"]


def names() -> set[str]:
    """What of the standard module lies in /dev/shm."""
    return {name for name in os.listdir("/dev/shm") if name.startswith("psm_")}


# ---- CPython's own --------------------------------------------------------------------------------


@pytest.mark.skipif(
    importlib.util.find_spec("test") is None or importlib.util.find_spec("test._test_multiprocessing") is None,
    reason="this interpreter comes without its own tests",
)
@pytest.mark.parametrize(
    "method",
    ["fork", pytest.param("spawn", marks=pytest.mark.slow), pytest.param("forkserver", marks=pytest.mark.slow)],
)
def test_the_standard_librarys_own_tests(method: str) -> None:
    done = subprocess.run(
        [sys.executable, redirected.__file__, method],
        env={**clean(), "PYTHONWARNINGS": "default"},
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=2 * BOUND,
    )
    assert done.returncode == 0, done.stderr
    expected = 14 if sys.version_info >= (3, 13) else 12
    assert f"Ran {expected} tests" in done.stderr


# ---- who suffers from what -------------------------------------------------------------------------


@pytest.mark.parametrize("module", BOTH)
def test_an_unrelated_readers_exit_does_not_destroy_it(module: str) -> None:
    owner = start(
        """
        block = SharedMemory(create=True, size=100)
        block.buf[:5] = b"owner"
        print(block.name, flush=True)
        sys.stdin.readline()
        try:
            again = SharedMemory(block.name)
            print(bytes(again.buf[:5]).decode())
            again.close()
        except FileNotFoundError:
            print("destroyed")
        block.close()
        try:
            block.unlink()
        except FileNotFoundError:
            pass
        """,
        module,
    )
    name = hear(owner)
    reader = run("block = SharedMemory(sys.argv[1]); print(bytes(block.buf[:5])); block.close()", module, name)
    assert reader.stdout == "b'owner'\n"
    if module == "multiprocessing":  # its tracker, which goes with the reader, unlinks it (python/cpython issue 82300)
        wait_until(lambda: name not in names())
    out, errors = end(owner)
    assert out.strip() == ("destroyed" if module == "multiprocessing" else "owner")
    if module == "realmap":
        assert errors == reader.stderr == ""


@pytest.mark.parametrize("module", BOTH)
def test_sigkill_of_everything_leaves_nothing(module: str) -> None:
    before = runtime.sockets()
    process = start(
        "block = SharedMemory(create=True, size=1 << 20)\nprint(block.name, flush=True)\ntime.sleep(100)", module
    )
    name = hear(process)
    kernels = [path for path in runtime.sockets() if path not in before]
    group = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and _session(int(pid)) == process.pid]
    marks = tuple(f"{runtime.SEGMENT_PREFIX}{runtime.stamp(pid)}." for pid in group)
    for pid in group:
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=BOUND)
    if module == "multiprocessing":
        assert name in names()  # for ever
        os.unlink(f"/dev/shm/{name}")
    else:
        assert len(kernels) == 1 and len(group) == 2
        wait_until(lambda: not any(left.startswith(marks) for left in os.listdir("/dev/shm")))
        assert name not in names()
        assert runtime.sockets() == before
        runtime.sweep()


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return -1


@pytest.mark.parametrize("module", BOTH)
def test_a_full_dev_shm_is_an_error_and_not_a_sigbus(module: str) -> None:
    if os.geteuid():
        pytest.skip("a /dev/shm of its own, to fill, needs root (unshare)")
    text = program(
        """
        try:
            block = SharedMemory(create=True, size=8 << 20)
        except MemoryError as error:
            print("MemoryError", error)
        else:
            block.buf[:] = bytes(8 << 20)
        """,
        module,
    )
    mount = 'mount -t tmpfs -o size=4m tmpfs /dev/shm && exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, "-", sys.executable, "-c", text],
        env=clean(),
        capture_output=True,
        text=True,
        timeout=BOUND,
    )
    if module == "multiprocessing":
        assert done.returncode == -signal.SIGBUS
    else:
        assert done.returncode == 0 and "/dev/shm" in done.stdout, done


@pytest.mark.parametrize("module", BOTH)
def test_a_failed_attach_does_not_unlink(module: str) -> None:
    done = run(
        """
        import resource
        block = SharedMemory(create=True, size=64 << 20)
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), resource.RLIM_INFINITY))
        try:
            SharedMemory(block.name)
            print("no limit")
        except (OSError, MemoryError):
            pass
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        try:
            SharedMemory(block.name).close()
            print("there")
        except FileNotFoundError:
            print("unlinked")
        block.close()
        try:
            block.unlink()
        except FileNotFoundError:
            pass
        """,
        module,
    )
    assert done.stdout.strip() == ("unlinked" if module == "multiprocessing" else "there"), done


@pytest.mark.parametrize("module", BOTH)
def test_no_warnings_at_exit(module: str) -> None:
    """Of a program that forgets to unlink, keeps a view, and never closes."""
    done = run("block = SharedMemory(create=True, size=4096)\nview = block.buf[10:20]", module)
    assert done.returncode == 0
    if module == "multiprocessing":
        assert "leaked" in done.stderr and "BufferError" in done.stderr
    else:
        assert done.stderr == ""


def test_the_size_asked_for_is_the_size_got(tree: None) -> None:
    for size in (1, 100, 4096, 4097, 1_000_001):
        block = SharedMemory(create=True, size=size)
        other = SharedMemory(block.name, size=5 * size)
        assert block.size == len(block.buf) == other.size == len(other.buf) == size
        block.close()
        other.close()
        assert block.size == size
        other.unlink()


def test_a_read_only_attach_cannot_write(tree: None) -> None:
    block = SharedMemory(create=True, size=100)
    reader = SharedMemory(block.name, readonly=True)
    block.buf[:3] = b"new"
    assert bytes(reader.buf[:3]) == b"new"
    with pytest.raises(TypeError, match="read-only"):
        reader.buf[0] = 1
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.startswith("2")]
    assert any(" r--s " in line for line in maps)
    block.close()
    reader.close()
    reader.unlink()
