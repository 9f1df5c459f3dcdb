"""The fast path: short messages through memory that both sides share, and spinning for a moment before sleeping.

    push ──▶ queue ──▶ pop        no system call while the other side is awake
      ├─ a client's thread sleeps on a word of the queue: one system call to sleep, and one to wake it
      ├─ a client's event loop waits for its socket: a BELL there wakes it, once for all that comes meanwhile
      └─ the kernel sleeps: the message itself takes the socket, and wakes it; or a BELL, if it falls asleep this moment

The memory is a sealed memfd, not a segment: it is no page frame of anybody's, and a ring that its
user could truncate would be a way to kill the kernel. There is no eventfd: both sides wait for
their socket anyway, and a descriptor whose blocking mode and counter a client shares with the
kernel would be a way to make the kernel wait.
"""

from __future__ import annotations

from typing import Any, Self

from realmap._core import RING_BYTES, RING_MESSAGE, Ring
from realmap.errors import InvalidSize
from realmap.host import files

#: The longest message that a ring takes, in bytes; longer ones take the socket.
LONGEST = RING_MESSAGE
#: How long a side looks for the next message before it sleeps, in microseconds. A wake-up across CPUs
#: costs about 45 on a virtual machine (tools/bench/README.md): looking for about twice that long cannot cost much more.
SPIN = 100


def checked_spin(value: float) -> float:
    """Microseconds to spin. InvalidSize: below 0 or above a second. TypeError: no number."""
    if not isinstance(value, int | float):
        raise TypeError(f"spin is a number of microseconds, not {type(value).__name__}")
    if not 0 <= value <= 1_000_000:
        raise InvalidSize(value, why="spin is from 0 to 1000000 microseconds")
    return value


class RingEnd(Ring):
    """One side's end of a ring. What it does is the C core's."""

    __slots__ = ("owner",)
    #: Whose calls come by it: set by the kernel.
    owner: Any

    @staticmethod
    def make() -> int:
        """Memory for a ring: a descriptor, the caller's to close. OSError: no memory, or no descriptors."""
        return files.sealed("realmap-ring", RING_BYTES)

    @classmethod
    def create(cls) -> tuple[Self, int]:
        """The serving end of a new ring, and the descriptor that the other side opens it by; the caller's to close.

        OSError: as `make`.
        """
        fd = cls.make()
        try:
            return cls.serve(fd), fd
        except BaseException:
            files.close(fd)
            raise

    @classmethod
    def serve(cls, fd: int) -> Self:
        """The end of who answers."""
        return cls._open(fd, 1)

    @classmethod
    def join(cls, fd: int) -> Self:
        """The end of who calls."""
        return cls._open(fd, 0)
