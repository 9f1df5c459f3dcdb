"""Handlers that do not return: noticed, told of once, and, where there is a limit, answered for."""

from __future__ import annotations

import sys
import threading
import time
import traceback

from realmap.errors import SyscallTimeout
from realmap.host.signals import Flag
from realmap.kernel.books import Books
from realmap.kernel.clients import Clients
from realmap.kernel.dispatch import Dispatch
from realmap.kernel.logs import log
from realmap.kernel.loop import Loop
from realmap.kernel.processes import UserProcess
from realmap.kernel.syscalls import Running

#: How long a handler is at work before it is told of. Seconds.
REPORT = 10.0
#: A connection that has not said who it is for so long is closed. Seconds.
SILENCE = 10.0
TICK = 1.0


class Watchdog:
    """A thread that looks once a second; it does nothing while no call is running."""

    def __init__(self, books: Books, loop: Loop, clients: Clients, dispatch: Dispatch) -> None:
        self._books = books
        self._loop = loop
        self._clients = clients
        self._dispatch = dispatch
        self._end = Flag()
        limit = books.limits.seconds
        self._tick = TICK if limit is None else min(TICK, max(0.01, limit / 4))
        #: What the kernel's own thread was at, and since when, as far as was seen.
        self._seen: tuple[object, float] = (None, 0.0)
        self._told: object = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts looking. RuntimeError: no thread could be started."""
        thread = threading.Thread(target=self._look, name="realmap-watch", daemon=True)
        thread.start()
        self._thread = thread

    def stop(self) -> None:
        """Ends it. Again: nothing."""
        self._end.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(1.0)

    def _look(self) -> None:
        while not self._end.wait(self._tick):
            self._look_at_loop()
            if self.is_needed:
                self._loop.post(self._on_tick)

    @property
    def is_needed(self) -> bool:
        """Whether a blocking handler is at work, a handle has its time, or somebody has not said who it is."""
        return bool(self._dispatch.running or self._clients.has_strangers or self._books.handles.timed)

    def _look_at_loop(self) -> None:
        """From beside: a handler that does not return on the kernel's thread holds up everybody."""
        now, current = time.monotonic(), self._dispatch.current
        if current is not self._seen[0]:
            self._seen = (current, now)
        elif current is not None and now - self._seen[1] >= REPORT and current is not self._told:
            self._told = current
            frame = sys._current_frames().get(self._loop.thread)
            where = "".join(traceback.format_stack(frame)[-3:]) if frame is not None else ""
            log.warning(
                "the syscall %r of %r has kept the kernel's thread for %.0f s, and nobody else is served meanwhile; "
                "declare it blocking=True\n%s",
                current.name,
                current.process,
                now - self._seen[1],
                where,
                extra=current.process.facts | {"syscall": current.name},
            )

    def _on_tick(self) -> None:
        """On the kernel's thread."""
        now, limit = time.monotonic(), self._books.limits.seconds
        slow: dict[tuple[str, UserProcess], list[float]] = {}
        for running in list(self._dispatch.running):
            if running.began is None:  # it waits for its turn
                continue
            age = now - running.began
            if limit is not None and age >= limit and not running.answered:
                self._give_up(running, limit)
            if age >= REPORT and not running.told:
                running.told = True
                slow.setdefault((running.name, running.process), []).append(age)
        for (name, process), ages in slow.items():
            count = f"{len(ages)} calls of the syscall" if len(ages) > 1 else "the syscall"
            extra = process.facts | {"syscall": name}
            log.warning("%s %r of %r: at work for %.0f s", count, name, process, max(ages), extra=extra)
        self._clients.drop_silent(now - SILENCE)
        self._books.handles.expire(now)

    def _give_up(self, running: Running, limit: float) -> None:
        why = f"the handler of {running.name!r} was still at work after {limit} s, the kernel's limit"
        running.answer(SyscallTimeout(running.name, limit, why=why))
