"""`Relay`: one thread has the loop, another one stands by, to take it from a handler that does not come back.

    the owner     away[call] = what it is at ──▶ the handler … ──▶ del away[call]: it was still there, so it goes on
    the standby   looks every 10 ms: the same call three times ──▶ away.pop(call): now it has the loop
    the late one  returns, finds nothing there, posts its answer, raises `Lost`; and is the next standby

Whoever takes the call out has the loop. That is one step of a dict under the GIL, so there is always exactly one.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Generic, TypeVar

from realmap._core import Lock, wake_owed
from realmap.serving.loop import Lost

W = TypeVar("W")

#: How often the standby looks, in seconds.
LOOK = 0.01
#: A handler that is seen this often loses the loop: after 20 to 30 ms. Counted and not timed, so that a process which
#: was stopped meanwhile does not seem late.
LOOKS = 3
#: After so many looks that saw no call the standby sleeps until there is one.
QUIET = 20
#: What its thread is called.
STANDBY = "realmap-standby"


@dataclass
class Taken(Generic[W]):
    """What a thread was away at that has just lost the loop, and since when (monotonic, to `LOOK` seconds)."""

    work: W
    since: float


class Relay(Generic[W]):
    """The threads of a loop."""

    def __init__(self, run: Callable[[Taken[W] | None], None], name: str = "kernel", look: float | None = None) -> None:
        """`run(taken)` runs the loop to its end, or raises Lost. `taken`: from whom it was taken; None: nobody.
        `name`: of its threads. `look`: how often the standby looks, in seconds, where that is not LOOK.
        """
        self._run = run
        self._name, self._look = f"realmap-{name}", LOOK if look is None else look
        #: What the thread that has the loop is away at: at most one, by an object of its own.
        self.away: dict[Hashable, W] = {}
        #: Whether the standby sleeps until somebody wakes it.
        self.parked = False
        self._bell: SimpleQueue[None] = SimpleQueue()
        self._lock = Lock()
        self._standby: threading.Thread | None = None
        self._owner: threading.Thread | None = None
        self._ended = False

    def start(self) -> None:
        """Starts the thread that has the loop. RuntimeError: it could not be started."""
        thread = threading.Thread(target=self._work, args=(True,), daemon=True)
        thread.start()

    def stand_by(self) -> bool:
        """Sees to it that a thread stands by. False: none could be started."""
        thread = threading.Thread(target=self._work, args=(False,), name=STANDBY, daemon=True)
        if self._take_post(thread):
            try:
                thread.start()
            except RuntimeError:
                self._standby = None
                return False
        return True

    @contextlib.contextmanager
    def kept(self, is_mine: Callable[[], bool]) -> Iterator[bool]:
        """For a handler: whether its thread has the loop (`is_mine`: as far as one can see), which nobody takes from it
        within the block."""
        at = next(iter(tuple(self.away)), None)
        # Asked after that look: it was mine then, so what was away is this very handler, or taken already.
        work = self.away.pop(at, None) if at is not None and is_mine() else None
        try:
            yield work is not None
        finally:
            if at is not None and work is not None:
                self.away[at] = work
                if self.parked:
                    self.wake()

    def wake(self) -> None:
        """For who has entered something and finds the standby parked."""
        self.parked = False
        self._bell.put(None)

    def end(self) -> None:
        """Nobody stands by any more. By the thread that has the loop, at its end."""
        self._ended = True
        self._bell.put(None)

    def join(self, timeout: float) -> None:
        """Waits, after `end`, for the threads that are not late."""
        for thread in (self._owner, self._standby):
            if thread is not None and thread is not threading.current_thread():
                with contextlib.suppress(RuntimeError):  # it is about to be started, and ends then
                    thread.join(timeout)

    def after_fork_in_child(self) -> None:
        """None of these threads is here. Where a handler has forked, it finds that it has lost the loop."""
        self.away.clear()

    def _take_post(self, thread: threading.Thread) -> bool:
        with self._lock:
            if self._standby is not None or self._ended:
                return False
            self._standby = thread
            return True

    def _work(self, has_loop: bool) -> None:
        pid, me = os.getpid(), threading.current_thread()
        taken = None
        while has_loop or (taken := self._wait_for_loss()) is not None:
            self._owner, me.name = me, self._name
            try:
                self._run(taken)
                return
            except Lost:
                if os.getpid() != pid:  # a handler forked, and returned in the child too: that is no kernel
                    os._exit(0)
                if not self._take_post(me):
                    return
            has_loop, taken, me.name = False, None, STANDBY

    def _wait_for_loss(self) -> Taken[W] | None:
        """Stands by; the call whose loop this thread has then. None: nobody needs it any more."""
        looks = quiet = 0
        since = 0.0
        seen = None
        while not self._ended:
            at = next(iter(tuple(self.away)), None)
            if at is None:
                looks, quiet = 0, quiet + 1
            else:
                looks, quiet = looks + 1 if at is seen else 1, 0
                if looks == 1:
                    since = time.monotonic()
                    wake_owed()  # those answered just before it do not wait for its end
                work = self.away.pop(at, None) if looks >= LOOKS else None
                if work is not None:
                    self._standby = None
                    return Taken(work, since)
            seen = at  # held, so that no other is at its address
            if quiet < QUIET:
                time.sleep(self._look)
            else:
                quiet = 0
                self._park()
        self._standby = None
        return None

    def _park(self) -> None:
        self.parked = True
        if not self.away and not self._ended:  # asked again: who enters from here on finds it parked
            self._bell.get()
        self.parked = False
