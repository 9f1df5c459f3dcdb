"""What a process may have at a time: who asks for more gets an error, and nobody else notices."""

from __future__ import annotations

import logging
import os
import re
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import syscalls
from conftest import BOUND, PAGE, wait_until

import realmap
from realmap import Kernel, LimitReached, Limits, PhysicalMemoryExhaustion, SyscallTimeout, VirtualMemoryExhaustion
from realmap.kernel import watchdog


@pytest.fixture
def limited() -> Iterator[Callable[..., Kernel]]:
    """Kernels in this process with the tests' handlers and limits of choice."""
    made: list[Kernel] = []

    def make(**limits: Any) -> Kernel:
        made.append(Kernel(syscalls=syscalls.ALL, limits=Limits(**limits)).start())
        return made[-1]

    yield make
    for kernel in made:
        kernel.stop()


def in_threads(count: int, work: Callable[[], object]) -> list[threading.Thread]:
    """Threads that do the same, started."""
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


def test_processes(limited: Callable[..., Kernel]) -> None:
    kernel = limited(processes=2)
    with realmap.connect(kernel.path) as first, realmap.connect(kernel.path):
        with pytest.raises(LimitReached) as caught:
            realmap.connect(kernel.path)
        assert (caught.value.what, caught.value.limit) == ("processes", 2)
        assert first.call("echo", 1) == [1]
    wait_until(lambda: not len(kernel.books.processes))
    with realmap.connect(kernel.path):
        pass


def test_mappings(limited: Callable[..., Kernel]) -> None:
    kernel = limited(mappings=3)
    with realmap.connect(kernel.path) as me, realmap.connect(kernel.path) as other:
        buffers = [me.map(PAGE) for _ in range(3)]
        for length in (PAGE, 32 << 20):
            with pytest.raises(VirtualMemoryExhaustion, match="3 mappings"):
                me.map(length)
        other.map(PAGE)
        buffers.pop().unmap()
        me.map(PAGE)


def test_segments(limited: Callable[..., Kernel]) -> None:
    kernel = limited(segments=4)
    with realmap.connect(kernel.path) as me, realmap.connect(kernel.path) as other:
        buffer = me.map(3 * PAGE, fragment=PAGE)
        with pytest.raises(PhysicalMemoryExhaustion, match="limit of 4 segments"):
            me.map(2 * PAGE, fragment=PAGE)
        me.map(PAGE)
        other.map(4 * PAGE, fragment=PAGE)
        del buffer
        me.map(3 * PAGE, fragment=PAGE)


def test_what_was_unmapped_counts_no_longer_whichever_way_that_was_said(limited: Callable[..., Kernel]) -> None:
    """A notice to a kernel that sleeps takes the socket, the request behind it may take the ring."""
    kernel = limited(segments=4)
    stop = threading.Event()

    def disturb() -> None:
        with realmap.connect(kernel.path) as other:
            while not stop.is_set():
                other.map(5 << 20, commit=False).unmap()
                stop.wait(0.0002)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        with realmap.connect(kernel.path) as me:
            for _ in range(100):
                buffer = me.map(3 * PAGE, fragment=PAGE)
                stop.wait(0.0003)
                del buffer
    finally:
        stop.set()
        thread.join()


def test_half_of_the_kernels_descriptors_are_the_most_that_one_gets() -> None:
    """Of the kernel's own limit, not of the one of the process that made the `Limits`."""
    with Kernel(limits=Limits(calls=5)) as kernel, realmap.connect(kernel.path):
        half = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
        assert next(iter(kernel.books.processes)).memory.allocator._segment_limit == half
    assert Limits().segments is None


def test_mappings_that_are_on_their_way_count(limited: Callable[..., Kernel]) -> None:
    kernel = limited(mappings=3)
    with realmap.connect(kernel.path) as me:
        done: list[object] = []

        def work() -> None:
            try:
                done.append(me.map(5 << 20, commit=False))
            except VirtualMemoryExhaustion as error:
                done.append(error)

        for thread in in_threads(12, work):
            thread.join(BOUND)
        assert sum(isinstance(each, realmap.Buffer) for each in done) == 3
        assert len(done) == 12


def test_calls(limited: Callable[..., Kernel]) -> None:
    kernel = limited(calls=4, running=4)
    with realmap.connect(kernel.path) as me, realmap.connect(kernel.path) as other:
        with me.map(PAGE) as buffer:
            threads = in_threads(4, lambda: me.call("hold", "many", buffer))
            wait_until(lambda: kernel.dispatch.running and len(kernel.dispatch.running) == 4)
            for mine in (me, other):  # a process has one budget, however often it connects
                with pytest.raises(LimitReached) as caught:
                    mine.call("sleep", 0)
                assert (caught.value.what, caught.value.limit) == ("calls", 4)
                assert mine.call("nop") is None  # what does not wait is not counted
            for _ in threads:
                me.call("go")
            for thread in threads:
                thread.join(BOUND)
            wait_until(lambda: not kernel.dispatch.running)
            assert me.call("sleep", 0) == 0


def test_those_beyond_the_running_ones_wait_their_turn(limited: Callable[..., Kernel]) -> None:
    kernel = limited(running=2)
    with realmap.connect(kernel.path) as me, me.map(PAGE) as buffer:
        threads = in_threads(6, lambda: me.call("hold", "turns", buffer))
        wait_until(lambda: len(kernel.dispatch.running) == 6)
        assert me.call("nop") is None
        assert kernel.workers.threads <= 4
        for _ in threads:
            me.call("go")
        for thread in threads:
            thread.join(BOUND)


