"""A service: who runs its calls, how many at a time, in which order; names, bad arguments, lent windows."""

from __future__ import annotations

import asyncio
import os
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from conftest import BOUND, PAGE, wait_until
from small_services import Gate, gate, gated, named, passing, pool, square

import realmap
from realmap import Call, KernelError, KernelHandle, LimitReached, PhysicalMemoryExhaustion, Process, UserBuffer
from realmap.memory import LENT_LAND, CrossProcessMapping
from realmap.observe.control import Control

__all__ = ["gate", "pool"]
CARRIERS = ("ring", "socket")


@pytest.mark.parametrize("blocking", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_so_many_are_at_work_at_a_time(
    me: Process, pool: ThreadPoolExecutor, gate: Gate, threads: int, blocking: bool
) -> None:
    with me.serve(gated(gate, blocking), threads=threads) as service:
        calls = passing(me, pool, 8)
        wait_until(lambda: service.calls == 8)
        wait_until(lambda: gate.at_work == threads)
        gate.open()
        assert [each.result(BOUND) for each in calls] == ["through"] * 8
    assert gate.most == threads


def test_a_queue_that_is_full_names_its_limit(me: Process, pool: ThreadPoolExecutor, gate: Gate) -> None:
    with me.serve(gated(gate, True), queue=2) as service:
        calls = passing(me, pool, 3)
        wait_until(lambda: service.calls == 3)
        with pytest.raises(LimitReached, match="queue") as caught:
            me.call("gate", timeout=BOUND)
        assert caught.value.limit == 2
        gate.open()
        assert [each.result(BOUND) for each in calls] == ["through"] * 3


def test_callers_have_fair_turns(kernel: KernelHandle, me: Process, pool: ThreadPoolExecutor, gate: Gate) -> None:
    """One that has many calls waiting does not keep another one's first."""
    order: list[int] = []

    def note(call: Call) -> None:
        order.append(call.process.number)

    with kernel.connect() as other, me.serve(gated(gate, True), note, queue=20) as service:
        first = passing(me, pool, 1)
        wait_until(lambda: gate.at_work == 1)
        many = []
        for count in range(2, 7):
            many.append(pool.submit(me.call, "note"))
            wait_until(lambda count=count: service.calls == count)
        one = pool.submit(other.call, "note")
        wait_until(lambda: service.calls == 7)
        gate.open()
        for each in (*first, *many, one):
            each.result(BOUND)
    assert len(order) == 6
    assert order.index(max(order)) <= 1  # `other` is the younger one


# ---- what a handler is told -------------------------------------------------------------------------


def test_the_call_of_a_service(me: Process) -> None:
    def tell(call: Call) -> list[Any]:
        assert call.deadline is not None
        return [call.process.pid, call.process.uid, call.name, call.deadline - time.monotonic(), call.cancelled]

    def ask_kernel(call: Call) -> str:
        return call.kernel.path

    with me.serve(tell, ask_kernel):
        pid, uid, name, left, cancelled = me.call("tell", timeout=BOUND)
        assert (pid, uid, name, cancelled) == (os.getpid(), os.getuid(), "tell", False)
        assert 0 < left <= BOUND
        with pytest.raises(KernelError, match=r"call\.kernel\.path is for handlers that run in the kernel"):
            me.call("ask_kernel")


def test_cancelled_when_the_caller_dies_and_when_it_closes(kernel: KernelHandle, me: Process) -> None:
    told: list[bool] = []

    @realmap.syscall(blocking=True)
    def until_cancelled(call: Call, data: UserBuffer) -> None:
        with data.mirror() as mirror:
            told.append(False)
            wait_until(lambda: call.cancelled)
            mirror[:4] = b"last"  # its memory is good until the handler returns
            told.append(mirror[:4] == b"last")

    def ask(user: Process) -> None:
        user.call("until_cancelled", user.map(PAGE))

    service = me.serve(until_cancelled)
    asker = kernel.spawn(ask)
    wait_until(lambda: told == [False])
    asker.kill()
    asker.join(BOUND)
    wait_until(lambda: told == [False, True])
    told.clear()
    asker = kernel.spawn(ask)
    wait_until(lambda: told == [False])
    service.close()
    assert told == [False, True]
    asker.join(BOUND)


# ---- names, and bad arguments -----------------------------------------------------------------------


def test_names_that_are_taken(me: Process) -> None:
    with realmap.boot(syscalls=[square]) as kernel, kernel.connect() as user:
        with pytest.raises(KernelError, match="square"):
            user.serve(square)
        with user.serve(named("other")), pytest.raises(KernelError, match="other"):
            kernel.register(named("other"))
        kernel.register(named("other"))


@pytest.mark.parametrize(
    ("arguments", "options", "kind"),
    [
        ((), {}, ValueError),
        ((square,), {"threads": 0}, ValueError),
        ((square,), {"threads": -1}, realmap.InvalidSize),
        ((square,), {"queue": -1}, realmap.InvalidSize),
        ((square,), {"lazy_unmap": -1}, realmap.InvalidSize),
        ((square, square), {}, ValueError),
        ((5,), {}, TypeError),
        ((lambda: 0,), {}, TypeError),
        ((named("x" * 100_000),), {}, KernelError),
    ],
)
def test_bad_arguments(me: Process, arguments: Any, options: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        me.serve(*arguments, **options)
    with me.serve(square):
        assert me.call("square", 3)[0] == 9


def test_a_queue_of_none(me: Process, pool: ThreadPoolExecutor, gate: Gate) -> None:
    with me.serve(gated(gate, True), queue=0):
        calls = passing(me, pool, 1)
        wait_until(lambda: gate.at_work == 1)
        with pytest.raises(LimitReached, match="queue"):
            me.call("gate")
        gate.open()
        assert calls[0].result(BOUND) == "through"


def test_every_call_that_waits_is_told_that_there_is_no_thread(
    me: Process, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def submit(job: object) -> None:
        raise RuntimeError("can't start new thread")

    async def program() -> None:
        first = asyncio.create_task(me.acall("gate"))
        await asyncio.to_thread(wait_until, lambda: service.calls == 1)
        calls = [asyncio.create_task(me.acall("gate", timeout=BOUND)) for _ in range(600)]
        await asyncio.to_thread(wait_until, lambda: service.calls == 601)
        monkeypatch.setattr(service._server._workers, "submit", submit)
        gate.open()
        came = await asyncio.gather(first, *calls, return_exceptions=True)
        assert came[0] == "through"
        assert {type(each) for each in came[1:]} == {PhysicalMemoryExhaustion}

    service = me.serve(gated(gate, True), queue=600)
    asyncio.run(program())
    service.close(BOUND)


def test_a_service_has_more_to_tell_than_a_message_holds(kernel: KernelHandle, me: Process, gate: Gate) -> None:
    names = [f"{number:03}" * 66 for number in range(280)]
    handlers = [realmap.syscall(name=name, blocking=True)(lambda call: gate.handler(call)) for name in names]

    async def ask() -> list[str]:
        with me.session(names[0]) as session:
            return await asyncio.gather(*(session.acall(name) for name in names[:100]))

    def told() -> list[tuple[int, bool]]:
        return [(seat.busy, seat.waiting > 9) for seat in control.snapshot().seats]

    with me.serve(*handlers, queue=100), ThreadPoolExecutor(1) as pool, Control(kernel.path) as control:
        asked = pool.submit(asyncio.run, ask())
        wait_until(lambda: told() == [(1, True)])
        gate.open()
        assert asked.result(BOUND) == ["through"] * 100


def test_descriptors_run_out_while_a_service_is_made(me: Process) -> None:
    limits, open_now = resource.getrlimit(resource.RLIMIT_NOFILE), len(os.listdir("/proc/self/fd"))
    held: list[int] = []
    outcomes: list[bool] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 50, limits[1]))
    try:
        with suppress(OSError):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        for left in range(12):
            before = len(held)
            try:
                me.serve(square).close()
                outcomes.append(True)
            except realmap.PhysicalMemoryExhaustion:
                outcomes.append(False)
            with suppress(OSError):
                while True:  # as many are free as before
                    held.append(os.open("/dev/null", os.O_RDONLY))
            assert len(held) == before + left
            for _ in range(left + 1):
                os.close(held.pop())
    finally:
        while held:
            os.close(held.pop())
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not outcomes[0] and outcomes[-1]


# ---- lent windows -----------------------------------------------------------------------------------


def test_kept_windows_are_used_again(me: Process) -> None:
    seen: list[int] = []

    def look(call: Call, data: UserBuffer) -> int:
        with data.mirror(realmap.k_r) as mirror:
            seen.append(mirror.address)
            return mirror[0]

    buffer = me.map(64 * PAGE)
    buffer[0] = 7
    with me.serve(look, lazy_unmap=1 << 20):
        assert [me.call("look", buffer) for _ in range(3)] == [7] * 3
        assert len(set(seen)) == 1 and seen[0] in range(LENT_LAND.start, LENT_LAND.end)
    buffer.unmap()


@pytest.mark.parametrize("kind", ["short", "blocking", "task"])
def test_what_a_handler_wrote_is_there_with_the_answer_though_its_mirror_lives(me: Process, kind: str) -> None:
    kept: list[CrossProcessMapping] = []

    def write(call: Call, data: UserBuffer) -> None:
        kept.append(data.mirror())
        kept[-1][0:2] = kept[-1][-2:] = b"hi"

    async def write_later(call: Call, data: UserBuffer) -> None:
        await asyncio.sleep(0)
        write(call, data)

    handler = write_later if kind == "task" else write
    buffer = me.map(3 * PAGE)
    with me.serve(realmap.syscall(name="write", blocking=kind == "blocking")(handler)):
        me.call("write", buffer.slice(100, 2 * PAGE))
        assert (buffer[100:102], buffer[2 * PAGE + 98 : 2 * PAGE + 100]) == (b"hi", b"hi")
        kept.pop().drop()
    buffer.unmap()


def test_what_is_unmapped_is_not_lent_any_more(me: Process) -> None:
    def first(call: Call, data: UserBuffer) -> bytes:
        return data.copy_in(4)

    with me.serve(first):
        for number in range(20):  # the same address again and again
            with me.map(PAGE) as buffer:
                buffer[:4] = number.to_bytes(4, "little")
                assert me.call("first", buffer) == number.to_bytes(4, "little")
        with pytest.raises(realmap.InvalidAddress):
            me.call("first", buffer)
