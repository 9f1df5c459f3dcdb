"""A page that the runner, its users and the antagonists share: which user is which process, and what becomes of it.

A user enters when it can bear what antagonists do; the runner takes it off before its pid can be another's. Whoever
holds a user (`held`) has a pidfd of exactly that process.
"""

from __future__ import annotations

import mmap
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from realmap.host import files

#: Of each user: its pid, the pid that an antagonist has doomed, the operation it is in (from 1) and since when (ns);
#: the buffer that it shows (0: none), its length in bytes, the seed of its pattern, and a sum of these: another CPU may
#: see them in any order.
PID, DOOMED, OPERATION, SINCE, ADDRESS, LENGTH, SEED, SUM = range(8)
WORDS = 8


class Held(NamedTuple):
    """A user that lives, or has ended and is not reaped: its pid, and a pidfd."""

    user: int
    pid: int
    pidfd: int


class Shown(NamedTuple):
    """A buffer that user `pid` leaves as it is, for as long as that stands on the board."""

    pid: int
    address: int
    length: int
    seed: int


class Board:
    """A row of words for each user, in memory that all share: made before they are forked."""

    def __init__(self, users: int) -> None:
        self._words = memoryview(mmap.mmap(-1, users * WORDS * 8)).cast("q")
        self._users = users

    def enter(self, index: int) -> None:
        """Called by the user itself: it may be worked on from now on."""
        self._words[index * WORDS + PID] = os.getpid()

    def leave(self, index: int) -> None:
        """Called by the runner, before it reaps that user."""
        for word in (PID, OPERATION, ADDRESS):
            self._words[index * WORDS + word] = 0

    def doom(self, held: Held) -> None:
        """Notes that its death is wanted."""
        self._words[held.user * WORDS + DOOMED] = held.pid

    def is_doomed(self, index: int, pid: int) -> bool:
        """Whether an antagonist wants its death, which is no failure then."""
        return self._words[index * WORDS + DOOMED] == pid

    def begin(self, index: int, operation: int) -> None:
        """Called by the user: it is in that operation from now on."""
        self._words[index * WORDS + SINCE] = time.monotonic_ns()
        self._words[index * WORDS + OPERATION] = operation

    def end(self, index: int) -> None:
        self._words[index * WORDS + OPERATION] = 0

    def operation(self, index: int) -> tuple[int, float]:
        """Which operation it is in (0: none), and for how many seconds."""
        number = self._words[index * WORDS + OPERATION]
        return number, (time.monotonic_ns() - self._words[index * WORDS + SINCE]) / 1e9

    def show(self, index: int, address: int, length: int, seed: int) -> None:
        """By the user: everybody may look at that buffer from now on; at none where `address` is 0."""
        shown = Shown(os.getpid(), address, length, seed)
        for word, value in ((ADDRESS, 0), (LENGTH, length), (SEED, seed), (SUM, hash(shown)), (ADDRESS, address)):
            self._words[index * WORDS + word] = value

    def shown(self, user: int) -> Shown | None:
        """What that user, modulo how many there are, shows. The same before and after: it was shown all the while."""
        words = self._words[user % self._users * WORDS :]
        shown = Shown(words[PID], words[ADDRESS], words[LENGTH], words[SEED])
        return shown if shown.address and words[SUM] == hash(shown) else None

    def pids(self) -> list[int]:
        return [pid for index in range(self._users) if (pid := self._words[index * WORDS + PID])]

    @contextmanager
    def held(self, rng: random.Random) -> Iterator[Held | None]:
        """A user chosen by `rng`; None where there is none in that row."""
        index = rng.randrange(self._users)
        pid = self._words[index * WORDS + PID]
        try:
            pidfd = os.pidfd_open(pid) if pid else -1
        except ProcessLookupError:
            pidfd = -1
        try:
            # Still there after the pidfd was opened: so it is not reaped, and the pidfd is its own.
            yield Held(index, pid, pidfd) if pidfd >= 0 and self._words[index * WORDS + PID] == pid else None
        finally:
            if pidfd >= 0:
                files.close(pidfd)
