"""The page of a seat: how busy a server is, told without a message to whoever may call it.

    kernel   makes the page, and counts up what changes: who serves, and what was granted to this server
    server   says how many calls it has
    callers  choose by that; they may only read

It is a sealed memfd, as a ring is: nobody can cut it short. A server that lies there gets more calls, or fewer.
"""

from __future__ import annotations

import mmap

from realmap.host import files

#: Words: calls whose handlers are at work, and that wait for one; how many may be at work at a time.
BUSY, WAITING, THREADS = 0, 1, 2
#: Counted up: whenever a server of one of its names comes or goes; with every `Granted` and `Revoked` of this seat.
CHANGES, GRANTS = 3, 4
#: By the kernel: whether somebody traces, and the server is to say when each call began and ended.
TRACED = 5
WORDS = 8


class SeatPage:
    """One process's view of it. `words` may be written to where that process may; nobody keeps it beyond `close`."""

    __slots__ = ("_memory", "words")

    def __init__(self, fd: int, *, writable: bool) -> None:
        """`fd` stays the caller's. OSError: no memory."""
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        self._memory = mmap.mmap(fd, mmap.PAGESIZE, access=access)
        self.words = memoryview(self._memory)[: 8 * WORDS].cast("Q")

    @staticmethod
    def create(threads: int) -> tuple[SeatPage, int]:
        """The kernel's, and its descriptor, which the caller closes. OSError: no memory, or no descriptors."""
        fd = files.sealed("realmap-seat", mmap.PAGESIZE)
        try:
            page = SeatPage(fd, writable=True)
            page.words[THREADS] = threads
            return page, fd
        except BaseException:
            files.close(fd)
            raise

    def count(self, word: int) -> None:
        """Counts up a word, whatever another process has written there."""
        self.words[word] = (self.words[word] + 1) % (1 << 64)

    def close(self) -> None:
        """Again: nothing."""
        self.words.release()
        self._memory.close()
