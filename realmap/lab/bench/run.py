"""One run of the bench: its kernels, its programs, and what it has found so far."""

from __future__ import annotations

import contextlib
import functools
import importlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from realmap.errors import KernelError
from realmap.lab.bench import machine, programs
from realmap.lab.bench.measure import Absent, Contender, Plan, Race, spread, unsteady
from realmap.lab.bench.programs import Program
from realmap.lab.bench.report import FORM, Figure, Missing, Reached, Report
from realmap.system import KernelHandle, boot
from realmap.user.process import Process
from realmap.wire.messages import VERSION

GROUPS = ("access", "call", "many", "make", "attach", "touch", "handover", "scale", "serve", "sync")
QUICK = Plan(rounds=9, batch_ns=2_000_000, race_seconds=0.35)
FULL = Plan(rounds=25, batch_ns=8_000_000, race_seconds=5.0)
#: Of dropped mirrors, what the kernel with kept windows keeps. Bytes.
KEPT = 1 << 30


class Bench(contextlib.ExitStack):
    """What the groups measure with. What it starts ends with it."""

    def __init__(self, groups: Sequence[str], quick: bool, say: Callable[[str], None]) -> None:
        super().__init__()
        self.quick = quick
        self.plan = QUICK if quick else FULL
        self.say = say
        self.report = Report(FORM, VERSION, list(groups), quick, machine.facts())
        self._peers: dict[str, Program] = {}
        self._limits = programs.limits()
        self._kernels: dict[tuple[Any, ...], tuple[KernelHandle, Process]] = {}

    @functools.cached_property
    def floor(self) -> Program:
        """The C floor, built at its first use."""
        return self.enter_context(contextlib.closing(programs.floor()))

    def peer(self, name: str) -> Program:
        """A peer by its name, started at its first use."""
        if name not in self._peers:
            self._peers[name] = self.enter_context(contextlib.closing(programs.peer(name)))
        return self._peers[name]

    def kernel(self, **options: Any) -> tuple[KernelHandle, Process]:
        """A kernel with the bench's handlers and these options of `boot`, and this process as its user; each once."""
        key = tuple(options.items())
        if key not in self._kernels:
            from realmap.lab.bench.handlers import HANDLERS  # needs numpy

            kernel = self.enter_context(boot(syscalls=HANDLERS, **options))
            self._kernels[key] = kernel, self.enter_context(kernel.connect())
        return self._kernels[key]

    def race(
        self,
        group: str,
        contenders: Sequence[Contender],
        size: int | None = None,
        work: str | None = None,
        plan: Plan | None = None,
    ) -> Race:
        """Runs some contenders against each other, and notes what came out, against the limits of the project too."""
        race = Race(contenders, plan or self.plan)
        self.report.figures += race.figures(group, size, work)
        for missing in race.missing:
            self.missing(missing.what, missing.why)
        for limit in self._limits:
            if limit.floor is not None and (limit.group, limit.size, limit.work) == (group, size, work):
                absent = [name for name in (limit.name, limit.floor) if name not in race]
                if absent:
                    reached = Reached(limit.what, limit.limit, None, why=f"{absent[0]} was left out")
                else:
                    ours, theirs = race.time(limit.name).median, race.time(limit.floor).median
                    reached = Reached(limit.what, limit.limit, race.ratio(limit.name, limit.floor), ours, theirs)
                self.report.reach.append(reached)
        return race

    def note(self, group: str, name: str, work: str, values: Sequence[float], unit: str = "") -> None:
        """Notes what was measured outside of a race, as far as it goes against a limit, too."""
        found = spread(values)
        figure = Figure(group, name, None, work, None, found, None, len(values), 1, unsteady(found), unit)
        self.report.figures.append(figure)
        for limit in self._limits:
            if limit.floor is None and (limit.group, limit.work, limit.name) == (group, work, name):
                self.report.reach.append(Reached(limit.what, limit.limit, found, unit=unit))

    def missing(self, what: str, why: str) -> None:
        """Notes once that something was left out; where there is no `why`, nobody expected it."""
        found = Missing(what, why)
        if why and found not in self.report.missing:
            self.report.missing.append(found)


def run(groups: Sequence[str] = (), *, quick: bool = False, say: Callable[[str], None] = lambda what: None) -> Report:
    """Measures the `groups` (all of them by default), and tells by `say` what it is at.

    ValueError: there is no such group. Absent: numpy is not installed.
    """
    chosen = [group for group in GROUPS if group in groups or not groups]
    unknown = sorted(set(groups) - set(GROUPS))
    if unknown:
        raise ValueError(f"no bench is named {', '.join(unknown)}; there are {', '.join(GROUPS)}")
    try:
        importlib.import_module("numpy")
    except ImportError:
        raise Absent("the bench needs numpy: pip install 'realmap[bench]'") from None
    disturbance = machine.Disturbance()
    start = time.monotonic()
    with Bench(chosen, quick, say) as bench:
        for group in chosen:
            try:
                importlib.import_module(f"realmap.lab.bench.{group}").measure(bench)
            except (KernelError, Absent) as error:
                bench.missing(group, str(error))
    report = bench.report
    report.seconds = round(time.monotonic() - start, 1)
    report.doubts = disturbance.doubts()
    unsteady = sum(figure.unsteady for figure in report.figures)
    if unsteady:
        report.doubts.append(
            f"{unsteady} of {len(report.figures)} figures are unsteady (marked ~): their middle 80 % is wider than "
            "half of the median; run it again on a quieter machine before leaning on one"
        )
    return report
