"""`realmap snapshot`: a kernel's books at one moment: in words, as JSON, or as a drawing."""

from __future__ import annotations

import sys

import click

from realmap.cli.output import require_writable, show_json, show_records, write_files
from realmap.cli.ps import COLUMNS
from realmap.cli.stats import tell
from realmap.cli.target import BOUND, control, kernel_option
from realmap.observe import machine, shm, words
from realmap.observe.snapshot import Snapshot
from realmap.observe.svg import svg
from realmap.observe.tables import processes, programs
from realmap.wire.records import LentInfo, SeatInfo


@click.command(epilog=BOUND)
@kernel_option
@click.option("--machine", "whole", is_flag=True, help="With --svg: any processes of this machine that share memory.")
@click.option("--json", "as_json", is_flag=True, help="All of it, as JSON.")
@click.option("--svg", "svg_path", metavar="FILE", help="The address space as a drawing; - for standard output.")
def snapshot(path: str | None, whole: bool, as_json: bool, svg_path: str | None) -> None:
    """Take a kernel's books at one moment: processes, mappings, mirrors, segments and who holds them.

    The drawing has KernelLand with its live mirrors above, and a lane for each process below; ribbons tie each
    mirror to what it mirrors. It needs no script and nothing from elsewhere, and is light or dark as its page is.
    With --machine no kernel is needed: each segment that several processes have mapped is tied to all of them.

    Example: realmap snapshot --svg now.svg
    """
    if as_json and svg_path == "-":
        raise click.UsageError("--json and --svg - would both go to standard output; give --svg a file")
    if whole and (as_json or svg_path is None or path is not None):
        raise click.UsageError("--machine goes with --svg FILE alone; as data it is `realmap shm --json`")
    if svg_path not in (None, "-"):
        require_writable(str(svg_path))
    if whole:
        taken = machine.snapshot(shm.look())
    else:
        with control(path) as kernel:
            taken = kernel.snapshot()
    if as_json:
        show_json(taken)
    elif svg_path is None:
        render(taken)
    if svg_path == "-":
        click.echo(svg(taken, programs=programs(taken)).encode(), nl=False)
    elif write_files((svg_path, lambda: svg(taken, programs=programs(taken)).encode())):
        sys.exit(1)


def render(taken: Snapshot) -> None:
    """As `realmap stats` and `ps` show it, and a line for each service."""
    tell(taken)
    click.echo()
    show_records(COLUMNS, processes(taken), "no process is connected to it", False)
    pids = {process.number: process.pid for process in taken.processes}
    for seat in taken.seats:
        callers = sorted({pids[each.process] for each in taken.sessions if each.seat == seat.number})
        click.echo(
            _service(seat, pids[seat.process], callers, [each for each in taken.lent if each.seat == seat.number])
        )


def _service(seat: SeatInfo, pid: int, callers: list[int], lent: list[LentInfo]) -> str:
    names = ", ".join(map(words.harmless, seat.names))
    state = f"{seat.busy} of {words.counted(seat.threads, 'thread')} at work, {seat.waiting} waiting"
    shown = f"{words.counted(len(lent), 'window')} of {sum(each.length for each in lent)} bytes lent to it"
    who = f"called by pid {', '.join(map(str, callers))}" if callers else "called by nobody"
    return f"pid {pid} serves {names}: {state}, {shown}, {who}{', closing' * seat.closing}"
