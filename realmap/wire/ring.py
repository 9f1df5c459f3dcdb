"""The fast path: short messages through memory that both sides share, and spinning for a moment before sleeping.

    push ──▶ queue ──▶ pop        no system call while the other side is awake
      ├─ the other side sleeps: the message takes the socket, one system call, which wakes it
      └─ it falls asleep this very moment: a BELL through the socket wakes it

The memory is a sealed memfd, not a segment: it is no page frame of anybody's, and a ring that its
user could truncate would be a way to kill the kernel. There is no eventfd: both sides wait for
their socket anyway, and a descriptor whose blocking mode and counter a client shares with the
kernel would be a way to make the kernel wait.
"""

from __future__ import annotations

import fcntl
import os
import time
from typing import Self

from realmap._core import RING_BYTES, RING_MESSAGE, Ring
from realmap.errors import InvalidSize
from realmap.host import files

#: The longest message that a ring takes, in bytes; longer ones take the socket.
LONGEST = RING_MESSAGE
#: What spinning answers where others want the CPU, and where the other side does.
OVERLOADED, SAME_CPU = -2, -3
#: How long a side looks for the next message before it sleeps, in microseconds. A wake-up across CPUs
#: costs about 45 on a virtual machine (FACTS.md): looking for about twice that long cannot cost much more.
SPIN = 100
#: On a machine with one CPU, who is waited for could not run. (What this process may use says nothing of the other.)
SEVERAL = (os.cpu_count() or 1) > 1
#: A sleep of up to so many times that long would not have been one, had both sides been spinning.
PAYS = 4
#: How long not to spin after others wanted the CPU, in nanoseconds: at first, and at most.
PAUSE, LONGEST_PAUSE = 10_000_000, 1_280_000_000


def checked_spin(value: float) -> float:
    """Microseconds to spin. InvalidSize: below 0 or above a second. TypeError: no number."""
    if not isinstance(value, int | float):
        raise TypeError(f"spin is a number of microseconds, not {type(value).__name__}")
    if not 0 <= value <= 1_000_000:
        raise InvalidSize(value, why="spin is from 0 to 1000000 microseconds")
    return value


class RingEnd(Ring):
    """One side's end of a ring. What it does is the C core's."""

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
            files.close(fd)
            raise

    @classmethod
    def join(cls, fd: int) -> Self:
        """The user's end."""
        return cls._open(fd, 0)


class SpinBudget:
    """How long to look for the next message this time: as long as that has paid off lately, and CPUs are free.

    Where it did not pay off the budget halves, down to nothing; a short sleep (it would have paid
    off) brings it back. Where somebody else took the CPU meanwhile, more processes want to run than there
    are CPUs: then there is no spinning for a while, and for twice as long each time. Nor is there where both sides
    run on the same CPU: each would be in the way of the other.
    """

    __slots__ = ("_pause", "_seen_busy", "budget", "busy_until", "most")

    def __init__(self, most: float) -> None:
        """`most` in microseconds; 0 never spins."""
        self.most = int(most * 1000)
        self.budget = self.most if SEVERAL else 0
        self.busy_until = self._seen_busy = 0
        self._pause = PAUSE

    def nanoseconds(self) -> int:
        """How long to spin now."""
        if self.busy_until:
            if time.monotonic_ns() < self.busy_until:
                return 0
            self.busy_until = 0
        return self.budget

    def won(self) -> None:
        """The message came while spinning."""
        self.budget = self.most

    def lost(self) -> None:
        """It did not."""
        self.budget = self.budget // 2 if self.budget > 2000 else 0

    def overloaded(self) -> None:
        """Somebody else took the CPU."""
        now = time.monotonic_ns()
        self._pause = PAUSE if now - self._seen_busy > 8 * self._pause else min(2 * self._pause, LONGEST_PAUSE)
        self._seen_busy = now
        self.busy_until = now + self._pause

    def slept(self, nanoseconds: int) -> None:
        """It came after a sleep of this length, which is one wake-up more than until it came."""
        if nanoseconds < PAYS * self.most and SEVERAL:
            self.budget = self.most
