"""The ordered tree of ranges: what lies where in a land. Holes are not stored; they lie between.

Two levels: leaves of at most 256 ranges, and a list of where each leaf begins. A look-up is two
binary searches (in C), an insertion moves at most one leaf, and a search for a hole skips every
leaf whose widest hole is too narrow (kept per leaf, found anew only after it changed).

         _mins   [ 0x2000 ,          0x7000 ,          0xd000 ]
                     │                  │                 │
        leaves   [2000-3000)        [7000-8000)       [d000-f000)
                 [3000-5000) hole   [8000-9000) hole      hole
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Generic, TypeVar

from realmap.pages import demand

T = TypeVar("T")
LEAF = 256
#: So many obstacles are kept in mind.
OBSTACLES = 1024


class _Leaf(Generic[T]):
    """Neighbouring ranges. A hole belongs to the leaf of the range that follows it."""

    __slots__ = ("ends", "starts", "values", "widest")

    def __init__(self, starts: list[int], ends: list[int], values: list[T]) -> None:
        self.starts, self.ends, self.values = starts, ends, values
        self.widest = -1  # not known


class Bookkeeping(Generic[T]):
    """Disjoint half-open ranges of [low, high), in bytes, each with a value. Not safe for threads by itself."""

    __slots__ = ("_count", "_leaves", "_mins", "high", "low")

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high
        self._mins: list[int] = []
        self._leaves: list[_Leaf[T]] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[T]:
        """The values, in order of address."""
        return chain.from_iterable(leaf.values for leaf in self._leaves)

    def at(self, address: int) -> T | None:
        """The value of the range that holds `address`."""
        index = bisect_right(self._mins, address) - 1
        if index < 0:
            return None
        leaf = self._leaves[index]
        inside = bisect_right(leaf.starts, address) - 1
        return leaf.values[inside] if address < leaf.ends[inside] else None

    def following(self, address: int) -> tuple[int, T] | None:
        """(start, value) of the first range that starts at or above `address`."""
        index = max(0, bisect_right(self._mins, address) - 1)
        for leaf in self._leaves[index : index + 2]:
            inside = bisect_left(leaf.starts, address)
            if inside < len(leaf.starts):
                return leaf.starts[inside], leaf.values[inside]
        return None

    def hole(self, address: int) -> tuple[int, int]:
        """The hole that `address` lies in, as (start, end). Panics where it lies in none."""
        demand(self.low <= address < self.high and self.at(address) is None, f"{address:#x} lies in no hole")
        index = bisect_right(self._mins, address) - 1
        start = self.low
        if index >= 0:
            leaf = self._leaves[index]
            start = leaf.ends[bisect_right(leaf.starts, address) - 1]
        after = self.following(address)
        return start, after[0] if after else self.high

    def overlap(self, start: int, end: int) -> T | None:
        """The first value whose range shares a byte with [start, end), also one that covers it from below."""
        found = self.at(start)
        if found is not None:
            return found
        after = self.following(start)
        return after[1] if after and after[0] < end else None

    def add(self, start: int, end: int, value: T) -> None:
        """Enters a range. Panics where it is empty, outside of [low, high), or overlaps one that is there."""
        if not self.low <= start < end <= self.high or self.overlap(start, end) is not None:
            demand(False, f"[{start:#x}, {end:#x}) does not lie in the land, or overlaps what is there")
        self._count += 1
        if not self._leaves:
            self._leaves.append(_Leaf([start], [end], [value]))
            self._mins.append(start)
            return
        index = max(0, bisect_right(self._mins, start) - 1)
        leaf = self._leaves[index]
        inside = bisect_left(leaf.starts, start)
        leaf.starts.insert(inside, start)
        leaf.ends.insert(inside, end)
        leaf.values.insert(inside, value)
        self._mins[index] = leaf.starts[0]
        if len(leaf.starts) > LEAF:
            half = LEAF // 2
            self._leaves.insert(index + 1, _Leaf(leaf.starts[half:], leaf.ends[half:], leaf.values[half:]))
            self._mins.insert(index + 1, leaf.starts[half])
            del leaf.starts[half:], leaf.ends[half:], leaf.values[half:]
        for changed in self._leaves[index : index + 3]:
            changed.widest = -1

    def remove(self, start: int) -> T:
        """Takes out the range that starts at `start`, and gives back its value. Panics where none does."""
        index = bisect_right(self._mins, start) - 1
        demand(index >= 0, f"no range starts at {start:#x}")
        leaf = self._leaves[index]
        inside = bisect_left(leaf.starts, start)
        demand(inside < len(leaf.starts) and leaf.starts[inside] == start, f"no range starts at {start:#x}")
        self._count -= 1
        value = leaf.values[inside]
        del leaf.starts[inside], leaf.ends[inside], leaf.values[inside]
        if leaf.starts:
            self._mins[index] = leaf.starts[0]
        else:
            del self._leaves[index], self._mins[index]
        for changed in self._leaves[index : index + 2]:
            changed.widest = -1
        return value

    def find_hole(
        self, length: int, cursor: int, *, gap: int = 0, residue: int = 0, modulus: int = 1, high: int | None = None
    ) -> int | None:
        """The first address at or above `cursor` where `length` bytes fit. None: nowhere from there on.

        `gap` bytes stay free towards each neighbour (none towards the land's edges); the address is
        congruent to `residue` modulo `modulus` (a power of two); with `high`, it ends below that.
        """
        cursor, high = max(cursor, self.low), self.high if high is None else high
        first = max(0, bisect_right(self._mins, cursor) - 1)
        end = self._leaves[first - 1].ends[-1] if first else self.low
        for index in range(first, len(self._leaves)):
            leaf = self._leaves[index]
            if index > first and self._widest(index) < length:
                end = leaf.ends[-1]
                continue
            skip = max(0, bisect_right(leaf.starts, cursor) - 1) if index == first else 0
            if skip:
                end = leaf.ends[skip - 1]
            for inside in range(skip, len(leaf.starts)):
                top = leaf.starts[inside] - gap
                at = max(end + gap if end > self.low else end, cursor)
                at += (residue - at) & (modulus - 1)
                if at + length <= min(top, high):
                    return at
                end = leaf.ends[inside]
        at = max(end + gap if end > self.low else end, cursor)
        at += (residue - at) & (modulus - 1)
        return at if at + length <= high else None

    def _widest(self, index: int) -> int:
        leaf = self._leaves[index]
        if leaf.widest < 0:
            end = self._leaves[index - 1].ends[-1] if index else self.low
            leaf.widest = max(start - before for start, before in zip(leaf.starts, [end, *leaf.ends[:-1]], strict=True))
        return leaf.widest


class Space(Generic[T]):
    """A land's bookkeeping, the next-fit search in it, and the obstacles found there.

    The search goes on from where the last one ended, so that a stale address faults instead of
    showing somebody else's bytes. An obstacle is what somebody else has mapped in the land (Linux
    said EEXIST): it is passed over, until space would otherwise be called exhausted.
    """

    __slots__ = ("_gap", "_high", "_obstacles", "besides", "cursor", "tree")

    def __init__(self, low: int, high: int, *, gap: int = 0, search_below: int | None = None) -> None:
        """Ranges of [low, high), `gap` bytes apart; the search stays below `search_below` (by default high)."""
        self.tree: Bookkeeping[T] = Bookkeeping(low, high)
        self._obstacles: Bookkeeping[tuple[int, int]] = Bookkeeping(low, high)
        self._gap = gap
        self._high = high if search_below is None else search_below
        self.cursor = low
        #: Where something else ends that has a byte of [start, end); None: nothing has.
        self.besides: Callable[[int, int], int | None] = lambda start, end: None

    def find(self, length: int, residue: int = 0, modulus: int = 1) -> int | None:
        """Where `length` bytes fit, from the cursor on and around; the cursor then stands behind them.

        None: nowhere.
        """
        for start in dict.fromkeys((self.cursor, self.tree.low)):
            at: int | None = start
            while at is not None:
                at = self.tree.find_hole(length, at, gap=self._gap, residue=residue, modulus=modulus, high=self._high)
                if at is None:
                    break
                obstacle = self._obstacles.overlap(at, at + length)
                beyond = obstacle[1] if obstacle is not None else self.besides(at, at + length)
                if beyond is None:
                    self.cursor = at + length + self._gap
                    return at
                at = beyond
        return None

    def hole_end(self, address: int) -> int:
        """How far the hole at `address` can be used: to the next range (less the gap), obstacle, or the end."""
        after, obstacle = self.tree.following(address), self._obstacles.following(address)
        ends = [self._high, *([after[0] - self._gap] if after else []), *([obstacle[0]] if obstacle else [])]
        return min(ends)

    def note_obstacle(self, start: int, end: int) -> None:
        """Marks [start, end) as taken by somebody else, as far as it lies in the land; with those beside it, it is one.

        Where there are too many, those before it are forgotten: they may be gone, or else are found again.
        """
        start, end = max(start, self.tree.low), min(end, self.tree.high)
        if start >= end:
            return
        if len(self._obstacles) >= OBSTACLES:
            self.drop_obstacles()
        while (known := self._obstacles.overlap(start - 1, end + 1)) is not None:
            self._obstacles.remove(known[0])
            start, end = min(start, known[0]), max(end, known[1])
        self._obstacles.add(start, end, (start, end))

    def drop_obstacles(self) -> bool:
        """Forgets every obstacle (they may be gone); whether there were any."""
        had = len(self._obstacles) > 0
        self._obstacles = Bookkeeping(self.tree.low, self.tree.high)
        return had