def test_calls_that_wait_go_with_their_process(limited: Callable[..., Kernel]) -> None:
    kernel = limited(running=1)
    me = realmap.connect(kernel.path)
    buffer = me.map(PAGE)

    def work() -> None:
        with pytest.raises(realmap.KernelError):
            me.call("hold", "gone", buffer)

    threads = in_threads(3, work)
    wait_until(lambda: len(kernel.dispatch.running) == 3)
    me.close()
    wait_until(lambda: len(kernel.dispatch.running) == 1, "the end of those that wait")
    syscalls.gate.put(None)
    for thread in threads:
        thread.join(BOUND)
    wait_until(lambda: not kernel.frames.segments)
    assert not kernel.dispatch.running


def test_seconds(limited: Callable[..., Kernel]) -> None:
    kernel = limited(seconds=0.5, running=1)
    with realmap.connect(kernel.path) as me, me.map(PAGE) as buffer:
        with pytest.raises(SyscallTimeout, match=r"0\.5 s, the kernel's limit"):
            me.call("hold", "long", buffer)
        assert me.call("nop") is None
        syscalls.gate.put(None)
        wait_until(lambda: not kernel.dispatch.running)
        assert me.call("sleep", 0) == 0


def test_a_handler_that_does_not_return_is_told_of(
    limited: Callable[..., Kernel], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watchdog, "REPORT", 0.2)
    monkeypatch.setattr(watchdog, "TICK", 0.05)
    kernel = limited()

    @realmap.syscall(name="spin")
    def spin_until_told(call: realmap.Call) -> None:
        while not caplog.records:
            pass

    kernel.register(spin_until_told, replace=True)
    with realmap.connect(kernel.path) as me, me.map(PAGE) as buffer, caplog.at_level(logging.WARNING, "realmap"):
        me.call("spin")
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == 1
        assert "'spin'" in said[0]
        assert "blocking=True" in said[0]
        assert f"pid {os.getpid()}" in said[0]
        thread = in_threads(1, lambda: me.call("hold", "told", buffer))[0]
        wait_until(lambda: len(caplog.records) == 2, "word of it")
        assert "'hold'" in caplog.records[1].getMessage()
        syscalls.gate.put(None)
        thread.join(BOUND)


@pytest.mark.process
def test_a_kernel_whose_handler_never_returns_ends_all_the_same() -> None:
    with realmap.boot(syscalls=[syscalls.spin]) as kernel:
        me = kernel.connect()

        def work() -> None:
            with pytest.raises(realmap.KernelDied):
                me.call("spin", 3600.0)

        process = psutil.Process(kernel.pid)
        spent = process.cpu_times().user
        thread = in_threads(1, work)[0]
        wait_until(lambda: process.cpu_times().user > spent + 0.3, "its spinning")
        began = time.monotonic()
        kernel.shutdown(0.5)
        assert time.monotonic() - began < 30
        thread.join(BOUND)
        assert not os.path.exists(f"/proc/{kernel.pid}")
        me.close()


def test_who_says_nothing_is_closed(limited: Callable[..., Kernel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "SILENCE", 0.1)
    monkeypatch.setattr(watchdog, "TICK", 0.05)
    kernel = limited()
    with realmap.connect(kernel.path) as me, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.connect(kernel.path)
        silent.settimeout(BOUND)
        assert silent.recv(10) == b""
        assert me.call("nop") is None
        assert not kernel.watchdog.is_needed


@pytest.mark.parametrize("wrong", [{"calls": 0}, {"seconds": 0}, {"seconds": float("nan")}, {"seconds": -1.0}])
def test_limits_that_let_nobody_in(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Limits(**wrong)


def test_limits_of_another_kind() -> None:
    with pytest.raises(realmap.InvalidSize):
        Limits(mappings=-1)
    with pytest.raises(TypeError):
        Limits(processes="many")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Limits"):
        Kernel(limits=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["memory_limit", "process_limit", "kernel_land", "lazy_unmap"])
def test_limits_of_bytes_are_named(name: str) -> None:
    with pytest.raises(realmap.InvalidSize, match=f"^{name} must be from 0 to"):
        Kernel(**{name: -1})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=f"^{name} must be an integer number of bytes, not str"):
        Kernel(**{name: "1G"})  # type: ignore[arg-type]


def test_limits_of_bytes_are_told_apart() -> None:
    options = {"memory_limit": 5 * PAGE, "process_limit": 3 * PAGE}
    with Kernel(**options) as kernel:  # type: ignore[arg-type]
        with realmap.connect(kernel.path) as me, realmap.connect(kernel.path) as other, me.map(3 * PAGE):
            for user, pages, said in (
                (me, 1, f"the limit of {3 * PAGE} bytes for each process (process_limit) "),
                (other, 3, f"the limit of {5 * PAGE} bytes for all (memory_limit) "),
            ):
                with pytest.raises(PhysicalMemoryExhaustion, match=re.escape(said)):
                    user.map(pages * PAGE)


def test_limits_are_shown() -> None:
    assert "calls=7" in repr(Limits(calls=7))


@pytest.mark.process
def test_they_travel_to_a_booted_kernel() -> None:
    with realmap.boot(limits=Limits(mappings=1)) as kernel, kernel.connect() as me:
        me_first = me.map(PAGE)
        with pytest.raises(VirtualMemoryExhaustion, match="1 mappings"):
            me.map(PAGE)
        del me_first
