"""`realmap stats`: a kernel's totals, once or again and again with rates; as text, JSON, or for Prometheus."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click
import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from realmap.cli.output import Column, json_option, plain, show_json, table, until_interrupted, watch_option
from realmap.cli.target import BOUND, control, kernel_option
from realmap.observe import words
from realmap.observe.control import Control
from realmap.observe.snapshot import Snapshot

#: Totals of what was done so far, which have a rate; the others say what there is.
DONE = (
    "calls",
    "failed",
    "mirrored",
    "mirrored_bytes",
    "copied_in",
    "copied_in_bytes",
    "copied_out",
    "copied_out_bytes",
    "late",
    "kept_hits",
    "kept_misses",
    "kept_evictions",
)
#: What of the totals has a limit, and which.
LIMITED = {
    "processes": "processes",
    "bytes": "memory_limit",
    "kept_bytes": "lazy_unmap",
}
TOTALS = [
    Column("what"),
    Column("now", "number"),
    Column("per second", "number", optional=True),
    Column("limit", "number"),
]
CALLS = [
    Column("calls", "number"),
    Column("failed", "number", spare=1),
    Column("per second", "number", optional=True),
    Column("p50", "seconds"),
    Column("p99", "seconds"),
    Column("longest", "seconds", spare=2),
    Column("blocking", spare=4),
    Column("servers", "number", optional=True, spare=3),
    Column("syscall"),
]
#: The columns of a line for each interval, in a pipe.
LINE = ("processes", "mappings", "mirrors", "bytes", "running", *DONE[:8])


#: Lines of the screen beside the rows: head, headings, what there is no room for.
AROUND = 9


class Rates(msgspec.Struct, frozen=True):
    """Two moments of a kernel: the totals of the later one, and what was done in between, per second.

    `calls`: by syscall.
    """

    time: float
    seconds: float
    stats: dict[str, int]
    rates: dict[str, float]
    calls: dict[str, float]


def rates_between(before: Snapshot, now: Snapshot, seconds: float) -> Rates:
    """What was done between two snapshots of a kernel that were taken so many seconds apart."""
    counts = {call.name: call.count for call in before.calls}
    return Rates(
        now.time,
        seconds,
        now.stats,
        {name: (now.stats[name] - before.stats[name]) / seconds for name in DONE},
        {call.name: (call.count - counts.get(call.name, 0)) / seconds for call in now.calls},
    )


@click.command(epilog=BOUND)
@watch_option("1", " with rates, until Ctrl-C; a line each in a pipe.")
@click.option("--prometheus", is_flag=True, help="In the text format that Prometheus reads.")
@kernel_option
@json_option
def stats(watch: float | None, prometheus: bool, path: str | None, as_json: bool) -> None:
    """Show a kernel's totals: what there is, what was done so far, and what the limits are.

    A per-second figure is what was done since the look before. Of each syscall: how long its handler took, so far
    (p50, p99: what half of the calls, and 99 of 100, did not exceed; in seconds in a pipe); servers: how many services
    of processes answer it, all of them together (none: the kernel does). The totals `calls`, `failed`, `late`, mirrored
    and copied are of the kernel's own handlers; services are in the table by syscall alone, with the last 256 names
    whose servers have gone. With --json --watch, a JSON object per line.

    Example: realmap stats --watch 5 | tee my.log
    """
    if prometheus and (watch is not None or as_json):
        raise click.UsageError("--prometheus goes with neither --watch nor --json: Prometheus asks by itself")
    with control(path) as kernel:
        if watch is not None:
            with until_interrupted() as is_over:
                _watch(kernel, watch, as_json, is_over)
            return
        now = kernel.snapshot()
    if prometheus:
        click.echo(_exposition(now), nl=False)
    elif as_json:
        show_json({"time": now.time, "stats": now.stats, "limits": now.limits, "calls": now.calls})
    else:
        tell(now)


def tell(now: Snapshot) -> None:
    """The totals, and each syscall."""
    if sys.stdout.isatty():
        console = Console(highlight=False)
        console.print(_screen(now, None, console.width))
    else:
        click.echo(plain(TOTALS, _totals(now, None, False)))
        click.echo("\n" + plain(CALLS, _calls(now, None)))


def _exposition(now: Snapshot) -> str:
    try:
        from realmap.cli.prometheus import exposition
    except ImportError:
        raise click.ClickException("--prometheus needs prometheus_client: pip install 'realmap[metrics]'") from None
    return exposition(now)


def _watch(kernel: Control, interval: float, as_json: bool, is_over: Callable[[float], bool]) -> None:
    before = kernel.snapshot()
    if sys.stdout.isatty() and not as_json:
        console = Console(highlight=False)
        first = _screen(before, None, console.width, console.height)
        with Live(first, console=console, auto_refresh=False, screen=True) as live:
            while not is_over(interval):
                now = kernel.snapshot()
                found = rates_between(before, now, _apart(before, now))
                live.update(_screen(now, found, console.width, console.height), refresh=True)
                before = now
        return
    if not as_json:
        click.echo("  ".join(["time", *(name + "/s" * (name in DONE) for name in LINE)]))
    while not is_over(interval):
        now = kernel.snapshot()
        found = rates_between(before, now, _apart(before, now))
        if as_json:
            show_json(found, line=True)
        else:
            click.echo(_line(found))
        before = now


def _apart(before: Snapshot, now: Snapshot) -> float:
    return max(now.time - before.time, 1e-3)  # somebody may set the clock


def _line(found: Rates) -> str:
    cells = [found.rates[name] if name in DONE else found.stats[name] for name in LINE]
    return "  ".join([f"{found.time:.3f}", *(f"{cell:.0f}" for cell in cells)])


def _limit(now: Snapshot, name: str) -> Any:
    return getattr(now.limits, LIMITED[name]) if name in LIMITED else None


def _totals(now: Snapshot, found: Rates | None, in_words: bool) -> list[list[Any]]:
    def amount(name: str, value: Any) -> Any:
        if value is None:
            return None
        if in_words and name.endswith("bytes"):
            return words.size(value)
        return f"{value:.0f}"

    rates = found.rates if found is not None else {}
    return [
        [name, amount(name, value), amount(name, rates.get(name)), amount(name, _limit(now, name))]
        for name, value in now.stats.items()
    ]


def _calls(now: Snapshot, found: Rates | None) -> list[list[Any]]:
    return [
        [
            call.count,
            call.failed,
            None if found is None else f"{found.calls[call.name]:.0f}",
            call.p50,
            call.p99,
            call.longest,
            "yes" if call.blocking else "no",
            call.servers,
            call.name,
        ]
        for call in sorted(now.calls, key=lambda call: (-call.count, call.name))
    ]


def _screen(now: Snapshot, found: Rates | None, width: int, height: int | None = None) -> Group:
    """All of it; where so many lines are too few: the totals that are not zero, and the syscalls called most."""
    totals, calls = _totals(now, found, True), _calls(now, found)
    called = [row for row in calls if row[0]]
    rest = len(calls) - len(called)
    notes = [f"{words.counted(rest, 'syscall')} without a call"] if rest else []
    if height is not None and len(totals) + len(called) > height - AROUND:
        some = [row for row in totals if now.stats[row[0]]]
        most = max(1, height - AROUND - min(len(some), (height - AROUND) // 2))
        left = len(called[most:])
        called = called[:most]
        some = some[: max(1, height - AROUND - len(called))]
        notes.append(f"no room for {len(totals) - len(some)} totals and {words.counted(left, 'syscall')} more")
        totals = some
    tables: list[Any] = [table(TOTALS, totals, width), Text(), *([table(CALLS, called, width)] if called else [])]
    return Group(Text(f"kernel {now.pid} at {now.path}"), Text(), *tables, *map(Text, notes))
