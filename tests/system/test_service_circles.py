"""Services that call each other at the same moment: where none could go on, one call is refused, and the others do."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import pytest
from conftest import BOUND, wait_until

import realmap
from realmap import Call, KernelDied, KernelHandle, LimitReached, Process, ProcessKilled, ServerDied, SpawnedProcess


def around(me: Process, name: str, asks: str) -> Callable[..., Any]:
    """A handler that asks the next one, once as many are at work as there are to meet; without `goes_on` it answers."""

    def ask(call: Call, goes_on: bool) -> list[str]:
        if not goes_on:
            return [name]
        me.call("meet")
        return [name, *me.call(asks, False)]

    return realmap.syscall(name=name)(ask)


def around_later(me: Process, name: str, asks: str) -> Callable[..., Any]:
    """`around`, without a thread."""

    async def ask(call: Call, goes_on: bool) -> list[str]:
        if not goes_on:
            return [name]
        await me.acall("meet")
        return [name, *await me.acall(asks, False)]

    return realmap.syscall(name=name)(ask)


def serve_around(me: Process, name: str, asks: str) -> None:
    with suppress(KernelDied, ProcessKilled), me.serve(around(me, name, asks)) as service:
        service.wait()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(40) as made:
        yield made


@pytest.fixture
def meeting(kernel: KernelHandle) -> Iterator[Callable[[int], list[int]]]:
    """Lets calls of "meet" go on once there are so many; and how many have come."""
    with ExitStack() as stack:

        def start(count: int) -> list[int]:
            came: list[int] = []
            barrier: list[asyncio.Barrier] = []

            @realmap.syscall
            async def meet(call: Call) -> None:
                came.append(call.process.pid)
                barrier[:] = barrier or [asyncio.Barrier(count)]
                await barrier[0].wait()

            stack.enter_context(stack.enter_context(kernel.connect()).serve(meet))
            return came

        yield start


def outcomes(calls: list[Future[Any]]) -> list[Any]:
    """What each came to: the error where it is one."""
    wait(calls, BOUND)
    return [each.exception(0) or each.result(0) for each in calls]


def refused(came: list[Any]) -> list[LimitReached]:
    return [each for each in came if isinstance(each, LimitReached)]


def ring(count: int) -> list[tuple[str, str]]:
    """Names, each with the next one."""
    return [(f"ring {at}", f"ring {(at + 1) % count}") for at in range(count)]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_one_call_of_a_circle_is_refused(me: Process, pool: ThreadPoolExecutor, meeting: Any, count: int) -> None:
    meeting(count)
    with ExitStack() as stack:
        for name, asks in ring(count):
            stack.enter_context(me.serve(around(me, name, asks)))
        calls = [pool.submit(me.call, name, True, timeout=BOUND) for name, _ in ring(count)]
        came = outcomes(calls)
        (error,) = refused(came)
        assert [each for each in came if each is not error] == [
            [name, asks] for (name, asks), each in zip(ring(count), came, strict=True) if each is not error
        ]
        assert (error.what, error.limit) == ("threads", 1)
        assert all(repr(name) in str(error) for name, _ in ring(count))
        assert [me.call(name, False, timeout=BOUND) for name, _ in ring(count)] == [[name] for name, _ in ring(count)]


@pytest.fixture
def apart(kernel: KernelHandle) -> Iterator[list[SpawnedProcess]]:
    """Three services in a circle, each in a process of its own."""
    made = [kernel.spawn(serve_around, name, asks) for name, asks in ring(3)]
    yield made
    for each in made:
        each.kill()
        each.join()
    made.clear()


def test_a_circle_of_three_processes(me: Process, pool: ThreadPoolExecutor, meeting: Any, apart: Any) -> None:
    meeting(3)
    for name, _ in ring(3):
        me.session(name, timeout=BOUND).close()
    came = outcomes([pool.submit(me.call, name, True, timeout=BOUND) for name, _ in ring(3)])
    (error,) = refused(came)
    assert sorted(map(str, (each for each in came if each is not error))) == sorted(
        str(list(each)) for each, one in zip(ring(3), came, strict=True) if one is not error
    )


def test_a_server_that_is_killed_in_a_circle(me: Process, pool: ThreadPoolExecutor, meeting: Any, apart: Any) -> None:
    """Whether it was found before or not: everybody is told, or goes on."""
    met = meeting(3)
    for name, _ in ring(3):
        me.session(name, timeout=BOUND).close()
    calls = [pool.submit(me.call, name, True, timeout=BOUND) for name, _ in ring(3)]
    wait_until(lambda: len(met) == 3)
    apart[0].kill()
    came = outcomes(calls)
    assert isinstance(came[0], ServerDied)
    for (name, asks), each in zip(ring(3)[1:], came[1:], strict=True):
        assert each == [name, asks] or isinstance(each, ServerDied | LimitReached | realmap.UnknownSyscall)
    assert [me.call(name, False, timeout=BOUND) for name, _ in ring(3)[1:]] == [[name] for name, _ in ring(3)[1:]]


def test_with_more_threads_than_calls_none_is_refused(me: Process, pool: ThreadPoolExecutor, meeting: Any) -> None:
    meeting(3)
    with ExitStack() as stack:
        for name, asks in ring(3):
            stack.enter_context(me.serve(around(me, name, asks), threads=2))
        calls = [pool.submit(me.call, name, True, timeout=BOUND) for name, _ in ring(3)]
        assert outcomes(calls) == [list(each) for each in ring(3)]


def test_all_threads_of_all_wait_and_one_call_is_refused(me: Process, pool: ThreadPoolExecutor, meeting: Any) -> None:
    meeting(4)
    with ExitStack() as stack:
        for name, asks in ring(2):
            stack.enter_context(me.serve(around(me, name, asks), threads=2))
        came = outcomes([pool.submit(me.call, name, True, timeout=BOUND) for name, _ in ring(2) * 2])
        assert len(refused(came)) == 1
        assert sum(each in map(list, ring(2)) for each in came) == 3


def test_async_handlers_wait_for_no_thread(me: Process, pool: ThreadPoolExecutor, meeting: Any) -> None:
    meeting(3)
    with ExitStack() as stack:
        for name, asks in ring(3):
            stack.enter_context(me.serve(around_later(me, name, asks)))
        calls = [pool.submit(me.call, name, True, timeout=BOUND) for name, _ in ring(3)]
        assert outcomes(calls) == [list(each) for each in ring(3)]


def test_a_circle_through_an_async_handler(me: Process, pool: ThreadPoolExecutor, meeting: Any) -> None:
    """A thread that waits for a task, which waits for a thread."""
    meeting(2)

    async def through(call: Call) -> Any:
        return await me.acall("ring 1", False)

    def first(call: Call) -> Any:
        me.call("meet")
        return me.call("through")

    with me.serve(realmap.syscall(name="ring 0")(lambda call, goes_on: first(call) if goes_on else ["ring 0"])):
        with me.serve(through), me.serve(around(me, "ring 1", "ring 0")):
            came = outcomes([pool.submit(me.call, name, True, timeout=BOUND) for name, _ in ring(2)])
            assert len(refused(came)) == 1 and len([each for each in came if isinstance(each, list)]) == 1


def test_who_waits_for_a_circle_of_others_goes_on(me: Process, pool: ThreadPoolExecutor, meeting: Any) -> None:
    meeting(3)
    with ExitStack() as stack:
        for name, asks in (*ring(2), ("outside", "ring 0")):
            stack.enter_context(me.serve(around(me, name, asks)))
        calls = [pool.submit(me.call, name, True, timeout=BOUND) for name in ("ring 0", "ring 1", "outside")]
        came = outcomes(calls)
        assert came[2] == ["outside", "ring 0"] and len(refused(came)) == 1


def test_a_call_that_is_given_up_breaks_its_circle(me: Process, pool: ThreadPoolExecutor) -> None:
    both, given_up = threading.Barrier(2), threading.Event()

    def hasty(call: Call) -> str:
        both.wait(BOUND)
        with pytest.raises(realmap.SyscallTimeout):
            me.call("patient", False, timeout=0.01)
        given_up.wait(1)  # and goes on: longer than a circle takes to be found
        return "hasty"

    def patient(call: Call, goes_on: bool) -> str:
        if goes_on:
            both.wait(BOUND)
            return "patient " + str(me.call("hasty 0"))
        return "patient"

    with me.serve(hasty, realmap.syscall(name="hasty 0")(lambda call: "0")), me.serve(patient):
        calls = [pool.submit(me.call, "hasty", timeout=BOUND), pool.submit(me.call, "patient", True, timeout=BOUND)]
        assert outcomes(calls) == ["hasty", "patient 0"]


@pytest.mark.parametrize("way", ["task", "thread"])
def test_what_a_handler_does_not_wait_for_is_in_no_circle(me: Process, pool: ThreadPoolExecutor, way: str) -> None:
    both, left = threading.Barrier(2), []

    def first(call: Call) -> str:
        both.wait(BOUND)
        return "first " + str(me.call("starter"))

    async def starter(call: Call) -> str:
        start = me.acall if way == "task" else partial(asyncio.to_thread, me.call)
        left.append(asyncio.ensure_future(start("third", False)))  # type: ignore[operator]
        await asyncio.sleep(1.5)  # longer than a circle takes to be found
        return "starter"

    def third(call: Call, goes_on: bool) -> str:
        if goes_on:
            both.wait(BOUND)
            return "third " + str(me.call("first 0"))
        return "third"

    answers = first, realmap.syscall(name="first 0")(lambda call: "0")
    with me.serve(*answers), me.serve(starter), me.serve(third):
        calls = [pool.submit(me.call, *each, timeout=BOUND) for each in (("first",), ("third", True))]
        assert outcomes(calls) == ["first starter", "third 0"]
        wait_until(lambda: left[0].done())
        assert left[0].result() == "third"


def test_services_of_two_kernels_are_not_taken_for_each_other() -> None:
    """Though both count theirs from 1."""
    with realmap.boot() as first, realmap.boot() as second, first.connect() as one, second.connect() as other:

        def outer(call: Call) -> list[Any]:
            said = other.call("inner", timeout=BOUND)
            inner.close()  # waits for its end: it is not the one that is at work here
            return [said, inner.has_ended]

        inner = other.serve(realmap.syscall(name="inner")(lambda call: "inner"))
        with one.serve(outer) as service:
            assert inner._seat == service._seat
            assert one.call("outer", timeout=BOUND) == ["inner", True]


@pytest.mark.parametrize("seed", range(4))
def test_random_calls_end_whatever_they_wait_for(me: Process, pool: ThreadPoolExecutor, seed: int) -> None:
    """Plans of calls within calls: each ends, and is refused only where services have fewer threads than callers."""
    dice = random.Random(seed)
    names = [f"random {at}" for at in range(4)]

    def plan(depth: int) -> list[Any]:
        return [[dice.choice(names), plan(depth - 1)] for _ in range(dice.randint(0, 2) if depth else 0)]

    def size(plan: list[Any]) -> int:
        return 1 + sum(size(each) for _, each in plan)

    def run(call: Call, plan: list[Any]) -> int:
        return 1 + sum(me.call(name, each) for name, each in plan)

    plans = [[dice.choice(names), plan(3)] for _ in range(20)]
    for threads in (len(plans) * 3, 1):
        with ExitStack() as stack:
            for name in names:
                handler = realmap.syscall(name=name)(lambda call, plan: run(call, plan))
                stack.enter_context(me.serve(handler, threads=threads, queue=1000))
            came = outcomes([pool.submit(me.call, name, each, timeout=BOUND) for name, each in plans])
            for (_, each), one in zip(plans, came, strict=True):
                assert one == size(each) or (threads == 1 and isinstance(one, LimitReached))
            assert threads == 1 or not refused(came)
            assert [me.call(name, [], timeout=BOUND) for name in names] == [1] * 4
