"""Snapshots of a kernel, one after the other, by a thread: nobody who shows them ever waits for the kernel."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import click

from realmap.cli.target import control as control_of
from realmap.errors import KernelDied, KernelError, SyscallTimeout
from realmap.observe import machine, shm
from realmap.observe.control import Control
from realmap.observe.snapshot import Snapshot
from realmap.wire import status

#: What is shown begins so where there is none.
NONE = "NO KERNEL, looking for one"
#: Seconds: between snapshots, at the least.
FLOOR = 0.1
#: A snapshot that took long is followed by a pause that many times as long: the kernel works for others, too.
REST = 4
#: Totals that are shown as so many a second.
RATES = ("calls", "mirrored", "mirrored_bytes", "kept_hits")
#: How many rates are remembered.
HISTORY = 60


@dataclass(frozen=True)
class Seen:
    """A snapshot, the seconds that it took, and what happened a second since the one before (None: the first)."""

    snapshot: Snapshot
    took: float
    rates: dict[str, float] | None = None
    history: tuple[float, ...] = ()


@dataclass
class Past:
    """The snapshot before, for rates."""

    seen: Snapshot | None = None
    moment: float = 0.0
    history: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))

    def add(self, snapshot: Snapshot, moment: float, took: float) -> Seen:
        """The next one; of another kernel than before, it is a first one."""
        rates = None
        if self.seen is None or self.seen.pid != snapshot.pid:
            self.history.clear()
        elif moment > self.moment:
            passed = moment - self.moment
            rates = {name: max(0, snapshot.stats[name] - self.seen.stats[name]) / passed for name in RATES}
            self.history.append(rates["calls"])
        self.seen, self.moment = snapshot, moment
        return Seen(snapshot, took, rates, tuple(self.history))


class Feed:
    """Asks the kernel at `path` every `interval` seconds.

    `others`: where that one has ended (or is ""), whichever kernel runs is taken in its place. `deliver` gets each
    `Seen`, or in words why there is none; it is called in this thread, and not again before `consumed`. A kernel that
    is gone is looked for again at the same pace, one that is stuck (within a second it is) told of until it goes on.
    """

    def __init__(
        self, path: str, interval: float, deliver: Callable[[Seen | str], None], *, others: bool = False
    ) -> None:
        self.path = path
        self._others = others
        self._interval = max(FLOOR, interval)
        self._deliver = deliver
        self._control: Control | None = None
        self._wake = threading.Condition(threading.RLock())
        self._stopped = self._paused = self._waiting = self._now = False
        self._thread = threading.Thread(target=self._run, name="realmap top", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def paused(self) -> bool:
        return self._paused

    def pause(self, paused: bool) -> None:
        with self._wake:
            self._paused, self._now = paused, not paused
            self._wake.notify_all()

    def consumed(self) -> None:
        """What was delivered has been shown."""
        with self._wake:
            self._waiting = False
            self._wake.notify_all()

    def stop(self, patience: float = 1.0) -> None:
        """Ends it; a question that is still without an answer is given up."""
        with self._wake:
            self._stopped = True
            self._wake.notify_all()
        control = self._control
        if control is not None:
            control.close()
        self._thread.join(patience)

    def _run(self) -> None:
        past = Past()
        while not self._stopped:
            start = time.monotonic()
            found: Seen | str
            try:
                found = self._stuck() or self._ask(past, start)
            except SyscallTimeout as error:  # what was asked is answered yet: the connection is as good as before
                found = str(error)
            except (KernelError, OSError) as error:
                found = f"{NONE}: {error}"
                self._forget()
            except click.ClickException as error:  # none runs, or several do
                found = f"{NONE}: {error.message.splitlines()[0]}"
            if self._stopped:
                break
            self._waiting = True
            self._deliver(found)
            took = time.monotonic() - start
            self._rest(max(self._interval - took, REST * took if took > FLOOR and isinstance(found, Seen) else FLOOR))
        self._forget()

    def _stuck(self) -> str:
        """In words, where it cannot answer: asked all the same, it would have that to do as well when it goes on."""
        at = status.look(self.path) if self.path else None
        return str(at) if at is not None and at.is_stuck else ""

    def _ask(self, past: Past, start: float) -> Seen:
        if self._control is None:
            self._control = self._connect()
        snapshot = self._control.snapshot()
        moment = time.monotonic()
        return past.add(snapshot, moment, moment - start)

    def _connect(self) -> Control:
        try:
            if self.path or not self._others:
                return Control(self.path)
        except KernelDied:
            if not self._others:
                raise
        control = control_of(None)
        self.path = control.path
        return control

    def _forget(self) -> None:
        control, self._control = self._control, None
        if control is not None:
            control.close()

    def _rest(self, seconds: float) -> None:
        """Waits until it is time, what was delivered is consumed, and nobody has paused it."""
        end = time.monotonic() + seconds
        with self._wake:
            while not self._stopped:
                left = end - time.monotonic()
                if self._now and not self._waiting:
                    break
                if self._paused or self._waiting:
                    self._wake.wait()
                elif left > 0:
                    self._wake.wait(left)
                else:
                    break
            self._now = False


class MachineFeed(Feed):
    """Looks at any processes of this machine that share memory: no kernel is asked."""

    def __init__(self, interval: float, deliver: Callable[[Seen | str], None]) -> None:
        super().__init__("", interval, deliver)

    def _ask(self, past: Past, start: float) -> Seen:
        snapshot = machine.snapshot(shm.look())
        moment = time.monotonic()
        return past.add(snapshot, moment, moment - start)
