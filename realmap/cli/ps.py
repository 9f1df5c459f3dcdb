"""`realmap ps`: the user processes of a running kernel."""

from __future__ import annotations

import click

from realmap.cli.output import Column, json_option, show_records
from realmap.cli.target import BOUND, control, kernel_option
from realmap.observe import tables

COLUMNS = [
    Column("pid", "number"),
    Column("number", "number", spare=3),
    Column("uid", "number", spare=5),
    Column("mappings", "number", spare=1),
    Column("mapped", "bytes"),
    Column("frames", "bytes", spare=2),
    Column("handles", "number", spare=4),
    Column("calls", "number"),
    Column("running", optional=True),
    Column("waits_for", optional=True),
    Column("serves", optional=True),
    Column("program"),
]


@click.command(epilog=BOUND)
@kernel_option
@json_option
def ps(path: str | None, as_json: bool) -> None:
    """Show the user processes of a kernel.

    number: its name in the books; mapped: bytes of its mappings; frames: bytes of the frames that it made and that
    live, whoever holds them; handles: those it made; calls: those running in the kernel; running: which of them worker
    threads or services are at; waits_for: the pids of these services; serves: what it serves itself; program: what
    runs as that pid (what was spawned is called by its function), "gone" where it has just ended. --json has the limit
    of its frames as well.

    Example: realmap ps | awk '$4 > 100 {print $1}'
    """
    with control(path) as kernel:
        rows = tables.processes(kernel.snapshot())
    show_records(COLUMNS, rows, "no process is connected to it", as_json)
