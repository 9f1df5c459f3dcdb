"""A signal handler at every point of every operation: it raises, or does one of those operations itself.

What must hold after each: the operation was done or ended by the handler's own exception; other threads and tasks got
their answers; descriptors and books are what they were.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import points
import pytest
from conftest import BOUND, PAGE, SCALE, wait_until

import realmap
from realmap import KernelHandle, Process

CARRIERS = ("ring", "socket")


class Stop(BaseException):
    """As Ctrl-C, but nobody else's."""


RAISED = [TimeoutError, OSError, ValueError, KeyboardInterrupt, Stop]


@dataclass
class Stage:
    """What an operation works with."""

    kernel: KernelHandle
    me: Process
    buffer: realmap.Buffer
    handle: realmap.Handle
    #: What it has made.
    out: list[Any] = field(default_factory=list)
    #: How many others have a request on its way at any time.
    company: int = 0


@dataclass
class Operation:
    """`prepare` makes what `act` needs; `right` says whether what it put into `out` is."""

    act: Callable[[Stage, Any], object]
    right: Callable[[Stage], object]
    prepare: Callable[[Stage], Any] = lambda stage: None


def _acall(stage: Stage, _: Any) -> None:
    stage.out.append(asyncio.run(stage.me.acall("echo", 7)))


OPERATIONS = {
    "call": Operation(lambda s, _: s.out.append(s.me.call("echo", 1)), lambda s: s.out == [[1]]),
    "call with a timeout": Operation(
        lambda s, _: s.out.append(s.me.call("echo", 2, timeout=BOUND)), lambda s: s.out == [[2]]
    ),
    "long call": Operation(
        lambda s, _: s.out.append(s.me.call("echo", "x" * 100_000)), lambda s: s.out == [["x" * 100_000]]
    ),
    "slow call": Operation(lambda s, _: s.out.append(s.me.call("sleep", 0.0002)), lambda s: s.out == [0.0002]),
    "acall": Operation(_acall, lambda s: s.out == [[7]]),
    "map": Operation(lambda s, _: s.out.append(s.me.map(PAGE)), lambda s: len(s.out[0]) == PAGE),
    "map fragments": Operation(
        lambda s, _: s.out.append(s.me.map(3 * PAGE, fragment=PAGE)), lambda s: s.out[0][2 * PAGE] == 0
    ),
    "unmap": Operation(lambda s, buffer: buffer.unmap(), lambda s: True, lambda s: s.me.map(PAGE)),
    "share": Operation(lambda s, _: s.out.append(s.me.share(s.buffer)), lambda s: s.me.revoke(s.out.pop()) is None),
    "attach": Operation(lambda s, _: s.out.append(s.me.attach(s.handle)), lambda s: s.out[0][:3] == b"abc"),
    "query": Operation(
        lambda s, _: s.out.append(s.me.query(s.buffer.address)), lambda s: s.out[0].address == s.buffer.address
    ),
    "close": Operation(lambda s, other: other.close(), lambda s: True, lambda s: s.kernel.connect()),
}
#: Nobody runs a loop in a handler; one that closes what is in use has a test of its own.
NESTED = [name for name in OPERATIONS if name not in ("acall", "close")]
#: Asyncio's own code is not made for handlers that raise in it: it may lose a callback, and the task with it.
WITHIN = {"acall": "/realmap/wire/client/waiter.py"}


#: Where the handler's frame is while it waits in the core, by how: alone, or while another thread reads.
ASLEEP = {
    "reads": lambda me: points.FUTEX if me._client.endpoint.has_ring else points.PPOLL,
    "stands by": lambda me: points.FUTEX,
}


@pytest.fixture
def stage(kernel: KernelHandle, me: Process) -> Iterator[Stage]:
    buffer = me.map(PAGE)
    buffer[:3] = b"abc"
    handle = me.share(buffer)
    before = signal.getsignal(points.SIGNAL)
    yield Stage(kernel, me, buffer, handle)
    signal.signal(points.SIGNAL, before)
    me.revoke(handle)


def books(stage: Stage) -> tuple[int, ...]:
    """What must be as it was."""
    stats = stage.kernel.stats()
    return (*(stats[name] for name in ("mappings", "handles", "segments", "mirrors", "processes")),)


