"""`acall` and `aconnect`: the same calls, awaited. Each over ring and socket."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import socket
import threading
import time
from collections.abc import Coroutine
from typing import Any

import pytest
import syscalls
from conftest import BOUND, PAGE, wait_until
from forked import in_a_child

import realmap
from realmap import KernelHandle, Process, SyscallFailed, SyscallTimeout, UnknownSyscall

CARRIERS = ("ring", "socket")


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, BOUND))


def pending(me: Process) -> int:
    """Requests whose answers have not come."""
    return me._own_client.endpoint.pending


def test_calls(me: Process) -> None:
    async def work() -> None:
        buffer = me.map(3 * PAGE)
        buffer[:5] = b"hello"
        assert await me.acall("sha256", buffer.slice(0, 5)) == hashlib.sha256(b"hello").hexdigest()
        assert await me.acall("echo", 1, "a", b"x" * 5000, None) == [1, "a", b"x" * 5000, None]
        assert await me.acall("echo", "x" * 1_000_000) == ["x" * 1_000_000]
        assert await me.acall("nop", timeout=BOUND) is None
        assert pending(me) == 0

    threads = set(threading.enumerate())
    run(work())
    assert set(threading.enumerate()) <= threads


def test_many_at_a_time(me: Process) -> None:
    async def work() -> None:
        texts = [os.urandom(number % 3000) for number in range(400)]
        answers = await asyncio.gather(*(me.acall("echo", text) for text in texts))
        assert answers == [[text] for text in texts]
        long = [os.urandom(200_000 + number) for number in range(20)]
        assert await asyncio.gather(*(me.acall("echo", text) for text in long)) == [[text] for text in long]
        assert pending(me) == 0

    run(work())


def test_the_loop_goes_on_meanwhile(me: Process) -> None:
    async def work() -> None:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.001)

        ticking = asyncio.create_task(tick())
        call = asyncio.create_task(me.acall("wait_for", "the loop", timeout=BOUND))
        while ticks < 10:
            await asyncio.sleep(0.001)
        assert not call.done()
        await me.acall("go_by_name", "the loop")
        await call
        ticking.cancel()

    run(work())


def test_errors(me: Process) -> None:
    async def work() -> None:
        with pytest.raises(UnknownSyscall):
            await me.acall("nothing")
        with pytest.raises(SyscallFailed, match="ValueError"):
            await me.acall("explode", "ValueError", "text")
        with pytest.raises(TypeError, match="str"):
            await me.acall(5)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="64 bits"):
            await me.acall("echo", 1 << 64)
        with pytest.raises(TypeError, match="cannot travel as an argument"):
            await me.acall("echo", object())
        with pytest.raises(ValueError, match="timeout"):
            await me.acall("nop", timeout=-1)
        with pytest.raises(realmap.InvalidSize):
            await me.acall("echo", bytes(1 << 20))
        buffer = me.map(PAGE)
        buffer.unmap()
        with pytest.raises(realmap.InvalidAddress):
            await me.acall("sha256", buffer)
        assert await me.acall("echo", 1) == [1]
        assert pending(me) == 0

    run(work())


def test_a_timeout(kernel: KernelHandle, me: Process) -> None:
    async def work() -> None:
        buffer = me.map(PAGE)
        with pytest.raises(SyscallTimeout, match=r"within 0\.5 s"):  # by then its handler has begun
            await me.acall("wait_for", "nobody", buffer, timeout=0.5)
        assert pending(me) == 1
        assert await me.acall("echo", 2) == [2]
        await me.acall("go_by_name", "nobody")
        while pending(me):  # its answer comes, and is thrown away
            await me.acall("sleep", 0.01)
        assert await me.acall("echo", 3, timeout=BOUND) == [3]

    run(work())


def test_cancelled_tasks_leave_both_sides_clean(kernel: KernelHandle, me: Process) -> None:
    async def work() -> None:
        buffer = me.map(5 * PAGE, fragment=PAGE)
        tasks = [asyncio.create_task(me.acall("wait_for", "cancelled", buffer)) for _ in range(5)]
        tasks += [asyncio.create_task(me.acall("echo", bytes(300_000))) for _ in range(5)]
        await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError | list) for result in results)
        assert await me.acall("echo", 4) == [4]
        buffer.unmap()
        for _ in range(5):
            await me.acall("go_by_name", "cancelled")
        while pending(me):
            await me.acall("sleep", 0.01)

    run(work())
    assert me.call("echo", 5) == [5]
    wait_until(lambda: kernel.stats()["running"] == 0)
    assert kernel.stats()["segments"] == 0


def test_beside_threads_that_call(me: Process) -> None:
    """Whoever reads reads for all."""
    stop = threading.Event()
    counts = [0, 0, 0]

    def call(index: int) -> None:
        while not stop.is_set():
            text = os.urandom(100)
            assert me.call("echo", text) == [text]
            counts[index] += 1

    async def work() -> None:
        for _ in range(60):
            texts = [os.urandom(50) for _ in range(10)]
            assert await asyncio.gather(*(me.acall("echo", text) for text in texts)) == [[text] for text in texts]
        for number in range(100):
            assert await me.acall("echo", number) == [number]

    threads = [threading.Thread(target=call, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    try:
        run(work())
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert all(counts)
    assert pending(me) == 0


def test_two_loops_in_two_threads(me: Process) -> None:
    found: list[int] = []

    async def work() -> None:
        for number in range(150):
            assert await asyncio.gather(*(me.acall("echo", number) for _ in range(3))) == [[number]] * 3
        found.append(1)

    threads = [threading.Thread(target=lambda: run(work())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1, 1]


def test_loops_that_share_wake_each_other(me: Process) -> None:
    """Whoever has read his own answer sees to it that the other's is read."""
    rounds = 400

    async def work() -> None:
        for number in range(rounds):
            assert await me.acall("echo", number, timeout=BOUND) == [number]

    threads = [threading.Thread(target=lambda: run(asyncio.wait_for(work(), BOUND))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pending(me) == 0


def test_a_thread_that_gave_up_is_not_asked_to_read(me: Process) -> None:
    leading, given_up = threading.Event(), threading.Event()

    def lead() -> None:
        leading.set()
        me.call("sleep", 0.4)

    def give_up() -> None:
        leading.wait()
        with pytest.raises(SyscallTimeout):
            me.call("wait", timeout=0.1)
        given_up.set()

    threads = [threading.Thread(target=lead), threading.Thread(target=give_up)]
    for thread in threads:
        thread.start()
    given_up.wait(BOUND)
    run(me.acall("sleep", 0.6, timeout=BOUND))  # and not only with the answer that nobody waits for
    me.call("go")
    for thread in threads:
        thread.join()
    wait_until(lambda: me.call("nop") is None and not pending(me))


def test_closed_while_tasks_wait(kernel: KernelHandle) -> None:
    """What the loop watches is its own: the descriptor's number may be another's at once."""

    async def work() -> None:
        mine = kernel.connect()
        task = asyncio.create_task(mine.acall("wait_for", "closed"))
        while pending(mine) != 1:
            await asyncio.sleep(0.001)
        mine.close()
        left, right = socket.socketpair()
        seen = asyncio.Event()
        asyncio.get_running_loop().add_reader(left, seen.set)
        with pytest.raises(realmap.ProcessKilled):
            await task
        right.send(b"!")
        await asyncio.wait_for(seen.wait(), BOUND)
        asyncio.get_running_loop().remove_reader(left)
        left.close()
        right.close()

    run(work())
    with kernel.connect() as other:
        other.call("go_by_name", "closed")
    wait_until(lambda: kernel.stats()["processes"] == 0)


def test_a_closed_loop(me: Process) -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    call = me.acall("nop")
    with pytest.raises(RuntimeError, match="closed"):
        loop.run_until_complete(call)
    call.close()
    call = me.acall("nop")
    with pytest.raises(RuntimeError, match="no running event loop"):
        call.send(None)
    # Closed while a call was on its way: whoever comes next throws its answer away.
    loop = asyncio.new_event_loop()
    task = loop.create_task(me.acall("wait_for", "loop"))
    loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()
    assert pending(me) == 1

    async def work() -> None:
        await me.acall("go_by_name", "loop")
        while pending(me):
            await me.acall("sleep", 0.01)

    run(work())
    assert not task.done()
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    coroutine = task.get_coro()
    del task
    assert coroutine is not None
    coroutine.close()


def test_the_kernel_dies(kernel: KernelHandle) -> None:
    async def work(mine: KernelHandle) -> None:
        async with realmap.aconnect(mine.path) as me:
            calls = [asyncio.create_task(me.acall("sleep", 30)) for _ in range(3)]
            await me.acall("nop")
            os.kill(mine.pid, signal.SIGKILL)
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert [type(result) for result in results] == [realmap.KernelDied] * 3
            with pytest.raises(realmap.KernelDied):
                await me.acall("nop")

    with realmap.boot(syscalls=syscalls.ALL) as mine:
        run(work(mine))


def test_connecting(kernel: KernelHandle) -> None:
    async def work() -> None:
        async with realmap.aconnect(kernel.path) as me:
            buffer = me.map(100)
            assert await me.acall("who") == [os.getpid(), "who", kernel.pid, "realmap-kernel"]
        with pytest.raises(realmap.ProcessKilled):
            await me.acall("nop")
        assert not buffer.alive
        with pytest.raises(realmap.KernelDied):
            async with realmap.aconnect("/nowhere/at/all.sock"):
                pass
        task = asyncio.create_task(realmap.aconnect(kernel.path).__aenter__())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(work())
    wait_until(lambda: kernel.stats()["processes"] == 0, "the end of a connection that nobody waited for")


def test_a_forked_child(kernel: KernelHandle, me: Process) -> None:
    """It has a connection, and a flow, of its own."""
    buffer = me.map(PAGE)
    buffer[:2] = b"ab"

    async def work() -> None:
        await me.acall("nop")

    run(work())

    def in_the_child() -> None:
        assert run(me.acall("sha256", buffer.slice(0, 2))) == hashlib.sha256(b"ab").hexdigest()

    in_a_child(in_the_child)
    run(work())


def test_an_idle_loop_costs_nothing(me: Process) -> None:
    """While it waits for a long call, the loop sleeps."""

    async def work() -> None:
        task = asyncio.create_task(me.acall("sleep", 0.5))
        await asyncio.sleep(0.05)
        before = time.process_time()
        await task
        assert time.process_time() - before < 0.1

    run(work())
