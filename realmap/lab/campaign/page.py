"""A campaign as one HTML file: its pictures are in it, and nothing is loaded."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

import msgspec

from realmap.lab.campaign.report import Host, Report
from realmap.lab.stress.report import Slope
from realmap.observe import words

STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; color: #222 }
table { border-collapse: collapse } td, th { padding: .2em .8em; text-align: left; border-bottom: 1px solid #ddd }
td { overflow-wrap: anywhere; vertical-align: top } .failed, .lost { color: #b00 } img { max-width: 100% }
"""
#: {row: {host: nanoseconds}}
Rows = dict[str, dict[str, float]]


def page(report: Report) -> bytes:
    root = Element("html", lang="en")
    head = SubElement(root, "head")
    SubElement(head, "meta", charset="utf-8")
    title = f"realmap campaign {report.plan.command}"
    SubElement(head, "title").text = title
    SubElement(head, "style").text = STYLE
    body = SubElement(root, "body")
    SubElement(body, "h1").text = f"{title}: {'ok' if report.ok else 'not ok'}"
    arguments = " ".join(report.plan.arguments)
    took = words.duration(report.seconds * 1e9)
    SubElement(body, "p").text = f"realmap {report.version} {report.plan.command} {arguments}, {took}"
    _table(
        body,
        ("host", "state", "runs", "why", "its last run"),
        [(host.name, host.state, len(host.reports), host.why or host.note, host.replay) for host in report.hosts],
        [host.state for host in report.hosts],
    )
    if report.kinds:
        SubElement(body, "h2").text = "All hosts together"
        head_of = ("step", "count", "per second", "p50", "p99", "longest")
        times = {name: (kind.p50, kind.p99, kind.longest) for name, kind in report.kinds.items()}
        _table(
            body,
            head_of,
            [
                (name, kind.count, words.count(kind.per_second), *(words.duration(took * 1e9) for took in times[name]))
                for name, kind in report.kinds.items()
            ],
        )
    for name, rows in _pictures(report).items():
        SubElement(body, "h2").text = name
        data = base64.b64encode(_dots(rows, [host.name for host in report.hosts])).decode()
        SubElement(body, "img", src=f"data:image/svg+xml;base64,{data}", alt=name)
    if report.kinds:
        _by_host(body, "What was done there", {host.name: _done(host) for host in report.hosts})
    _by_host(body, "The machines", {host.name: dict(sorted(host.machine.items())) for host in report.hosts})
    return b"<!DOCTYPE html>\n" + bytes(ElementTree.tostring(root, encoding="utf-8", method="html"))


def _table(body: Element, names: Sequence[str], rows: Sequence[Sequence[Any]], classes: Sequence[str] = ()) -> None:
    table = SubElement(body, "table")
    head = SubElement(table, "tr")
    for name in names:
        SubElement(head, "th").text = name
    for at, row in enumerate(rows):
        line = SubElement(table, "tr", {"class": classes[at]} if classes else {})
        for cell in row:
            SubElement(line, "td").text = str(cell)


def _by_host(body: Element, title: str, facts: Mapping[str, Mapping[str, Any]]) -> None:
    SubElement(body, "h2").text = title
    names = list(dict.fromkeys(name for found in facts.values() for name in found))
    _table(body, ("", *facts), [(name, *(found.get(name, "") for found in facts.values())) for name in names])


def _done(host: Host) -> dict[str, str]:
    """In all runs of a stress there: by the users, to them, and by each antagonist; how the last left the kernel."""
    counts: Counter[str] = Counter()
    why: dict[str, str] = {}
    for run in host.reports:
        counts.update({"steps": run["steps"], "bytes verified": run["bytes_verified"], "audits": run["audits"]})
        counts.update(run["injected"])
        for name, found in run["antagonists"].items():
            counts[f"antagonist {name}"] += found["count"]
            if found["why"]:
                why[f"antagonist {name}"] = f" ({found['why']})"
    done = {name: f"{count:,}{why.get(name, '')}" for name, count in counts.items()}
    slopes = msgspec.convert(run["slopes"], dict[str, Slope]) if host.reports else {}
    return done | {f"kernel: {name}": slope.in_words(name) for name, slope in slopes.items()}


def _pictures(report: Report) -> dict[str, Rows]:
    """By title: of a stress the steps' median and slowest percent, of a bench the figures of each group."""
    found: dict[str, Rows] = {}
    for host in report.hosts:
        if not host.reports:
            continue
        for title, row, value in _points(report.plan.command, host):
            found.setdefault(title, {}).setdefault(row, {})[host.name] = value
    return found


def _points(command: str, host: Host) -> list[tuple[str, str, float]]:
    """Of its last run that had a report."""
    run = host.reports[-1]
    if command == "stress":
        shares = {"p50": "How long a step takes: half of them take less", "p99": "99 of 100 take less"}
        return [(title, kind, found[p] * 1e9) for p, title in shares.items() for kind, found in run["kinds"].items()]
    return [
        (
            f"{figure['group']}: what one takes",
            " ".join(
                filter(None, [words.size(figure["size"]) if figure["size"] else "", figure["work"], figure["name"]])
            ),
            figure["time"]["median"],
        )
        for figure in run["figures"]
        if figure["unit"] == "ns"
    ]


def _dots(rows: Mapping[str, Mapping[str, float]], hosts: Sequence[str]) -> bytes:
    """As SVG: a line for each row, a dot for each host."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator

    names = list(rows)
    figure = Figure(figsize=(10, 1.2 + 0.22 * len(names)), layout="constrained")
    panel = figure.subplots()
    for host in hosts:
        points = [(rows[name][host], at) for at, name in enumerate(names) if host in rows[name]]
        if points:
            panel.plot(*zip(*points, strict=True), "o", label=host, alpha=0.7)
    panel.set(xscale="log", yticks=range(len(names)), yticklabels=names)
    panel.invert_yaxis()
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.minorticks_off()
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: EngFormatter("s")(value / 1e9)))
    panel.grid(alpha=0.3)
    if 1 < len(hosts) <= 10:
        figure.legend(loc="outside upper center", ncols=min(4, len(hosts)), fontsize="small")
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    return bytes(file.getvalue())
