"""What a stress run found: typed, as JSON, and as JUnit's XML."""

from __future__ import annotations

import math
import shlex
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

import msgspec
from ddsketch import DDSketch, LogarithmicMapping

FORM = 3
#: Latencies are counted in the bins of a DDSketch: right to 1 %, and those of several runs are added exactly.
BINS = LogarithmicMapping(relative_accuracy=0.01)
#: A kernel's memory that rises by less over the second half of a run is no growth: arenas, and logs. Bytes.
RISE = 16 << 20


#: What a mix takes for what is not given.
DEFAULTS: dict[str, dict[str, float]] = {
    "quick": {"users": 4, "seconds": 10.0},
    "soak": {"users": 4, "seconds": 600.0, "kill": 0.001, "truncate": 0.001},
    "storm": {"users": 8, "seconds": 60.0, "kill": 0.02, "truncate": 0.01},
}


class Options(msgspec.Struct, frozen=True):
    """What was asked for. `kill`, `truncate`: the share of steps at which a user is killed, or loses a segment."""

    mix: str = "quick"
    users: int = 4
    seconds: float | None = 10.0
    #: Steps in all, over the users; None where time is what ends it.
    ops: int | None = None
    seed: int = 0
    kill: float = 0.0
    truncate: float = 0.0
    full: bool = False
    #: The socket of the kernel; None for one of its own.
    kernel: str | None = None
    #: Names of what works against the users; "all": all that the machine allows.
    antagonists: tuple[str, ...] = ()
    #: A module with operations of one's own.
    operations: str | None = None

    def command(self) -> str:
        """The command that repeats this run."""
        parts = ["realmap stress", self.mix, f"--users {self.users} --seed {self.seed}"]
        parts.append(f"--ops {self.ops}" if self.ops is not None else f"--seconds {self.seconds:g}")
        for name, share in (("kill", self.kill), ("truncate", self.truncate)):
            parts += [f"--{name} {share:g}"] if share or DEFAULTS[self.mix].get(name) else []
        parts += ["--full"] if self.full else []
        parts += [f"--kernel {self.kernel}"] if self.kernel else []
        parts += [f"--antagonists {','.join(self.antagonists)}"] if self.antagonists else []
        parts += [f"--ops {shlex.quote(self.operations)}"] if self.operations else []
        return " ".join(parts)


def bucket(nanoseconds: int) -> int:
    """The bucket that a latency is counted in."""
    return BINS.key(max(1, nanoseconds))


class Antagonism(msgspec.Struct):
    """What one antagonist did: its steps, and why there are no (or no more) of them, None where nothing kept it."""

    count: int = 0
    why: str | None = None
    #: The bytes that it found wrong.
    wrong: str | None = None


class Operation(msgspec.Struct):
    """What became of an operation of one's own: how often it was done, and failed; the longest took seconds."""

    count: int = 0
    failures: int = 0
    longest: float = 0.0
    #: Of the first failure.
    why: str | None = None

    def fail(self, why: str) -> None:
        self.failures += 1
        self.why = self.why or why

    def add(self, other: Operation) -> None:
        self.count += other.count
        self.failures += other.failures
        self.longest = max(self.longest, other.longest)
        self.why = self.why or other.why


class Tally(msgspec.Struct):
    """What one user process did so far."""

    #: {kind: {bucket: how often}}
    latencies: dict[str, dict[int, int]] = {}
    longest: dict[str, int] = {}
    steps: int = 0
    verified: int = 0
    refused: int = 0
    truncated: int = 0
    #: Truncations that came after a handler had read everything; the user's own access was told of them.
    unnoticed: int = 0
    forked: int = 0
    #: Of its choices so far, in order.
    choices: str = ""
    #: It is about to be killed, as chosen.
    dying: bool = False
    #: It did all that was asked of it.
    done: bool = False
    #: An operation has left something: another life goes on, without it.
    again: bool = False
    failure: str | None = None
    #: That is about bytes.
    wrong: bool = False
    operations: dict[str, Operation] = {}
    #: Calls that ended in ServerDied.
    lost: int = 0
    #: By kind: why there is none here.
    skipped: dict[str, str] = {}


class Kind(msgspec.Struct, frozen=True):
    """Steps of one kind: how many, how many a second, how long they took (seconds); `buckets`: {bucket: how often}."""

    count: int
    per_second: float
    p50: float
    p99: float
    longest: float
    buckets: dict[int, int] = {}


def kind_of(buckets: Mapping[int, int], seconds: float, longest: float) -> Kind:
    """The summary of what was counted in so many seconds, by one user or by many machines."""
    count = sum(buckets.values())
    # A bucket may reach beyond the longest of its times.
    p50, p99 = (min(longest, percentile(buckets, share)) for share in (0.5, 0.99))
    return Kind(count, count / seconds, p50, p99, longest, dict(buckets))


