"""Signals at random, for long: handlers that raise, call, map, share and take their time, while threads and tasks call.

Nothing is lost: every call is answered or ended by the handler's own exception, timeouts come in time, and no other
descriptor is touched.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import FrameType

import pytest
from conftest import BOUND, PAGE, scaled, wait_until

import realmap
from realmap import KernelHandle, Process

CARRIERS = ("ring", "socket")
#: Of the long run, on each carrier.
FULL_SECONDS = 300
#: How far from its time a timeout may come, in seconds, besides those in which another program has the CPU.
LATE = 0.1


class Stop(BaseException):
    """As Ctrl-C, but nobody else's."""


RAISED = [TimeoutError, OSError, ValueError, KeyboardInterrupt, Stop]


def starved() -> float:
    """For how long threads of this process were ready, and others had the CPUs. Seconds."""
    found = 0
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError), open(f"/proc/self/task/{thread}/schedstat") as file:
            found += int(file.read().split()[1])
    return found / 1e9


@pytest.fixture(autouse=True)
def nobody_is_called_by_the_collector() -> Iterator[None]:
    """Of what a handler raises in a callback of gc (hypothesis has one), nobody ever hears."""
    before, gc.callbacks[:] = gc.callbacks[:], []
    yield
    gc.callbacks[:] = before


class Storm:
    """One connection, and what is done with it; counted by what came of it."""

    def __init__(self, me: Process, seed: int) -> None:
        self.me = me
        self.rng = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.late: list[float] = []
        #: Whether handlers may raise: once for each thing that is done, so that this program knows where.
        self.may_raise = False
        self.depth = 0

    # ---- operations -------------------------------------------------------------------------

    def call(self) -> None:
        number = self.rng.random()
        assert self.me.call("echo", number) == [number]

    def long_call(self) -> None:
        text = "x" * self.rng.randrange(65_000, 300_000)
        assert self.me.call("echo", text) == [text]

    def give_up(self) -> None:
        if self.me._own_client.endpoint.pending > 200:  # what is given up goes on in the kernel, a few at a time
            return
        timeout = self.rng.choice([0.0, 0.003, 0.01])
        handled = self.done["handled"]
        began = self.clock()
        with suppress(realmap.SyscallTimeout):
            self.me.call("sleep", 0.05, timeout=timeout)
        ended = self.clock()
        if self.done["handled"] == handled:  # else a handler took its own time in between
            self.late.append(ended - began - timeout)

    def clock(self) -> float:
        """The time, without that in which other programs had the CPUs. No handler raises here: a file is open."""
        may_raise, self.may_raise = self.may_raise, False
        now = time.monotonic() - starved()
        self.may_raise = may_raise
        return now

    def memory(self) -> None:
        length = self.rng.randrange(1, 5 * PAGE)
        buffer = self.me.map(length, fragment=self.rng.choice([None, PAGE]))
        assert not any(buffer[:])
        mark = self.rng.randbytes(length)
        buffer[:] = mark
        with self.me.attach(self.me.share(buffer, uses=1)) as same:
            assert same[:] == mark
        buffer.unmap()

    def ask(self) -> None:
        self.me.query(realmap.memory.USER_LAND.start)

    def any_of(self) -> None:
        work = self.rng.choice([self.call, self.call, self.long_call, self.give_up, self.memory, self.ask])
        work()
        self.done[work.__name__] += 1

    # ---- the storm --------------------------------------------------------------------------

    def on_signal(self, _: int, __: FrameType | None) -> None:
        if self.depth > 3:
            return
        self.done["handled"] += 1
        self.depth += 1
        try:
            what = self.rng.random()
            if what < 0.3:
                self.any_of()
        finally:
            self.depth -= 1
        if what > 0.7 and self.may_raise:
            self.may_raise = False
            raise self.rng.choice(RAISED)

    def blow(self, seconds: float) -> None:
        """Does one thing after the other, with signals as it comes, for so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                signal.setitimer(signal.ITIMER_REAL, self.rng.uniform(2e-5, 1e-3), self.rng.choice([0, 1e-4, 5e-3]))
                self.may_raise = True
                self.any_of()
                self.may_raise = False
            except tuple(RAISED) as error:
                assert type(error) in RAISED, error  # a SyscallTimeout is a TimeoutError, too
                self.done[type(error).__name__] += 1
        signal.setitimer(signal.ITIMER_REAL, 0)


def bystanders(me: Process, ending: threading.Event, counts: list[int]) -> list[threading.Thread]:
    """Two threads and, on a third, two tasks that call all the while."""

    def call(index: int) -> None:
        while not ending.is_set():
            assert me.call("echo", index, timeout=BOUND) == [index]
            counts[index] += 1

    async def acall(index: int) -> None:
        while not ending.is_set():
            assert await me.acall("echo", index, timeout=BOUND) == [index]
            counts[index] += 1

    async def both() -> None:
        await asyncio.gather(acall(2), acall(3))

    work: list[Callable[[], None]] = [lambda: call(0), lambda: call(1), lambda: asyncio.run(both())]
    return [threading.Thread(target=each) for each in work]


def weather(me: Process, kernel: KernelHandle, seconds: float, seed: int) -> None:
    storm, ending, counts = Storm(me, seed), threading.Event(), [0] * 4
    before = signal.signal(signal.SIGALRM, storm.on_signal)
    own = tempfile.TemporaryFile()  # what no stray descriptor may write to, or close
    own.write(b"mine" * 1000)
    own.flush()
    inode = os.fstat(own.fileno()).st_ino
    threads = bystanders(me, ending, counts)
    for thread in threads:
        thread.start()
    try:
        storm.blow(seconds)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        seen = list(counts)
        wait_until(lambda: all(now > then for now, then in zip(counts, seen, strict=True)), "everybody's next answer")
        ending.set()
        for thread in threads:
            thread.join(BOUND)
            assert not thread.is_alive(), "a bystander was forgotten"
    assert os.fstat(own.fileno()).st_ino == inode
    own.seek(0)
    assert own.read() == b"mine" * 1000
    own.close()
    late = sorted(storm.late)
    latest = late[-1] if late else 0.0
    print(f"{seconds} s: {dict(storm.done)}; bystanders {counts}; timeouts late by at most {latest:.3f} s")
    # One, or one in a hundred: a map that Linux is slow to undo.
    assert sum(each > LATE for each in late) <= max(1, len(late) // 100), late[-5:]
    gc.collect()
    wait_until(lambda: me.call("nop") is None and not me._own_client.endpoint.pending, "all answers")
    wait_until(lambda: me.call("nop") is None and not kernel.stats()["mappings"], "the end of what was given up")


def test_a_storm(me: Process, kernel: KernelHandle) -> None:
    weather(me, kernel, 1.0, 7)


@pytest.mark.slow
def test_a_storm_full_count(me: Process, kernel: KernelHandle) -> None:
    weather(me, kernel, scaled(FULL_SECONDS), 11)
