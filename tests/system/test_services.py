"""A service: who runs its calls, how many at a time, in which order; and how it ends."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from conftest import BOUND, PAGE, wait_until

import realmap
from realmap import Call, KernelDied, KernelError, KernelHandle, LimitReached, Process, ServerDied, UserBuffer
from realmap.host import forks, procfs
from realmap.memory import LENT_LAND, CrossProcessMapping
from realmap.observe.control import Control

CARRIERS = ("ring", "socket")


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as made:
        yield made


class Gate:
    """A handler that is at work until it is let go; how many are, and were at a time."""

    def __init__(self) -> None:
        self.at_work = self.most = 0
        self._lock = threading.Lock()
        self._open = threading.Event()

    def open(self) -> None:
        self._open.set()

    def handler(self, call: Call) -> str:
        with self._lock:
            self.at_work += 1
            self.most = max(self.most, self.at_work)
        assert self._open.wait(BOUND)
        with self._lock:
            self.at_work -= 1
        return "through"


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.open()


def passing(me: Process, pool: ThreadPoolExecutor, count: int) -> list[Future[Any]]:
    return [pool.submit(me.call, "gate", timeout=BOUND) for _ in range(count)]


def gated(gate: Gate, blocking: bool) -> Callable[..., str]:
    return realmap.syscall(name="gate", blocking=blocking)(lambda call: gate.handler(call))


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


def square(call: Call, number: int) -> list[int]:
    return [number * number, os.getpid()]


def named(name: str) -> Callable[..., list[int]]:
    """`square` by another name: a function of its own, for a mark stays on what it is put on."""
    return realmap.syscall(name=name)(lambda call, number: square(call, number))


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


# ---- async handlers ---------------------------------------------------------------------------------


def test_async_handlers_run_at_the_same_time(me: Process, pool: ThreadPoolExecutor) -> None:
    met: list[asyncio.Barrier] = []

    async def meet(call: Call, data: UserBuffer) -> bytes:
        if not met:
            met.append(asyncio.Barrier(5))
        async with met[0]:
            return data.copy_in(3)

    buffer = me.map(PAGE)
    buffer[:3] = b"abc"
    with me.serve(meet):
        found = [pool.submit(me.call, "meet", buffer) for _ in range(5)]
        assert [each.result(BOUND) for each in found] == [b"abc"] * 5
    del found
    buffer.unmap()


def test_async_handlers_are_bounded(me: Process, pool: ThreadPoolExecutor) -> None:
    seen: list[int] = []
    go = threading.Event()

    async def hang(call: Call) -> None:
        seen.append(call.process.pid)
        while not go.is_set():
            await asyncio.sleep(0.001)

    with me.serve(hang, queue=2):
        calls = [pool.submit(me.call, "hang") for _ in range(3)]
        wait_until(lambda: len(seen) == 3)
        with pytest.raises(LimitReached, match="queue"):
            me.call("hang")
        go.set()
        for each in calls:
            each.result(BOUND)


def test_an_async_handler_that_raises(me: Process) -> None:
    async def fail(call: Call, number: int) -> None:
        await asyncio.sleep(0)
        raise KeyError(number)

    with me.serve(fail):
        with pytest.raises(realmap.SyscallFailed, match="KeyError") as caught:
            me.call("fail", 5)
        assert "raise KeyError(number)" in caught.value.traceback
        with pytest.raises(realmap.WrongArguments):
            me.call("fail", "five")


def test_async_handlers_are_not_the_kernels(me: Process) -> None:
    @realmap.syscall
    async def later(call: Call) -> None: ...

    with pytest.raises(TypeError, match="async"):
        realmap.Kernel(syscalls=[later])
    with pytest.raises(TypeError, match="async"):
        realmap.syscall(blocking=True)(later)


def test_a_task_is_cancelled_with_its_caller(kernel: KernelHandle, me: Process) -> None:
    seen: list[str] = []

    async def nap(call: Call) -> None:
        seen.append("began")
        try:
            await asyncio.sleep(BOUND)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    def ask(user: Process) -> None:
        user.call("nap")

    with me.serve(nap):
        asker = kernel.spawn(ask)
        wait_until(lambda: seen == ["began"])
        asker.kill()
        wait_until(lambda: seen == ["began", "cancelled"])
        asker.join(BOUND)


def test_a_call_that_is_cancelled_before_its_task_begins_keeps_no_thread(kernel: KernelHandle, me: Process) -> None:
    callers: list[Any] = []
    at_work, let_go = threading.Event(), threading.Event()

    def note(call: Call) -> None:
        callers.append(call.process)

    async def hold_loop(call: Call) -> None:
        at_work.set()
        let_go.wait(BOUND)  # and with it the event loop

    async def nap(call: Call) -> None:
        await asyncio.sleep(BOUND)

    service = me.serve(note, hold_loop, nap, threads=3)
    with kernel.connect() as other, ThreadPoolExecutor(2) as pool:
        held = pool.submit(me.call, "hold_loop")
        assert at_work.wait(BOUND)
        other.call("note")
        napping = pool.submit(other.call, "nap")
        wait_until(lambda: service.calls == 3)
        other.close()
        wait_until(lambda: not callers[0].alive)
        me.call("note")  # it has heard all of that
        let_go.set()
        assert held.result(BOUND) is None
        assert isinstance(napping.exception(BOUND), KernelError)
    service.close(BOUND)


def test_no_event_loop_can_be_had(me: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    async def later(call: Call) -> str:
        return "there"

    def none() -> Any:
        raise OSError(errno.EMFILE, "none left")

    with me.serve(later):
        with monkeypatch.context() as patched:
            patched.setattr(asyncio, "new_event_loop", none)
            with pytest.raises(KernelError, match="no event loop for it: no descriptors"):
                me.call("later")
        assert me.call("later") == "there"


def test_what_an_async_handler_leaves_behind_may_call_it(me: Process) -> None:
    left: list[asyncio.Task[Any]] = []

    async def again(call: Call, number: int) -> str:
        async def later() -> Any:
            await ended.wait()
            return await me.acall("again", number - 1)

        if number:
            ended = asyncio.Event()
            left.append(asyncio.create_task(later()))
            asyncio.get_running_loop().call_later(0.01, lambda: asyncio.create_task(wait_until_free(ended)))
        return "done"

    async def wait_until_free(ended: asyncio.Event) -> None:
        while service._server._beside:
            await asyncio.sleep(0)
        ended.set()

    with me.serve(again) as service:
        me.call("again", 1)
        wait_until(left[0].done)
        assert left[0].result() == "done"


def test_an_async_handler_that_forks_leaves_no_child(me: Process) -> None:
    async def split(call: Call) -> int:
        return forks.fork()

    with me.serve(split):
        child = me.call("split")
        wait_until(lambda: os.waitpid(child, os.WNOHANG)[0] == child, "the child's end")


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


# ---- its end ----------------------------------------------------------------------------------------


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
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            service.wait(BOUND)
        assert me.call("square", 4)[0] == 16


def test_a_forked_child_serves_nobody(me: Process) -> None:
    with me.serve(square, lazy_unmap=1 << 20) as service:
        assert me.call("square", 2) == [4, os.getpid()]
        child = forks.fork()
        if not child:
            status = 1
            try:
                service.close()
                held = procfs.maps("self", LENT_LAND.start, LENT_LAND.end)
                status = 0 if service.has_ended and not held else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
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