class Slope(msgspec.Struct, frozen=True):
    """How a number moved over the later part of the run: a second, with its standard error; and where it was."""

    per_second: float
    error: float
    first: float
    last: float

    @property
    def rises(self) -> bool:
        """Whether it goes up by more than noise explains."""
        return self.per_second > 4 * self.error

    def grows(self, name: str) -> bool:
        """Whether it goes up by more than arenas, logs and the users of the moment explain."""
        return self.rises and self.last - self.first > self.allowed(name)

    def allowed(self, name: str) -> float:
        return RISE if name == "rss" else 0.2 * self.first + 100

    def in_words(self, name: str) -> str:
        """For people: the kernel's memory in KiB, the others as they are."""
        what, unit, size = ("memory", " KiB", 1024) if name == "rss" else (f"number of {name}", "", 1)
        rate, error = (float(f"{each / size:.3g}") for each in (self.per_second, self.error))
        return (
            f"the kernel's {what} {'grows' if self.grows(name) else 'does not grow'}: "
            f"{self.first / size:.0f} → {self.last / size:.0f}{unit} over the second half of the run, "
            f"{rate:+g}{unit} a second (± {error:g}); "
            f"growth is more than {self.allowed(name) / size:.0f}{unit}"
        )


class Report(msgspec.Struct, frozen=True):
    """A whole run. `failures` says in words what did not hold; the run is ok where there are none."""

    form: int
    version: str
    options: Options
    replay: str
    seconds: float
    kinds: dict[str, Kind]
    steps: int
    bytes_verified: int
    #: kills, truncations, refused (no room), forks, servers died.
    injected: dict[str, int]
    unnoticed_truncations: int
    #: Of the kernel: rss (bytes), maps, descriptors, threads; over the second half of the run.
    slopes: dict[str, Slope]
    audits: int
    #: By user: of all its choices, in order, over its lives.
    choices: list[str]
    failures: list[str]
    #: By name: how often each was done, or why it was not.
    antagonists: dict[str, Antagonism] = {}
    #: One's own, by name.
    operations: dict[str, Operation] = {}
    #: By kind: why Linux does not allow it here.
    skipped: dict[str, str] = {}

    @property
    def ok(self) -> bool:
        return not self.failures


def summed(tallies: Sequence[Tally]) -> dict[str, Counter[int]]:
    """The latencies of several users together."""
    found: dict[str, Counter[int]] = defaultdict(Counter)
    for tally in tallies:
        for kind, buckets in tally.latencies.items():
            found[kind].update(buckets)
    return found


def percentile(buckets: Mapping[int, int], share: float) -> float:
    """The latency, in seconds, that `share` of those counted do not exceed."""
    sketch = DDSketch(BINS.relative_accuracy)
    for number, count in buckets.items():
        sketch.add(BINS.value(number), count)
    found = sketch.get_quantile_value(share)
    assert found is not None
    return found / 1e9


def slope(samples: Sequence[tuple[float, float]]) -> Slope:
    """By least squares; the error is that of the slope. (time in seconds, value)"""
    count = len(samples)
    if count < 3:
        only = samples[-1][1] if samples else 0.0
        return Slope(0.0, 0.0, only, only)
    times, values = zip(*samples, strict=True)
    rise, start = statistics.linear_regression(times, values)
    rest = sum((value - start - rise * at) ** 2 for at, value in samples)
    spread = count * statistics.pvariance(times)
    return Slope(rise, math.sqrt(rest / (count - 2) / spread), values[0], values[-1])


def junit(report: Report) -> bytes:
    """As JUnit's XML: a case for each thing that has to hold."""
    suite = ElementTree.Element("testsuite", name="realmap stress", time=f"{report.seconds:.3f}")
    cases = {"bytes": "wrong", "deaths": "died", "leaks": "left", "audit": "audit", "growth": "grows"}
    told: set[str] = set()
    failed = 0
    for name, word in cases.items():
        case = ElementTree.SubElement(suite, "testcase", classname="realmap.stress", name=name)
        for failure in [found for found in report.failures if word in found]:
            told.add(failure)
            failed += 1
            ElementTree.SubElement(case, "failure", message=failure).text = report.replay
    for failure in [found for found in report.failures if found not in told]:
        failed += 1
        case = ElementTree.SubElement(suite, "testcase", classname="realmap.stress", name="other")
        ElementTree.SubElement(case, "failure", message=failure).text = report.replay
    suite.set("tests", str(len(suite)))
    suite.set("failures", str(failed))
    return bytes(ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True))
