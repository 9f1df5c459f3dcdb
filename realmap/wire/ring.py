"""The fast path: short messages through memory that both sides share, and spinning for a moment before sleeping.

    push ──▶ queue ──▶ pop        no system call while the other side is awake
      └─ the other side sleeps: a BELL through the socket, one system call, wakes it

The memory is a sealed memfd, not a segment: it is no page frame of anybody's, and a ring that its
user could truncate would be a way to kill the kernel. There is no eventfd: both sides wait for
their socket anyway, and a descriptor whose blocking mode and counter a client shares with the
kernel would be a way to make the kernel wait.
"""

from __future__ import annotations

import fcntl
import os
import resource
import time
from typing import Self

from realmap._host import RING_BYTES, RING_MESSAGE, Ring
from realmap.errors import InvalidSize

#: The longest message that a ring takes, in bytes; longer ones take the socket.
LONGEST = RING_MESSAGE
#: How long a side looks for the next message before it sleeps, in microseconds. A wake-up across CPUs
#: costs about 45 on a virtual machine (FACTS.md): looking for about twice that long cannot cost much more.
SPIN = 100
#: How often it is looked at whether CPUs are free, in nanoseconds.
LOOK = 10_000_000
#: Or every so many uses, whatever is later: at the most so many spins that pay off.
USES = 32


def checked_spin(value: float) -> float:
    """Microseconds to spin. InvalidSize: below 0 or above a second. TypeError: no number."""
    if not isinstance(value, int | float):
        raise TypeError(f"spin is a number of microseconds, not {type(value).__name__}")
    if not 0 <= value <= 1_000_000:
        raise InvalidSize(value, why="spin is from 0 to 1000000 microseconds")
    return value


class RingEnd(Ring):
    """One side's end of a ring. `_push`, `_pop` and `_close` are the C core's."""

    __slots__ = ()

    @classmethod
    def create(cls) -> tuple[Self, int]:
        """The kernel's end of a new ring, and the descriptor that the other side opens it by; the caller's to close.

        OSError: no memory, or no descriptors.
        """
        fd = os.memfd_create("realmap-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, RING_BYTES)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            return cls._open(fd, 1), fd
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def join(cls, fd: int) -> Self:
        """The user's end."""
        return cls._open(fd, 0)


class SpinBudget:
    """How long to look for the next message this time: as long as that has paid off lately, and CPUs are free.

    Where it did not pay off the budget halves, down to nothing; a short sleep (it would have paid
    off) brings it back. Where this thread is preempted more than once in LOOK, more processes want to run
    than there are CPUs, and it is nothing: who spins then keeps the very process from running that it
    waits for.
    """

    __slots__ = ("_budget", "_busy", "_cpus", "_looked", "_preempted", "_uses", "most")

    def __init__(self, most: float) -> None:
        """`most` in microseconds; 0 never spins."""
        self.most = int(most * 1000)
        self._budget = self.most
        self._cpus = len(os.sched_getaffinity(0))
        self._busy = False
        self._uses = 0  # until the clock is looked at: that costs more than all the rest of this
        self._looked = time.monotonic_ns()
        self._preempted = _preemptions()

    def nanoseconds(self) -> int:
        """How long to spin now."""
        if not self._budget or self._cpus < 2:
            return 0
        self._uses -= 1
        if self._uses < 0:
            self._uses = USES
            now = time.monotonic_ns()
            if now - self._looked > LOOK:
                count = _preemptions()
                self._busy = (count - self._preempted) * LOOK > now - self._looked
                self._preempted, self._looked = count, now
        return 0 if self._busy else self._budget

    def won(self) -> None:
        """The message came while spinning."""
        self._budget = self.most

    def lost(self) -> None:
        """It did not."""
        self._uses = 0
        self._budget = self._budget // 2 if self._budget > 2000 else 0

    def slept(self, nanoseconds: int) -> None:
        """It came after a sleep of this length."""
        self._uses = 0
        if nanoseconds < 2 * self.most:
            self._budget = self.most


def _preemptions() -> int:
    """How often this thread was taken off its CPU while it wanted to run, so far."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw
