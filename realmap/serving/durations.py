"""How long something took, each time: what the core has counted, that of others as well, and percentiles of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import accumulate, chain

from realmap._core import Durations as Counted

#: Each power of two (ns) is so many buckets, so what is read is right to 6 %; and so many there are.
PER_OCTAVE, BUCKETS = 8, 496


class Durations:
    """Counted, so that their number costs nothing."""

    __slots__ = ("_counted", "_others", "since")

    def __init__(self) -> None:
        self._counted = Counted()
        #: `since(began)`: it has ended now, and began at that time of the monotonic clock, in nanoseconds.
        self.since: Callable[[int], None] = self._counted.since
        #: What was added, as `counts`.
        self._others = [0]

    def counts(self) -> list[int]:
        """The longest (ns), then each bucket that has any, and how many."""
        return _sum(self._counted.counts(), self._others)

    def add(self, counts: list[int]) -> None:
        """Those of another one as well. ValueError: no `Durations` has such."""
        buckets, numbers = counts[1::2], counts[2::2]
        if len(buckets) != len(numbers) or min(counts, default=-1) < 0 or max(buckets, default=0) >= BUCKETS:
            raise ValueError(f"counts that no Durations made: {counts[:20]}")
        self._others = _sum(self._others, counts)

    def summary(self) -> tuple[float, float, float] | tuple[None, None, None]:
        """In seconds: what half of them, and 99 of 100, did not exceed, and the longest; None where there are none."""
        longest, *pairs = self.counts()
        total = sum(pairs[1::2])
        if not total:
            return None, None, None
        ranks = (total + 1) // 2, total - total // 100
        half, most = (min(_at(rank, pairs), longest) / 1e9 for rank in ranks)
        return half, most, longest / 1e9


def _sum(one: list[int], other: list[int]) -> list[int]:
    summed: Counter[int] = Counter()
    for counts in (one, other):
        for bucket, number in zip(counts[1::2], counts[2::2], strict=True):
            summed[bucket] += number
    return [max(one[0], other[0]), *chain.from_iterable(sorted(summed.items()))]


def _at(rank: int, pairs: list[int]) -> float:
    """The middle of the bucket that the one of this rank is in, in nanoseconds."""
    reached = zip(pairs[::2], accumulate(pairs[1::2]), strict=True)
    bucket = next(bucket for bucket, so_far in reached if so_far >= rank)
    if bucket < 2 * PER_OCTAVE:
        return float(bucket)
    return (bucket % PER_OCTAVE + PER_OCTAVE + 0.5) * 2.0 ** (bucket // PER_OCTAVE - 1)
