"""Async handlers of services: together, bounded, cancelled with who waits for them."""

from __future__ import annotations

import asyncio
import errno
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import BOUND, PAGE, wait_until
from small_services import pool

import realmap
from realmap import Call, KernelError, KernelHandle, LimitReached, Process, UserBuffer
from realmap.host import forks

__all__ = ["pool"]
CARRIERS = ("ring", "socket")


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


@pytest.mark.parametrize("end", [SystemExit, KeyboardInterrupt])
def test_a_task_of_an_async_handler_ends_nobody_else(me: Process, end: type[BaseException]) -> None:
    async def leave(call: Call) -> str:
        async def begun() -> None:
            raise end

        try:
            await asyncio.create_task(begun())
        except end:
            return "left"
        return "stayed"

    with me.serve(leave) as service:
        assert [me.call("leave", timeout=BOUND) for _ in range(2)] == ["left"] * 2
        assert service.calls == 2


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


@pytest.mark.parametrize("how", ["stop", "exit"])
def test_a_handler_that_ends_its_event_loop_ends_nobody_else(me: Process, pool: ThreadPoolExecutor, how: str) -> None:
    go: list[asyncio.Event] = []

    async def linger(call: Call) -> str:
        go.append(asyncio.Event())
        await go[0].wait()
        return "through"

    async def end(call: Call) -> str:
        loop = asyncio.get_running_loop()
        loop.call_soon(loop.stop if how == "stop" else sys.exit)
        loop.call_soon(go[0].set)
        return "said"

    service = me.serve(linger, end)
    waits = pool.submit(me.call, "linger", timeout=BOUND)
    wait_until(lambda: bool(go))
    assert me.call("end", timeout=BOUND) == "said"
    assert waits.result(BOUND) == "through"
    service.close(BOUND)
