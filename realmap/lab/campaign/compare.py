"""Two campaigns: what became slower or faster, and what of it is more than noise.

    each run ──▶ a number for each kind ──▶ less the machine's own pace in that run ──▶ B against A, beside how much
                                            (C programs; plain memory)                  runs differ among themselves

Runs are what is drawn again (the bootstrap): how they differ is the noise that a change has to stand out of. All
intervals hold at once (by the largest of the studentized deviations of all kinds, draw by draw): a hundred kinds do not
make a false alarm likelier than one does. The pace is a kind of its own; where the machines are the same, it is told,
and is no claim.
"""

from __future__ import annotations

import math
import operator
import random
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from realmap.lab.campaign.report import FORM, Host, Report
from realmap.observe import words

#: Of runs on each side: of fewer nobody knows how much they differ by themselves.
FEWEST = 5
DRAWS = 4000
#: That all intervals hold.
CONFIDENCE = 0.999
#: Runs that agree better than this (a share) do so by chance.
RESOLUTION = 0.002
#: What differs between any two runs.
MOVING = ("load",)
PACE = "the machine's pace"


class Change(msgspec.Struct, frozen=True):
    """Of one kind: nanoseconds in A and B, and B / A - 1, the pace taken out, with its interval.

    `effect` is Cliff's delta: the share of pairs of runs in which B took longer, less that in which A did.
    """

    name: str
    before: float
    after: float
    change: float
    low: float
    high: float
    effect: float


class Comparison(msgspec.Struct, frozen=True):
    """`slower`, `faster`: the kinds whose change is more than noise, and the threshold at least. `unknown`: those of
    which it may be either, for their interval goes beyond the threshold to both sides.
    """

    changes: list[Change]
    slower: list[str]
    faster: list[str]
    unknown: list[str]
    #: What the machines are, where they differ: {fact: (values in A, values in B)}.
    differs: dict[str, tuple[list[str], list[str]]]
    notes: list[str]


class Unlike(ValueError):
    """These two cannot be compared, and why."""


#: What the runs of one host took (of all of them, where A and B had others), in A and in B, as logarithms.
Sides = tuple[list[float], list[float]]


class Run(NamedTuple):
    """One run: of which host, on which side, and what each kind took, as a logarithm."""

    host: str
    side: int
    took: dict[str, float]


def load(path: str) -> Report:
    """The report in that file. Unlike: it is none of a campaign. OSError: it cannot be read."""
    with open(path, "rb") as file:
        data = file.read()
    try:
        found = msgspec.json.decode(data, type=dict[str, Any])
        if "hosts" in found and found.get("form") != FORM:  # else it is no campaign's: of one run, say
            form = found.get("form")
            raise Unlike(f"{path} is a report of form {form}, and this realmap reads form {FORM}: make it anew")
        return msgspec.json.decode(data, type=Report)
    except msgspec.DecodeError as error:
        raise Unlike(f"{path} is no report of `realmap campaign … --json`: {error}") from None


def _took(command: str, report: Any) -> Iterator[tuple[str, float]]:
    """Of one run, by kind, in nanoseconds. Of a bench the fastest tenth of the rounds: what disturbs only ever adds."""
    if command == "stress":
        for name, kind in report["kinds"].items():
            yield f"{name} p50", kind["p50"] * 1e9
            yield f"{name} p99", kind["p99"] * 1e9
        return
    for figure in report["figures"]:
        if figure["unit"] == "ns":
            size = words.size(figure["size"]) if figure["size"] else None
            yield (
                f"{' '.join(filter(None, [figure['group'], size, figure['work']]))}: {figure['name']}",
                figure["time"]["p10"],
            )


def _is_pace(name: str) -> bool:
    """Whether it is of the machine alone: the bench's C programs, and a user's own memory."""
    return ": C " in name or name in ("check p50", "write p50")


def _runs(reports: Sequence[Report]) -> list[Run]:
    """Host by host where both had the same hosts, and each some runs: how hosts differ is no noise then."""
    a, b = ({host.name for host in report.hosts if len(host.reports) > 1} for report in reports)
    by_host = a == b == {host.name for report in reports for host in report.hosts}
    found = []
    for side, report in enumerate(reports):
        for host in report.hosts:
            for run in host.reports:
                took = {name: math.log(value) for name, value in _took(report.plan.command, run) if value > 0}
                found.append(Run(host.name if by_host else "", side, took))
    return found


def _kinds(runs: Sequence[Run]) -> dict[str, list[Sides]]:
    """What every run measured, the pace taken out, by kind and host."""
    names = sorted(set.intersection(*(set(run.took) for run in runs)))
    middle = {name: statistics.fmean(run.took[name] for run in runs) for name in names}
    paces = [name for name in names if _is_pace(name)]
    found: dict[str, dict[str, Sides]] = defaultdict(lambda: defaultdict(lambda: ([], [])))
    for run in runs:
        pace = statistics.median(run.took[name] - middle[name] for name in paces) if paces else 0.0
        for name in names:
            found[name][run.host][run.side].append(run.took[name] - pace)
        if paces:
            found[PACE][run.host][run.side].append(pace)
    return {name: list(hosts.values()) for name, hosts in found.items()}


