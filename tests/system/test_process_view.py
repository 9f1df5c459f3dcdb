"""`call.kernel.process(pid)` and `processes()`: what a handler sees of any connected process, by the books."""

from __future__ import annotations

import mmap
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import BOUND, PAGE, wait_until

import realmap
from realmap import Call, KernelHandle, Process, k_r, k_rw


@realmap.syscall
def look(call: Call, pid: int) -> list[Any]:
    """What there is, as plain data."""
    found = call.kernel.process(pid)
    rows = [[each.address, each.length, each.kind, int(each.rights), each.why_not] for each in found.mappings()]
    return [found.pid, found.name, rows]


@realmap.syscall
def pids(call: Call) -> list[int]:
    """Of everybody."""
    return [each.pid for each in call.kernel.processes()]


@realmap.syscall
def take(call: Call, pid: int, address: int, length: int, how: str = "copy") -> bytes:
    """Bytes of another process."""
    found = call.kernel.process(pid)
    if how == "copy":
        return bytes(found.copy_in(address, length))
    if how == "late":
        time.sleep(0.1)  # by then the loop is another thread's
    with found.mirror(address, length, k_r) as mirror:
        return bytes(mirror)


@realmap.syscall(blocking=True)
def take_on_a_worker(call: Call, pid: int, address: int, length: int) -> bytes:
    """The same beside the loop."""
    return bytes(call.kernel.process(pid).copy_in(address, length))


@realmap.syscall
def put(call: Call, pid: int, address: int, data: bytes) -> None:
    """Writes into another process."""
    call.kernel.process(pid).copy_out(address, data)


@realmap.syscall
def peep(call: Call) -> bytes:
    """Into a process that is none of the kernel's: what is seen of this handler's own."""
    fd = os.memfd_create("peep")
    os.write(fd, b"inside")
    with mmap.mmap(fd, 6) as shown, realmap.ForeignProcess(os.getpid()) as found:
        (place,) = [each for each in found.mappings() if each.name.startswith("/memfd:peep")]
        kept = found.mirror(place.address, 6, k_rw)
        _kept.append(kept)
        os.close(fd)
        return bytes(kept) + shown[:1]


_kept: list[realmap.CrossProcessMapping] = []


@realmap.syscall
def spin(call: Call, seconds: float) -> int:
    """Asks all the time; it loses the loop all the same."""
    end, asked = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        asked += len(call.kernel.processes()) > 0
    return asked


@pytest.fixture(scope="module")
def kernel() -> Iterator[KernelHandle]:
    with realmap.boot(syscalls=[look, pids, take, take_on_a_worker, put, peep, spin]) as handle:
        handle.stats()
        yield handle


@pytest.fixture
def me(kernel: KernelHandle) -> Iterator[Process]:
    with kernel.connect() as process:
        yield process
        assert kernel.audit()
    wait_until(lambda: not kernel.stats()["processes"])


def owner(me: Process) -> None:
    """Maps, and waits."""
    buffer, other = me.map(2 * PAGE, rights=realmap.u_r), me.map(3333, fragment=PAGE)
    private = me.map(PAGE, type=realmap.MemoryType.NORMAL)
    other[:5] = b"there"
    signal.pause()
    del buffer, other, private


def test_the_memory_of_another_process(kernel: KernelHandle, me: Process) -> None:
    child = kernel.spawn(owner)
    wait_until(lambda: child.pid in me.call("pids") and len(me.call("look", child.pid)[2]) == 3)
    pid, name, rows = me.call("look", child.pid)
    assert (pid, bool(name)) == (child.pid, True)
    assert set(me.call("pids")) == {os.getpid(), child.pid}
    (readable, other, private) = sorted(rows, key=lambda row: (row[2], row[3]))
    assert (readable[2:], other[2:]) == (["HEAP", realmap.u_r, ""], ["HEAP", realmap.u_rw, ""])
    assert private[2] == "NORMAL" and private[4]
    wait_until(lambda: me.call("take", child.pid, other[0], 5) == b"there")
    for how in ("mirror", "late"):
        assert me.call("take", child.pid, other[0], 5, how=how) == b"there"
    assert me.call("take_on_a_worker", child.pid, other[0] + 1, 4) == b"here"
    me.call("put", child.pid, other[0] + 5, b"fore")
    assert me.call("take", child.pid, other[0], 9) == b"therefore"
    for name, args, wrong in [
        ("put", (readable[0], b"x"), realmap.AccessDenied),
        ("take", (private[0], 1), realmap.InvalidMemState),
        ("take", (0x2000, 1), realmap.InvalidAddress),
        ("take", (other[0], 0), realmap.InvalidSize),
        ("take", (private[0] + 100 * PAGE, 1), realmap.InvalidAddress),
    ]:
        with pytest.raises(wrong):
            me.call(name, child.pid, *args)
    child.kill()
    child.join(BOUND)
    kernel.settle(timeout=BOUND)
    with pytest.raises(realmap.InvalidHandle, match="no user of this kernel"):
        me.call("look", child.pid)


def test_a_handler_that_always_asks_does_not_stop_the_others(kernel: KernelHandle, me: Process) -> None:
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(me.call("spin", 1.0)))
    thread.start()
    try:
        for _ in range(50):
            assert me.call("pids", timeout=BOUND) == [os.getpid()]
        assert not done
    finally:
        thread.join()
    assert done[0] > 100


def test_a_mirror_of_a_stranger_in_a_handler_is_no_error_of_the_books(kernel: KernelHandle, me: Process) -> None:
    assert me.call("peep") == b"insidei"
    report = kernel.audit()  # while it is mapped
    assert report, str(report)


def test_by_the_program_that_runs_the_kernel() -> None:
    with realmap.Kernel() as kernel, realmap.connect(kernel.path) as me:
        buffer = me.map(PAGE)
        buffer[:2] = b"ok"
        (found,) = kernel.processes()
        assert found.copy_in(buffer.address, 2) == b"ok"
        view = kernel.process(os.getpid())
        with realmap.connect(kernel.path) as again:  # two connections of one pid: both are seen
            second = again.map(PAGE)
            second[:3] = b"two"
            assert [each.address for each in view.mappings()] == sorted((buffer.address, second.address))
            assert len(kernel.processes()) == 1
        me.close()
        wait_until(lambda: not kernel.processes())
        with pytest.raises(realmap.ProcessKilled, match="connected no more"):
            view.mappings()
