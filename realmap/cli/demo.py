"""`realmap demo`: runs the demo, and shows what it found: tables on a terminal, plain lines in a pipe, or JSON."""

from __future__ import annotations

import sys

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from realmap.cli.output import Seconds, require_writable, show_json
from realmap.cli.top import require_terminal, require_textual
from realmap.errors import KernelError
from realmap.lab import demo as lab


@click.command()
@click.argument("files", nargs=-1, type=click.Path(exists=True, dir_okay=False, readable=True))
@click.option("--json", "as_json", is_flag=True, help="Everything that was found, as JSON.")
@click.option("--trace", metavar="FILE", help="Trace it: a file for ui.perfetto.dev or chrome://tracing.")
@click.option("--top", is_flag=True, help="Under `realmap top`, each mirror kept for a while, to be seen.")
@click.option("--pace", type=Seconds(0, 3600), default=1.0, help="With --top: for so many seconds; by default 1.")
def demo(files: tuple[str, ...], as_json: bool, trace: str | None, top: bool, pace: float) -> None:
    """Watch a kernel process mirror-map the memory of user processes, and check every byte.

    Each FILE is loaded by a user process of its own; the kernel digests it, and odd ranges of it, in
    place. Without FILES, some that every Python installation has. Exit status 1 if anything does not hold.

    Example: realmap demo /etc/services
    """
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    try:
        planned = lab.plan(files or lab.default_files())
    except (OSError, KernelError) as error:
        raise click.ClickException(str(error)) from None
    if trace is not None:
        require_writable(trace)
    report = _watched(planned, trace, pace) if top else _run(console, planned, trace, as_json)
    if as_json:
        show_json(report)
    else:
        render(console, report)
    sys.exit(0 if report.ok else 1)


def _watched(planned: list[lab.FileReport], trace: str | None, pace: float) -> lab.Report:
    """Under the live view. ClickException: it cannot be shown, or was left before the end."""
    require_terminal()
    require_textual()
    from realmap.cli.top.demo import watch

    report = watch(planned, trace, pace)
    if report is None:
        raise click.ClickException("the demo was left before its end, so there is no report")
    return report


def _run(console: Console, planned: list[lab.FileReport], trace: str | None, quiet: bool) -> lab.Report:
    """With a bar for how far it is."""
    total = sum(len(file.checks) for file in planned)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task("mirroring", total=total)
        return lab.run(planned, lambda check: progress.advance(task), trace)


def _mark(ok: bool) -> str:
    return "[green]ok[/]" if ok else "[bold red]WRONG[/]"


def render(console: Console, report: lab.Report) -> None:
    """The report for people: a table on a terminal, a line for each check in a pipe."""
    for file in report.files:
        parts = f"in segments of {file.fragment}" if file.fragment else "in one segment"
        console.print(f"[bold]{escape(file.path)}[/]: {file.size} bytes {parts}, loaded by process {file.pid}")
        if console.is_terminal:
            console.print(_table(file, console.width))
        else:
            for check in file.checks:
                console.print(_line(check))
    if report.killed is not None:
        killed = report.killed
        console.print(
            f"owner {killed.pid} killed with SIGKILL (exit code {killed.exitcode}) while the kernel held its mirror: "
            f"refcount {killed.refcounts[0]} → {killed.refcounts[1]}, {killed.length} bytes read afterwards: "
            + _mark(killed.ok)
        )
    left = ", ".join(f"{name} {count}" for name, count in report.balance.items())
    console.print(f"left in the end: {left}: " + _mark(not any(report.balance.values())))
    checks = [check for file in report.files for check in file.checks]
    same = [check.same_frames for check in checks]
    if None in same:
        console.print("page frame numbers are shown to root only: that they are the same was not looked at")
    right = sum(check.ok for check in checks)
    console.print(
        f"{right} of {len(checks)} ranges, {sum(check.length for check in checks)} bytes digested in place: "
        + _mark(report.ok)
    )


def _line(check: lab.Check) -> str:
    refs = "→".join(map(str, check.refcounts))
    return (
        f"  [{check.offset}:{check.offset + check.length}] UserLand {check.user_address:#x} KernelLand "
        f"{check.kernel_address:#x} page offset {check.page_offset:#x} segments {check.segments} refcount {refs} "
        f"same frames {_same(check)} sha256 {check.digest[:16]} {_mark(check.ok)}"
    )


def _same(check: lab.Check) -> str:
    return {True: "yes", False: "no", None: "?"}[check.same_frames]


#: Columns that only a wide terminal has room for.
WIDE = 140


def _table(file: lab.FileReport, width: int) -> Table:
    table = Table(box=None, pad_edge=True)
    wide = width >= WIDE
    names = [
        "offset",
        "bytes",
        "UserLand",
        "KernelLand",
        *(["page offset", "segments"] if wide else []),
        "refs",
        "frame",
    ]
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for name in [*(["sha256"] if wide else []), ""]:
        table.add_column(name, no_wrap=True)
    for check in file.checks:
        frame = check.frames[0][0] if check.frames else None
        same = {True: "same", False: "OTHER", None: "?"}[check.same_frames]
        same += f" ({frame:#x})" if wide and frame is not None else ""
        cells = [str(check.offset), str(check.length)]
        cells += [f"[cyan]{check.user_address:#x}[/]", f"[magenta]{check.kernel_address:#x}[/]"]
        cells += [f"{check.page_offset:#x}", str(check.segments)] if wide else []
        cells += ["→".join(map(str, check.refcounts)), same]
        cells += [check.digest[:16]] if wide else []
        table.add_row(*cells, _mark(check.ok))
    return table
