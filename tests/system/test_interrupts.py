"""Signals at any moment of a call: a handler that raises, that calls, that calls in vain; other threads meanwhile."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import pytest
from conftest import BOUND, scaled, wait_until

import realmap
from realmap import KernelHandle, Process

CARRIERS = ("ring", "socket")
#: How often a call is interrupted in each test, from 20 µs after its begin on.
TIMES = 300


class Stop(BaseException):
    """As Ctrl-C, but nobody else's."""


Handler = Callable[[int, FrameType | None], None]


@pytest.fixture
def alarm() -> Iterator[Callable[[Handler], None]]:
    before = signal.getsignal(signal.SIGALRM)
    yield lambda handler: signal.signal(signal.SIGALRM, handler) and None
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def interrupted(rng: random.Random, work: Callable[[], object], nested: list[object]) -> int:
    """Does `work` until a signal has come in (and its handler's call, in `nested`), or 40 times; whether it raised."""
    try:
        _until_interrupted(rng, work, nested)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except Stop:  # around a function: from 3.13 on, what is raised at a loop's jump may pass the loop's own `try` by
        return 1
    return 0


def _until_interrupted(rng: random.Random, work: Callable[[], object], nested: list[object]) -> None:
    before = len(nested)
    signal.setitimer(signal.ITIMER_REAL, rng.uniform(2e-5, 6e-4))
    for _ in range(40):
        work()
        if len(nested) > before:
            return


@pytest.mark.parametrize("kind", ["raises", "calls", "calls in vain"])
@pytest.mark.parametrize("threads", [0, 2])
def test_signals_at_any_moment(
    me: Process, kernel: KernelHandle, alarm: Callable[[Handler], None], kind: str, threads: int
) -> None:
    nested: list[object] = []

    def raises(*_: object) -> None:
        raise Stop

    def calls(*_: object) -> None:
        nested.append(me.call("echo", len(nested), timeout=BOUND))

    def calls_in_vain(*_: object) -> None:
        try:
            me.call("nothing of this name", timeout=BOUND)
        except realmap.UnknownSyscall:
            nested.append(None)

    alarm({"raises": raises, "calls": calls, "calls in vain": calls_in_vain}[kind])
    ending, counts = threading.Event(), [0] * threads

    def other(index: int) -> None:
        while not ending.is_set():
            assert me.call("echo", index, timeout=BOUND) == [index]
            counts[index] += 1

    others = [threading.Thread(target=other, args=(index,)) for index in range(threads)]
    for thread in others:
        thread.start()
    buffer = me.map(100)
    rng = random.Random(7)
    raised = sum(
        interrupted(rng, lambda: me.call("echo", buffer, 5, timeout=rng.choice([None, BOUND])), nested)
        for _ in range(scaled(TIMES))
    )
    ending.set()
    for thread in others:
        thread.join(BOUND)
        assert not thread.is_alive(), "another thread hangs"
    assert raised > TIMES // 10 if kind == "raises" else len(nested) > TIMES // 10
    assert all(count > 0 for count in counts)
    assert me.call("echo", 1, timeout=BOUND) == [1]
    result: list[object] = []
    last = threading.Thread(target=lambda: result.append(me.call("echo", 2, timeout=BOUND)))
    last.start()
    last.join(BOUND)
    assert result == [[2]], "this thread kept its turn"
    wait_until(
        lambda: me.call("echo", 3) == [3] and not me._own_client.endpoint.pending, "the answers to what was given up"
    )
    buffer.unmap()
    wait_until(lambda: not kernel.stats()["mappings"], "the end of what calls held")
