"""What an antagonist is, what it is given, and bytes of its own that it can hold against what they should be."""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import ClassVar, NamedTuple

from realmap.errors import KernelDied
from realmap.host import runtime
from realmap.host.cgroups import MemoryCgroup
from realmap.lab.stress.actor import WrongBytes, join
from realmap.lab.stress.board import Board, Held
from realmap.lab.workload import pattern
from realmap.pages import PAGE_SIZE, align_down


class Target(NamedTuple):
    """What it works on: the kernel (its socket and pid), whether that is the run's `own`, and the users."""

    path: str
    kernel: int
    own: bool
    board: Board


class Antagonist(ABC):
    """Something that works on the users' pages, or on them, in a process of its own beside them.

    The runner makes it and asks whether it is `available`; the rest happens in its own process. `close` is called
    there, and once more by the runner, for that process may have died: nothing that was changed outlives the run.
    """

    name: ClassVar[str]
    #: Seconds between two steps, at least.
    rest: ClassVar[float] = 0.005

    def __init__(self, target: Target) -> None:
        self.target = target

    def available(self) -> str | None:
        """None, or why this machine does not allow it, and how to."""
        return None

    def begin(self, rng: random.Random) -> None:
        """In its own process, before the first step: makes what it needs."""
        return

    @abstractmethod
    def step(self, rng: random.Random) -> bool:
        """Does what it does once, as `rng` chooses; False where there was nothing to do it to.

        WrongBytes: bytes are not what they should be, which is what all this is for.
        """

    def close(self) -> None:
        """Restores everything. Again: nothing."""
        return


class OnUsers(Antagonist):
    """One whose steps work on one user each, chosen by chance; nothing is done where that has just ended."""

    def step(self, rng: random.Random) -> bool:
        with self.target.board.held(rng) as user, suppress(ProcessLookupError):
            return user is not None and self.work_on(user, rng)
        return False

    @abstractmethod
    def work_on(self, user: Held, rng: random.Random) -> bool:
        """A step; `user` stays who it is meanwhile. ProcessLookupError: it has ended."""


class InCgroup(Antagonist):
    """One with a memory cgroup for users, of at most `most` bytes."""

    most: ClassVar[int | None] = None
    _group: MemoryCgroup | None = None

    def available(self) -> str | None:
        """Makes the cgroup."""
        try:
            self._group = MemoryCgroup(f"realmap-{self.name}-{runtime.stamp()}")
            if self.most is not None:
                self._group.limit(self.most)
        except OSError as error:
            return str(error)
        return None

    @property
    def group(self) -> MemoryCgroup:
        assert self._group is not None
        return self._group

    def close(self) -> None:
        if self._group is not None:
            self._group.close()


class Bytes:
    """A buffer of the antagonist's own, as a user of the kernel, and what each of its bytes should be."""

    def __init__(self, target: Target, length: int, rng: random.Random) -> None:
        self._me = join(target.path)
        self.buffer = self._me.map(length)
        self.expected = bytearray(length)
        self.fill(0, length, rng)

    def fill(self, offset: int, length: int, rng: random.Random) -> None:
        self.expected[offset : offset + length] = data = pattern(rng.getrandbits(32), length)
        self.buffer[offset : offset + length] = data

    def range(self, rng: random.Random, unit: int = PAGE_SIZE) -> tuple[int, int]:
        """Whole units of it, by chance: (offset, length), in bytes."""
        units = len(self.expected) // unit
        first = rng.randrange(units)
        return first * unit, rng.randint(1, min(64, units - first)) * unit

    def check(self, what: str, offset: int = 0, length: int | None = None) -> None:
        """Holds them against what they should be, here and by a mirror in the kernel. WrongBytes: after `what`."""
        length = len(self.expected) - offset if length is None else length
        right = bytes(self.expected[offset : offset + length])
        seen = self.buffer[offset : offset + length]
        if seen != right:
            at = next(place for place in range(length) if seen[place] != right[place])
            raise WrongBytes(f"wrong bytes after {what}: {seen[at]:#x} at {offset + at}, not {right[at]:#x}")
        digest = self._me.call("stress_digest", self.buffer.slice(offset, length))
        if digest != hashlib.sha256(right).hexdigest():
            raise WrongBytes(f"wrong bytes in a mirror after {what}: {length} at {offset}")

    def keep(self, name: int) -> None:
        """Has the kernel keep a mirror of it."""
        self._me.call("stress_keep", name, self.buffer)

    def drop(self, name: int, what: str) -> None:
        """Holds the mirror that was kept against what the bytes should be. WrongBytes: after `what`."""
        if self._me.call("stress_drop", name) != hashlib.sha256(self.expected).hexdigest():
            raise WrongBytes(f"wrong bytes in a kept mirror after {what}")

    def close(self) -> None:
        with suppress(KernelDied):
            self._me.close()


def within(start: int, end: int, rng: random.Random, most: int) -> tuple[int, int]:
    """Whole pages between two addresses, `most` pages at most: (address, length)."""
    pages = (end - start) // PAGE_SIZE
    count = rng.randint(1, min(most, pages))
    return start + align_down(rng.randrange((pages - count + 1) * PAGE_SIZE)), count * PAGE_SIZE