def _moments(values: Sequence[float]) -> tuple[float, float]:
    """Its mean, and the square of the mean's standard error."""
    mean = statistics.fmean(values)
    squares = sum(map(operator.mul, values, values)) / len(values)
    return mean, max(0.0, squares - mean * mean) / (len(values) - 1)


def _estimate(hosts: Sequence[Sides]) -> tuple[float, float]:
    """The mean difference, over the hosts, and its standard error."""
    mean = variance = 0.0
    for a, b in hosts:
        (before, noise), (after, more) = _moments(a), _moments(b)
        mean += after - before
        variance += noise + more
    return mean / len(hosts), max(RESOLUTION, math.sqrt(variance) / len(hosts))


def _centred(values: Sequence[float]) -> list[float]:
    mean = statistics.fmean(values)
    return [value - mean for value in values]


def _width(kinds: Sequence[list[Sides]]) -> float:
    """How far off, in standard errors, the worst of all kinds is, but for 1 draw of 1000, where nothing has changed."""
    draw = random.Random(1)  # the same files, the same answer
    noise = [[(_centred(a) + _centred(b), len(a), len(b)) for a, b in hosts] for hosts in kinds]
    largest = []
    for _ in range(DRAWS):
        worst = 0.0
        for hosts in noise:
            drawn = [(draw.choices(pool, k=a + b), a) for pool, a, b in hosts]
            mean, error = _estimate([(values[:a], values[a:]) for values, a in drawn])
            worst = max(worst, abs(mean) / error)
        largest.append(worst)
    return sorted(largest)[min(DRAWS - 1, int(CONFIDENCE * DRAWS))]


def _change(name: str, hosts: Sequence[Sides], width: float) -> Change:
    mean, error = _estimate(hosts)
    before, after = (math.exp(statistics.fmean(value for sides in hosts for value in sides[at])) for at in (0, 1))
    change, low, high = (math.expm1(mean + sign * width * error) for sign in (0, -1, 1))
    pairs = [(y > x) - (y < x) for a, b in hosts for x in a for y in b]
    return Change(name, before, after, change, low, high, sum(pairs) / len(pairs))


def compare(a: Report, b: Report, threshold: float) -> Comparison:
    """B against A. Unlike: they did different things, or have too few runs to tell a change from noise."""
    if a.plan.command != b.plan.command:
        raise Unlike(f"one is of {a.plan.command}, the other of {b.plan.command}")
    runs = _runs((a, b))
    counts = [sum(run.side == side for run in runs) for side in (0, 1)]
    if min(counts) < FEWEST:
        what = f"they have {counts[0]} and {counts[1]} runs: too few to tell a change from noise"
        raise Unlike(f"{what}; let both have {FEWEST} at least, better 10: --repeat 10")
    kinds = _kinds(runs)
    width = _width(list(kinds.values()))
    changes = [_change(name, hosts, width) for name, hosts in kinds.items()]
    differs = differences(a.hosts, b.hosts)
    claimed = [each for each in changes if abs(each.change) >= threshold and (each.low > 0 or each.high < 0)]
    unknown = [each.name for each in changes if each.low <= -threshold and each.high >= threshold]
    notes = []
    if unknown:
        notes.append(
            f"of {words.counted(len(unknown), 'kind')} it is not known: the runs differ too much among themselves"
        )
    if others := sorted(set().union(*(run.took for run in runs)) - set(kinds)):
        notes.append(f"left out, for not every run has them: {', '.join(others)}")
    if a.plan.arguments != b.plan.arguments:
        notes.append(f"they were asked for different things: {a.plan.arguments} and {b.plan.arguments}")
    if not differs:
        for each in [each for each in claimed if each.name == PACE]:
            claimed.remove(each)
            notes.append(
                f"the machine itself took {each.change:+.1%} in B: by chance, for it is the same; it is taken out"
            )
    return Comparison(
        changes,
        [each.name for each in claimed if each.change > 0],
        [each.name for each in claimed if each.change < 0],
        unknown,
        differs,
        notes,
    )


def differences(a: Sequence[Host], b: Sequence[Host]) -> dict[str, tuple[list[str], list[str]]]:
    """What the machines of one side are, and those of the other are not."""
    sides = [[host.machine for host in hosts if host.machine] for hosts in (a, b)]
    found = {}
    for fact in sorted({name for machines in sides for machine in machines for name in machine} - set(MOVING)):
        before, after = (sorted({str(machine.get(fact, "unknown")) for machine in machines}) for machines in sides)
        if before != after:
            found[fact] = (before, after)
    return found
