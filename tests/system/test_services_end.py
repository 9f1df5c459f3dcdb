"""How a service ends: by its close, its process, its kernel; what runs and waits then."""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import BOUND, PAGE, wait_until
from forked import in_a_child
from raw_client import RawClient, RawSession
from small_services import Gate, gate, gated, named, passing, pool, square

import realmap
from realmap import Call, KernelDied, KernelError, KernelHandle, Process, ServerDied, UserBuffer
from realmap._core import RING_BYTES
from realmap.host import procfs
from realmap.memory import LENT_LAND

__all__ = ["gate", "pool"]
CARRIERS = ("ring", "socket")


def test_close_lets_what_runs_end_and_sends_away_what_waits(me: Process, pool: ThreadPoolExecutor, gate: Gate) -> None:
    service = me.serve(gated(gate, True))
    calls = passing(me, pool, 4)
    wait_until(lambda: service.calls == 4 and gate.at_work == 1)
    with pytest.raises(TimeoutError):
        service.close(timeout=0.01)
    waiting = [each for each in calls if isinstance(each.exception(BOUND) if each.done() else None, ServerDied)]
    wait_until(lambda: sum(each.done() for each in calls) == 3)
    waiting = [each.exception() for each in calls if each.done()]
    assert [(type(each), each.began) for each in waiting] == [(ServerDied, False)] * 3  # type: ignore[union-attr]
    gate.open()
    service.close()
    assert [each.result(BOUND) for each in calls if not each.exception(BOUND)] == ["through"]
    service.close()
    assert service.has_ended and service.wait(0)
    with pytest.raises((realmap.UnknownSyscall, ServerDied)):
        me.call("gate")


def test_its_end_keeps_no_event_loop_waiting(me: Process, pool: ThreadPoolExecutor, gate: Gate) -> None:
    async def program() -> str:
        async with me.serve(gated(gate, True)) as service:
            call = pool.submit(me.call, "gate", timeout=BOUND)
            while not gate.at_work:
                await asyncio.sleep(0.001)
            asyncio.get_running_loop().call_later(0.01, gate.open)
        assert service.has_ended
        return call.result(BOUND)

    assert asyncio.run(program()) == "through"


@pytest.mark.parametrize("blocking", [False, True])
def test_a_handler_that_closes_its_own_service(me: Process, blocking: bool) -> None:
    def end(call: Call) -> str:
        service.close()
        return "said"

    service = me.serve(realmap.syscall(name="end", blocking=blocking)(lambda call: end(call)))
    assert me.call("end", timeout=BOUND) == "said"
    wait_until(lambda: service.has_ended)


def test_it_ends_whatever_a_caller_has_scribbled_into_its_ring(kernel: KernelHandle, me: Process) -> None:
    @realmap.syscall
    def end(call: Call) -> None:  # by the thread that would look into the ring next
        if session.spin:
            with mmap.mmap(session.fds[0], RING_BYTES) as ring:
                ring[:] = b"\xff" * RING_BYTES
        service.close()

    service = me.serve(end)
    with RawClient(kernel.path) as client, RawSession(client, "end") as session:
        me.call("end", timeout=BOUND)
        assert service.wait(BOUND)
        wait_until(lambda: session.has_ended)


def serve_square(me: Process) -> None:
    with me.serve(square) as service:
        service.wait()


def test_what_waits_goes_to_another_server(me: Process, pool: ThreadPoolExecutor, gate: Gate) -> None:
    service = me.serve(gated(gate, True))
    calls = passing(me, pool, 3)
    wait_until(lambda: service.calls == 3 and gate.at_work == 1)
    with me.serve(realmap.syscall(name="gate")(lambda call: "another")):
        with pytest.raises(TimeoutError):
            service.close(timeout=0)
        wait_until(lambda: sum(each.done() for each in calls) == 2)
        assert [each.result() for each in calls if each.done()] == ["another"] * 2
        gate.open()
        service.close()
    assert sorted(each.result(BOUND) for each in calls) == ["another", "another", "through"]


def test_wait_ends_with_the_kernel() -> None:
    with realmap.boot() as kernel, kernel.connect() as me:
        service = me.serve(square)
        assert not service.wait(0)
        os.kill(kernel.pid, signal.SIGKILL)
        with pytest.raises(KernelDied):
            service.wait(BOUND)
        service.close()


@pytest.mark.parametrize("kind", ["short", "blocking", "task"])
def test_a_handler_may_outlive_its_kernel(kind: str, caplog: pytest.LogCaptureFixture, gate: Gate) -> None:
    ended = threading.Event()

    def stay(call: Call, data: UserBuffer) -> None:
        gate.handler(call)
        ended.set()

    async def nap(call: Call, data: UserBuffer) -> None:
        gate.at_work = 1
        try:
            await asyncio.sleep(BOUND)
        finally:
            ended.set()

    handler = nap if kind == "task" else stay
    with realmap.boot() as kernel, kernel.connect() as me, ThreadPoolExecutor(1) as pool:
        service = me.serve(realmap.syscall(name="stay", blocking=kind == "blocking")(handler), threads=2)
        called = pool.submit(me.call, "stay", me.map(PAGE))
        wait_until(lambda: service._server._beside and gate.at_work)
        os.kill(kernel.pid, signal.SIGKILL)
        with pytest.raises(KernelDied):
            service.wait(BOUND)
        gate.open()
        assert ended.wait(BOUND)
        assert isinstance(called.exception(BOUND), KernelError)
        wait_until(lambda: not service._server._beside)
    assert not [each for each in caplog.records if each.levelno >= logging.ERROR]


def test_ctrl_c_ends_the_wait_alone(me: Process) -> None:
    with me.serve(square) as service:
        with pytest.raises(KeyboardInterrupt):
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
            service.wait(BOUND)
        assert me.call("square", 4)[0] == 16


def test_a_forked_child_serves_nobody(me: Process) -> None:
    with me.serve(square, lazy_unmap=1 << 20) as service:
        assert me.call("square", 2) == [4, os.getpid()]

        def work() -> None:
            service.close()
            assert service.has_ended and not procfs.maps("self", LENT_LAND.start, LENT_LAND.end)

        in_a_child(work)
        assert me.call("square", 3) == [9, os.getpid()]


def test_a_service_ends_with_its_process(kernel: KernelHandle, me: Process) -> None:
    user = kernel.connect()
    service = user.serve(square)
    assert me.call("square", 5)[0] == 25
    user.close()
    with pytest.raises(realmap.ProcessKilled):
        service.wait(BOUND)
    service.close()
    with pytest.raises((ServerDied, realmap.UnknownSyscall)):
        me.call("square", 5)


def test_many_services_come_and_go(me: Process) -> None:
    """More than LentLand has parts for at a time."""
    services = [me.serve(named(f"square{number}")) for number in range(40)]
    assert [me.call(f"square{number}", number)[0] for number in range(40)] == [number**2 for number in range(40)]
    for service in services:
        service.close()
