"""Handlers that do not return: noticed, told of once, and, where there is a limit, answered for."""

from __future__ import annotations

import sys
import time
import traceback
from itertools import takewhile

from realmap.errors import SyscallTimeout
from realmap.kernel.books import Books
from realmap.kernel.clients import Clients
from realmap.kernel.dispatch import Dispatch
from realmap.kernel.running import Running
from realmap.serving.logs import urgent
from realmap.serving.loop import Loop
from realmap.serving.syscalls import run

#: How long a handler is at work before it is told of. Seconds.
REPORT = 10.0
#: A connection that has not said who it is for so long is closed. Seconds.
SILENCE = 10.0
TICK = 1.0


class Watchdog:
    """A job of the loop that looks once a second, while there is something to look at: an idle kernel sleeps."""

    def __init__(self, books: Books, loop: Loop, clients: Clients, dispatch: Dispatch) -> None:
        self._books = books
        self._loop = loop
        self._clients = clients
        self._dispatch = dispatch
        limit = books.limits.seconds
        self._tick = TICK if limit is None else min(TICK, max(0.01, limit / 4))
        self._awake = False

    def wake(self) -> None:
        """There may be something to look at from now on."""
        if not self._awake:
            self._awake = True
            self._loop.after(self._tick, self._look)

    @property
    def is_needed(self) -> bool:
        """Whether a handler is at work beside the loop, a handle has its time, or somebody has not said who it is."""
        return bool(self._dispatch.running or self._clients.has_strangers or self._books.handles.timed)

    def _look(self) -> None:
        self._awake = False
        now = time.monotonic()
        try:
            self._look_at_handlers(now)
            self._clients.drop_silent(now - SILENCE)
            self._books.handles.expire(now)
        finally:
            if self.is_needed:
                self.wake()

    def _look_at_handlers(self, now: float) -> None:
        limit, given_up = self._books.limits.seconds, self._dispatch.given_up
        slow: dict[tuple[str, int], list[Running]] = {}
        for running in list(self._dispatch.running):
            if running.began is None:  # it waits for its turn
                continue
            age = now - running.began
            if limit is not None and age >= limit and not running.answered:
                why = f"the handler of {running.name!r} was still at work after {limit} s, the kernel's limit"
                running.answer(SyscallTimeout(running.name, limit, why=why))
            if not running.process.alive:
                given_up.add_orphan(running)
            elif running.answered or running.call.cancelled:
                given_up.add(running)
            if age >= REPORT and not running.told:
                running.told = True
                slow.setdefault((running.name, running.process.number), []).append(running)
        for each in slow.values():
            _report(each, now)


def _report(calls: list[Running], now: float) -> None:
    """Of calls of one syscall by one process: since when, and where the oldest of them is."""
    first = min(calls, key=lambda each: each.began or now)
    count = f"{len(calls)} calls of the syscall" if len(calls) > 1 else "the syscall"
    hint = "" if first.syscall.blocking else "; declare it blocking=True"
    age = now - (first.began or now)
    urgent.warning(
        "%s %r of %r: at work for %.0f s%s\n%s",
        count,
        first.name,
        first.process,
        age,
        hint,
        _stack(first.thread),
        extra=first.facts,
    )


def _stack(thread: int) -> str:
    """Where a handler is, without what is below it."""
    frame = sys._current_frames().get(thread)
    handlers = takewhile(lambda each: each[0].f_code is not run.__code__, traceback.walk_stack(frame) if frame else ())
    return "".join(reversed(traceback.StackSummary.extract(handlers).format()))
