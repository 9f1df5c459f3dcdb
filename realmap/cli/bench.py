"""`realmap bench`: runs the bench, and shows what it found: tables, JSON, a picture."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import groupby

import click
import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from realmap.cli.output import progress, require_matplotlib, require_writable, write_files
from realmap.lab import bench as lab
from realmap.lab.bench.access import PAGES, WORKS
from realmap.lab.bench.measure import Absent
from realmap.lab.bench.report import Figure, Reached, Report, Spread
from realmap.observe import words

WORDS = {**WORKS, PAGES: "write a byte in every page"}
PICTURES = (".png", ".svg")


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...", type=click.Choice(lab.GROUPS))
@click.option("--quick", is_flag=True, help="Fewer sizes and rounds: under a minute.")
@click.option("--json", "json_path", metavar="FILE", help="Everything that was found, as JSON.")
@click.option("--plot", "plot_path", metavar="FILE", help="The curves of `access`, as .png or .svg.")
def bench(names: tuple[str, ...], quick: bool, json_path: str | None, plot_path: str | None) -> None:
    """Measure what reaching memory, calling and making cost on this machine.

    NAME is access, call, many, make, attach, touch, handover, scale, serve or sync; all of them by default. Times are
    medians of interleaved rounds with the 10th and 90th percentile; "x floor" compares with the named floor in the same
    rounds.

    Example: realmap bench --quick access --plot access.svg
    """
    require_writable(json_path, plot_path)
    if plot_path is not None:
        _require_plot(plot_path, names)
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    with progress() as say:
        try:
            report = lab.run(names, quick=quick, say=say)
        except Absent as error:
            raise click.ClickException(str(error)) from None
    try:
        render(console, report)
    finally:  # also where nobody reads it to its end
        failed = write_files(
            (json_path, lambda: msgspec.json.format(msgspec.json.encode(report)) + b"\n"),
            (plot_path, lambda: _plot(report, str(plot_path))),
        )
    sys.exit(bool(failed))


def _plot(report: Report, path: str) -> bytes:
    from realmap.cli.plot import plot

    return plot(report, path.rpartition(".")[2])


def _require_plot(path: str, names: tuple[str, ...]) -> None:
    if not path.endswith(PICTURES):
        raise click.ClickException(f"a plot is a .png or an .svg file, not {path}")
    if names and "access" not in names:
        raise click.ClickException("--plot draws the curves of access: add access to the names")
    require_matplotlib("--plot")


def _ratio(ratio: Spread | None) -> str:
    return "" if ratio is None else f"{words.three(ratio.median)} ({words.three(ratio.p10)}-{words.three(ratio.p90)})"


def _found(reached: Reached) -> str:
    if reached.found is None:
        return escape(reached.why)
    if reached.unit:
        return f"{_amount(reached.found.median, reached.unit)}  ≤ {_amount(reached.limit, reached.unit)}"
    ours, theirs = words.duration(reached.ours or 0), words.duration(reached.theirs or 0)
    return f"{ours} / {theirs} = {_ratio(reached.found)}  ≤ {reached.limit:g}"


def _amount(number: float, unit: str) -> str:
    return {"ns": words.duration, "B": words.size, "": words.three}[unit](number)


def render(console: Console, report: Report) -> None:
    machine = report.machine
    console.print(
        f"{machine['cpu']}, {machine['cpus']} CPUs{', virtual' if machine['virtual'] else ''}, "
        f"Linux {machine['linux']} ({machine['architecture']}), {machine['python']}, "
        f"{machine['page']} byte pages, huge pages for shared memory: {machine['shmem_huge']}, "
        f"governor {machine['governor']}, load {machine['load']}; "
        f"{'quick, ' if report.quick else ''}{report.seconds} s"
    )
    for (group, size, work), figures in groupby(report.figures, key=lambda each: (each.group, each.size, each.work)):
        title = [group, *([words.size(size)] if size else []), *([WORDS.get(work, work)] if work else [])]
        console.print()
        if console.is_terminal:
            console.print(_table(", ".join(title), figures))
        else:
            console.print(", ".join(title))
            for figure in figures:
                console.print("  " + "  ".join(cell for cell in _cells(figure) if cell))
    if report.reach:
        console.print("\n[bold]what the project holds itself to[/] (medians in this run)")
        for reached in report.reach:
            mark = {True: "[green]met[/]", False: "[bold red]MISSED[/]", None: "not measured"}[reached.met]
            console.print(f"  {mark}  {reached.what}: {_found(reached)}")
    for missing in report.missing:
        console.print(f"left out: {missing.what}: {escape(missing.why)}")
    for doubt in report.doubts:
        console.print(f"[yellow]note:[/] {doubt}")
    for sentence in report.sentences:
        console.print(f"\n[bold]{sentence}[/]")


def _cells(figure: Figure) -> list[str]:
    took = figure.time
    return [
        f"{figure.name}{' ~' if figure.unsteady else ''}",
        _amount(took.median, figure.unit),
        f"{_amount(took.p10, figure.unit)} - {_amount(took.p90, figure.unit)}",
        _ratio(figure.ratio),
        f"x {figure.floor}" if figure.ratio is not None else "",
    ]


def _table(title: str, figures: Iterable[Figure]) -> Table:
    rows = [_cells(figure) for figure in figures]
    compared = any(row[-1] for row in rows)
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in ("median", "p10 - p90", *(["x floor"] if compared else [])):
        table.add_column(name, justify="right", no_wrap=True)
    if compared:
        table.add_column("floor")
    for row in rows:
        table.add_row(*row[: len(table.columns)])
    return table
