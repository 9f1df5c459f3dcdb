"""`Loop`: waits, and calls what it was handed. It knows nobody.

epoll ─┬─ descriptors        each with a function of its own (`watch`)
       ├─ an eventfd         another thread has posted a job (`post`), or it is to end
       └─ its timeout        a job whose time has come (`after`)
rings ─── the next message   without a system call while both sides are awake (`run`)

One thread has the loop at a time. Where it does not come back from what it calls, another one runs it on: all that
there is to know stands in the `Loop`, nothing in `run`.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import select
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeVar

from realmap._core import Lock, Ring, SpinBudget, fall_asleep, gather, wake_owed, wake_up
from realmap.host import files
from realmap.serving.logs import log
from realmap.wire.status import TURN, Page

Handler = Callable[[int], None]
R = TypeVar("R", bound=Ring)
T = TypeVar("T")
#: While the rings are busy, the descriptors are looked at this often, in nanoseconds.
LOOK = 200_000
#: A message that took longer makes the loop wake everybody as soon as they are answered, for so long: else those who
#: were answered before the next such one would wait for it. Nanoseconds.
LONG, HASTE = 300_000, 100_000_000
#: The status page says to this many nanoseconds what the loop is at since when: writing there costs.
TELL = 1_000_000


class Lost(BaseException):
    """Raised by a thread that has the loop no longer, up to where it began: on its way out it touches nothing."""


class Loop:
    """One thread at a time runs it. What is watched is called on that thread; `post` and `end` are for any."""

    def __init__(self, page: Page) -> None:
        """`page`: is told what it takes up when, and that it sleeps."""
        self._page = page
        self._posted: deque[Callable[[], None]] = deque()
        self._handlers: dict[int, Handler] = {}
        #: When, in seconds of the monotonic clock, and what; a number tells those of the same time apart.
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._wake = -1
        self._wake_lock = Lock()
        #: Whether it is to end, or has.
        self.ending = False
        #: The thread that runs it.
        self.thread = 0
        self._is_forked = False

    @property
    def is_open(self) -> bool:
        """Whether it can be run, and jobs wait for that."""
        return self._wake >= 0

    def open(self) -> None:
        """Gets it ready. OSError: no descriptors, or no memory; nothing is left then."""
        with contextlib.ExitStack() as undo:
            wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            undo.callback(files.close, wake)
            self._epoll = select.epoll()
            undo.callback(files.shut, self._epoll)
            self.watch(wake, self._on_wake)
            self._wake = wake
            undo.pop_all()

    def close(self) -> None:
        """From here on, jobs run where they are posted; those that wait, here. Again: nothing."""
        if not self.is_open:
            return
        files.shut(self._epoll)
        with self._wake_lock:
            wake, self._wake = self._wake, -1
            files.close(wake)
        self._run_posted()

    def after_fork_in_child(self) -> None:
        self.ending = self._is_forked = True
        self._wake_lock = Lock()  # whoever had it is not here
        files.shut(self._epoll)
        files.close(self._wake)
        self._wake = -1

    def end(self) -> None:
        """Has `run` return, soon. From any thread."""
        self.ending = True
        self._ring_bell()

    def post(self, job: Callable[[], None]) -> None:
        """Has `job` run on its thread, soon; here and now where it is not open. From any thread.

        Lost: this is a forked child. What a handler returns there is nobody's answer.
        """
        with self._wake_lock:
            if self._wake >= 0:
                self._posted.append(job)
                self._ring_bell()
                return
        if self._is_forked:
            raise Lost
        job()

    def ask(self, question: Callable[[], T]) -> T:
        """What `question` says on its thread, or raises there. For any other thread, which waits for it. Lost: as
        `post`."""
        outcome: SimpleQueue[tuple[list[T], Exception | None]] = SimpleQueue()

        def run() -> None:
            try:
                outcome.put(([question()], None))
            except Exception as error:
                outcome.put(([], error))

        self.post(run)
        said, error = outcome.get()
        if error is not None:
            raise error
        return said[0]

    def after(self, seconds: float, job: Callable[[], None]) -> None:
        """Has `job` run once, so many seconds from now. Only on its thread, or before it runs."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._numbers), job))

    def _ring_bell(self) -> None:
        with self._wake_lock, contextlib.suppress(OSError):  # where its counter is full, it has rung already
            while self._wake >= 0:
                with contextlib.suppress(InterruptedError):  # unlike os.write, this is not tried again by itself
                    os.eventfd_write(self._wake, 1)
                    return

    def watch(self, fd: int, handler: Handler, events: int = select.EPOLLIN) -> None:
        """Has `handler(fd)` called on its thread when something is to be had from `fd`.

        OSError: Linux has no memory for it, or the limit of what is watched is reached.
        """
        self._epoll.register(fd, events)
        self._handlers[fd] = handler

    def rewatch(self, fd: int, events: int) -> None:
        """Watches it for other events. OSError: as `watch`."""
        self._epoll.modify(fd, events)

    def unwatch(self, fd: int) -> None:
        """Ends that. Again: nothing."""
        if self._handlers.pop(fd, None) is not None:
            with contextlib.suppress(OSError):  # whoever is being dropped is dropped to the end
                self._epoll.unregister(fd)

    def run(self, rings: list[R], take: Callable[[R], None], patience_in_us: float) -> None:
        """Until `end`: `take(ring)` for each that has a message, and looks at the descriptors now and then.

        `rings` may change meanwhile: `take` is called of one that has gone, too. `patience_in_us`: how long it looks
        for the next message before it sleeps. OSError: Linux fails a call without which it cannot go on.
        """
        budget = SpinBudget(int(patience_in_us * 1000), os.cpu_count() or 1)
        page, clock = self._page, time.monotonic_ns
        last: R | None = None
        looked = asleep = told = hasty = 0
        paid = False  # whether spinning has, since the last look
        patience = budget.now(clock())
        while not self.ending:
            if not rings:
                page.rest()
                self._attend(self._poll(self._timeout()))
                continue
            found = gather(rings, last, patience)
            now = clock()
            if isinstance(found, list):
                if asleep:
                    budget.slept(now - asleep)
                    asleep = 0
                else:
                    paid = True
                for last in found:
                    page.now = now
                    if now - told > TELL:
                        page.words[TURN] = told = now
                    take(last)
                    before, now = now, clock()
                    if now - before > LONG:
                        hasty = now + HASTE
                    if now < hasty:
                        wake_owed()
                if now - looked > LOOK:
                    looked = now
                    self._attend(self._poll(0))
                    if paid:
                        budget.spun(0, now)
                        paid = False
                    patience = budget.now(now)
            else:
                if patience:
                    budget.spun(found, now)
                asleep = looked = now
                self._sleep(rings)
                patience = budget.now(clock())

    def _sleep(self, rings: list[R]) -> None:
        if fall_asleep(rings):
            self._page.rest()
            try:
                events = self._poll(self._timeout())
            finally:
                wake_up(rings)
            self._attend(events)

    def _poll(self, timeout: float | None) -> list[tuple[int, int]]:
        wake_owed()
        return self._epoll.poll(timeout)

    def _timeout(self) -> float | None:
        """Seconds until the next job's time; None: there is none."""
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None

    def attend(self, timeout: float) -> None:
        """Looks at the descriptors alone, for at most so many seconds. OSError: as `run`."""
        self._attend(self._poll(timeout))

    def _attend(self, events: list[tuple[int, int]]) -> None:
        for fd, _ in events:
            self._page.turn()
            # Looked up anew: an earlier event of this turn may have closed it.
            handler = self._handlers.get(fd)
            if handler is not None:
                _run(handler, fd)
        while self._timers and self._timers[0][0] <= time.monotonic():
            _run(heapq.heappop(self._timers)[-1])

    def _on_wake(self, _: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        self._run_posted()

    def _run_posted(self) -> None:
        for _ in range(len(self._posted)):
            _run(self._posted.popleft())


def _run(job: Callable[..., None], *args: int) -> None:
    try:
        job(*args)
    except Exception:  # a bug of ours ends nothing
        log.exception("realmap failed at something")
