"""What a campaign found: a report of each host, and what all of them give together."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import msgspec

from realmap.lab.campaign.plan import Plan
from realmap.lab.stress.report import Kind, kind_of

FORM = 1
OK, FAILED, LOST = "ok", "failed", "lost"


class Host(msgspec.Struct):
    """One host. `report` is that of its last run, as the command itself gives it, `earlier` are those before it."""

    name: str
    #: OK, FAILED (it found something, or could not run) or LOST (its end was not heard of).
    state: str = OK
    why: str = ""
    #: Its last run, to be typed there.
    replay: str = ""
    #: What is odd about it: a clock that is off.
    note: str = ""
    seconds: float = 0.0
    machine: dict[str, str | int | float | bool] = {}
    report: Any = None
    earlier: list[Any] = []

    @property
    def reports(self) -> list[Any]:
        """Those of all its runs that had one, in order."""
        return [*self.earlier, *([self.report] if self.report is not None else [])]


class Report(msgspec.Struct):
    """All of it. `kinds`: of all steps on all hosts of a `stress`, their latencies added up."""

    form: int
    version: str
    plan: Plan
    ok: bool
    seconds: float
    hosts: list[Host]
    kinds: dict[str, Kind] = {}


def merged(hosts: Sequence[Host]) -> dict[str, Kind]:
    """What users everywhere did: counts are added by bucket, and percentiles are of the sum, none is a mean."""
    buckets: dict[str, Counter[int]] = defaultdict(Counter)
    longest: dict[str, float] = defaultdict(float)
    seconds = 0.0
    for host in hosts:
        for report in host.reports:
            seconds += report["seconds"]
            for name, kind in msgspec.convert(report["kinds"], dict[str, Kind], strict=False).items():
                buckets[name].update(kind.buckets)
                longest[name] = max(longest[name], kind.longest)
    running = sum(bool(host.reports) for host in hosts)
    return {name: kind_of(found, seconds / running, longest[name]) for name, found in sorted(buckets.items())}


def junit(report: Report) -> bytes:
    """As JUnit's XML: a case for each host; who is lost is an error, who failed a failure."""
    name = f"realmap campaign {report.plan.command}"
    suite = ElementTree.Element("testsuite", name=name, time=f"{report.seconds:.3f}", tests=str(len(report.hosts)))
    for state, element in ((FAILED, "failure"), (LOST, "error")):
        suite.set(f"{element}s", str(sum(host.state == state for host in report.hosts)))
    for host in report.hosts:
        case = ElementTree.SubElement(suite, "testcase", classname=name, name=host.name, time=f"{host.seconds:.3f}")
        if host.state != OK:
            element = "failure" if host.state == FAILED else "error"
            ElementTree.SubElement(case, element, message=host.why).text = host.replay
    return bytes(ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True))