def descriptors() -> list[str]:
    """Of this process, by what they are."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the one that lists
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return sorted(each for each in found if not each.startswith("/proc/"))


class Trial:
    """One kind of handler in one operation, at one point after the other."""

    def __init__(
        self, stage: Stage, name: str, handler: Callable[[], object], raises: type[BaseException] | None
    ) -> None:
        self.stage = stage
        self.operation = OPERATIONS[name]
        self.within = WITHIN.get(name, "/realmap/")
        self.raises = raises
        self.handled = 0

        def on_signal(_: int, frame: FrameType | None) -> None:
            self.handled += 1
            if name not in WITHIN or (frame is not None and "/realmap/" in frame.f_code.co_filename):
                handler()

        signal.signal(points.SIGNAL, on_signal)
        stage.kernel.stats()
        gc.collect()
        self.books, self.descriptors = books(stage), descriptors()

    def run(self, point: Any) -> bool:
        """At this point; whether it was there."""
        stage, before = self.stage, self.handled
        prepared = self.operation.prepare(stage)
        ended_by = None
        try:
            with point as reached:
                try:
                    self.operation.act(stage, prepared)
                except BaseException as error:
                    ended_by = type(error)
        except BaseException as error:  # at its very end
            ended_by = type(error)
        if ended_by is None:
            assert self.operation.right(stage)
        else:
            assert ended_by is self.raises and self.handled > before
        while stage.out:
            if isinstance(stage.out[0], realmap.Handle):  # made, and then the handler came
                stage.me.revoke(stage.out[0])
            del stage.out[0]
        if hasattr(prepared, "close"):
            prepared.close()
        del prepared
        self.settle()
        return bool(reached.reached)

    def settle(self) -> None:
        """What was given up has been answered, and the books are as before."""

        def settled() -> bool:
            self.stage.me.call("nop", timeout=BOUND)
            return self.stage.me._own_client.endpoint.pending <= self.stage.company and books(self.stage) == self.books

        if not settled():
            gc.collect()
            wait_until(settled, "the books as before")

    def all_points(self, every: int, offset: int) -> int:
        """How many points were tried: each of the opcodes, or each so-manieth."""
        tried = 0
        for number in itertools.count(1 + offset, every):
            if not self.run(points.at(number, self.within)):
                break
            tried += 1
        gc.collect()
        wait_until(lambda: descriptors() == self.descriptors, "the descriptors as before")
        assert self.handled >= tried * 9 // 10
        return tried


def raiser(kind: type[BaseException]) -> Callable[[], None]:
    def handler() -> None:
        raise kind

    return handler


def nester(stage: Stage, name: str) -> Callable[[], None]:
    """Does that operation, by itself."""
    operation = OPERATIONS[name]

    def handler() -> None:
        inner = Stage(stage.kernel, stage.me, stage.buffer, stage.handle)
        operation.act(inner, operation.prepare(inner))
        assert operation.right(inner)

    return handler


#: In the default run, each so-manieth point (a prime); which ones differs from one pair to the next.
SPARSE = {"alone": 269, "in company": 461}
HANDLERS = [*(kind.__name__ for kind in RAISED), *NESTED]


def trial(stage: Stage, outer: str, inner: str) -> Trial:
    kinds = {kind.__name__: kind for kind in RAISED}
    if inner in kinds:
        return Trial(stage, outer, raiser(kinds[inner]), kinds[inner])
    return Trial(stage, outer, nester(stage, inner), None)


def try_points(stage: Stage, every: int, part: slice = slice(None)) -> int:
    tried = 0
    for number, (outer, inner) in list(enumerate(itertools.product(OPERATIONS, HANDLERS)))[part]:
        try:
            tried += trial(stage, outer, inner).all_points(every, number * 37 % every)
        except BaseException as error:
            error.add_note(f"in {outer!r}, a handler that does {inner!r}")
            raise
    return tried


@contextmanager
def company(stage: Stage) -> Iterator[None]:
    """Two threads and two tasks call all the while, by the same connection; each got all its answers."""
    ending, counts = threading.Event(), [0] * 4

    def call(index: int) -> None:
        while not ending.is_set():
            assert stage.me.call("echo", index, timeout=BOUND) == [index]
            counts[index] += 1

    async def acall(index: int) -> None:
        while not ending.is_set():
            assert await stage.me.acall("echo", index, timeout=BOUND) == [index]
            counts[index] += 1

    async def both() -> None:
        await asyncio.gather(acall(2), acall(3))

    threads = [threading.Thread(target=call, args=(index,)) for index in (0, 1)]
    threads.append(threading.Thread(target=lambda: asyncio.run(both())))
    for thread in threads:
        thread.start()
    stage.company = len(counts)
    wait_until(lambda: all(counts), "the first answers")
    try:
        yield
    finally:
        before = list(counts)
        wait_until(lambda: all(now > then for now, then in zip(counts, before, strict=True)), "everybody's next answer")
        ending.set()
        for thread in threads:
            thread.join(BOUND)
            assert not thread.is_alive()


@pytest.mark.parametrize("kind", ["alone", "in company"])
def test_a_handler_at_points_all_over(stage: Stage, kind: str) -> None:
    """Each pair alone over one carrier, and in company over the other."""
    half = slice(int(stage.me._own_client.endpoint.has_ring != (kind == "alone")), None, 2)
    with company(stage) if kind == "in company" else nullcontext():
        assert try_points(stage, SPARSE[kind], half) > 40


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["alone", "in company"])
def test_a_handler_at_every_point(stage: Stage, kind: str) -> None:
    every = max(1, round(1 / SCALE / 2))
    with company(stage) if kind == "in company" else nullcontext():
        print(try_points(stage, every), "points tried", kind)


# ---- in the middle of a wait ----------------------------------------------------------------


@pytest.mark.parametrize("how", ASLEEP)
@pytest.mark.parametrize("inner", HANDLERS)
def test_a_handler_while_it_waits(stage: Stage, how: str, inner: str) -> None:
    """The main thread is seen in its system call; the handler runs there, and the wait goes on or ends."""
    me, handled = stage.me, threading.Event()
    other = threading.Thread(target=me.call, args=("wait",))
    if how == "stands by":
        other.start()
        wait_until(lambda: me._own_client.endpoint.pending == 1, "the other's request")
    kinds = {kind.__name__: kind for kind in RAISED}
    handler = raiser(kinds[inner]) if inner in kinds else nester(stage, inner)

    def on_signal(*_: object) -> None:
        try:
            handler()
        finally:
            handled.set()

    def let_go() -> None:
        handled.wait(BOUND)
        me.call("go_by_name", "main", timeout=BOUND)

    signal.signal(points.SIGNAL, on_signal)
    ends = threading.Thread(target=let_go)
    ends.start()
    ended: list[BaseException] = []
    with points.while_asleep(ASLEEP[how](me)) as point:
        try:
            assert me.call("wait_for", "main") == "main"
        except BaseException as error:
            ended.append(error)
    ends.join(BOUND)
    assert point.reached
    assert [type(error) for error in ended] == ([kinds[inner]] if inner in kinds else [])
    ended.clear()
    if how == "stands by":
        me.call("go")
        other.join(BOUND)
        assert not other.is_alive(), "the other thread was forgotten"
    wait_until(lambda: me.call("nop") is None and not me._own_client.endpoint.pending, "all answers")


@pytest.mark.parametrize("outer", [name for name in OPERATIONS if name != "acall"])
def test_a_handler_that_closes_what_is_in_use(kernel: KernelHandle, outer: str) -> None:
    """The operation is done, or says that its Process was closed; nothing of it is left."""
    before = signal.getsignal(points.SIGNAL)
    for number in itertools.count(1, 47):
        with kernel.connect() as me, kernel.connect() as owner:
            shared = owner.map(PAGE)
            stage = Stage(kernel, me, me.map(PAGE), owner.share(shared))
            prepared = OPERATIONS[outer].prepare(stage)
            signal.signal(points.SIGNAL, lambda *_, me=me: me.close())
            try:
                with points.at(number) as point:
                    with suppress(realmap.ProcessKilled, BufferError, realmap.InvalidAddress):
                        OPERATIONS[outer].act(stage, prepared)
            finally:
                signal.signal(points.SIGNAL, before)
            stage.out.clear()
            if hasattr(prepared, "close"):
                prepared.close()
        if not point.reached:
            break
    gc.collect()
    wait_until(lambda: not kernel.stats()["processes"] and not kernel.stats()["mappings"], "the end of all of it")
