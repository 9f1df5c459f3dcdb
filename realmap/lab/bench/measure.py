"""Rounds of several contenders, interleaved: what slows the machine down for a moment slows all of them down.

    round 1   floor a  b  floor c  …      each a batch of as many operations as fill `batch_ns`
    round 2   floor a  b  floor c  …
    …
    at last   floor       floor           so that every contender has its floor before and after it

Ratios are of the medians; their spread is taken round by round, against the mean of the floor's neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median, quantiles
from timeit import Timer
from typing import Any, NamedTuple

import msgspec

from realmap.lab.bench.report import Figure, Missing, Spread

#: Runs so many operations and answers how many nanoseconds they took.
Batch = Callable[[int], int]
#: The middle 80 % of the rounds may be this far apart, in medians, before a figure is called unsteady.
STEADY = 0.5
#: At most so many operations a batch: a bare system call would otherwise be repeated for ever.
MOST = 20_000


def timed(operation: str | Callable[[], object], **names: Any) -> Batch:
    """A batch of that function, or statement about `names`; garbage is collected meanwhile, as in the peers."""
    timer = Timer(operation, "import gc; gc.enable()", time.perf_counter_ns, names)
    return lambda count: int(timer.timeit(count))


class Absent(Exception):
    """A contender that is not to be had here; the text says why."""


class Plan(NamedTuple):
    """How long to measure: rounds, nanoseconds a batch, and seconds after which no more rounds are begun."""

    rounds: int
    batch_ns: int
    race_seconds: float
    #: Even where that takes longer.
    least_rounds: int = 5


class Contender(NamedTuple):
    """Something to be measured, and the name of the contender that it is compared with.

    A batch has `fixed` operations; by default as many as fill the plan's time.
    """

    name: str
    batch: Batch
    floor: str | None = None
    fixed: int | None = None


def spread(values: Sequence[float]) -> Spread:
    if len(values) < 2:
        return Spread(values[0], values[0], values[0])
    tenths = quantiles(values, n=10, method="inclusive")
    return Spread(median(values), tenths[0], tenths[8])


def unsteady(found: Spread) -> bool:
    """Whether the middle 80 % of the rounds lie too far apart to rely on the median."""
    return found.p90 - found.p10 > STEADY * found.median


class Race:
    """One run of some contenders against each other."""

    def __init__(self, contenders: Sequence[Contender], plan: Plan) -> None:
        """Runs it. Who is `Absent` is left out (`missing`)."""
        self.contenders: list[Contender] = []
        self.missing: list[Missing] = []
        self._samples: dict[str, list[float]] = {}
        self._counts: dict[str, int] = {}
        for contender in contenders:
            try:
                self._counts[contender.name] = contender.fixed or self._calibrate(contender.batch, plan)
            except Absent as error:
                self.missing.append(Missing(contender.name, str(error)))
            else:
                self.contenders.append(contender)
                self._samples[contender.name] = []
        floors = {contender.floor for contender in self.contenders}
        end = time.monotonic() + plan.race_seconds
        self._rounds = 0
        for done in range(plan.rounds):
            if done >= plan.least_rounds and time.monotonic() > end:
                break
            for contender in list(self.contenders):
                self._run(contender)
            self._rounds += 1
        for contender in list(self.contenders):
            if contender.name in floors:
                self._run(contender)

    @staticmethod
    def _calibrate(batch: Batch, plan: Plan) -> int:
        batch(1)  # warms up, and is not looked at
        count = 1
        while True:
            took = max(1, batch(count))
            if took * 4 >= plan.batch_ns or count >= MOST:
                return max(1, min(MOST, count * plan.batch_ns // took))
            count = min(MOST, count * 4)

    def _run(self, contender: Contender) -> None:
        count = self._counts[contender.name]
        try:
            contender.batch(max(1, count // 8))  # awake and warm again: the others had the CPUs since
            self._samples[contender.name].append(contender.batch(count) / count)
        except Absent as error:  # it has died: half a race is none
            self.contenders.remove(contender)
            del self._samples[contender.name]
            self.missing.append(Missing(contender.name, str(error)))

    def __contains__(self, name: str | None) -> bool:
        return name in self._samples

    def time(self, name: str) -> Spread:
        """Nanoseconds for one operation."""
        return spread(self._samples[name])

    def ratio(self, name: str, floor: str) -> Spread:
        """How much longer `name` takes than `floor`, by their medians; the spread, than right before and after it.

        KeyError: one of them was left out.
        """
        ours, theirs = self._samples[name], self._samples[floor]
        order = [contender.name for contender in self.contenders]
        first = 0 if order.index(floor) < order.index(name) else -1
        found = []
        for at, mine in enumerate(ours[: self._rounds]):
            around = [theirs[near] for near in (at + first, at + first + 1) if 0 <= near < len(theirs)]
            found.append(mine / (sum(around) / len(around)))
        return msgspec.structs.replace(spread(found), median=median(ours) / median(theirs))

    def figures(self, group: str, size: int | None = None, work: str | None = None) -> list[Figure]:
        found = []
        for name, _, floor, _ in self.contenders:
            took, floor = self.time(name), floor if floor in self else None
            ratio = self.ratio(name, floor) if floor is not None else None
            rounds, count = len(self._samples[name]), self._counts[name]
            found.append(Figure(group, name, size, work, floor, took, ratio, rounds, count, unsteady(took)))
        return found
