"""`realmap maps`: the mappings of one process, in the books and in Linux."""

from __future__ import annotations

import click

from realmap.cli.output import Column, json_option, show, show_json
from realmap.cli.target import BOUND, control, kernel_option
from realmap.observe.maps import view

COLUMNS = [
    Column("address", "hex"),
    Column("length", "bytes"),
    Column("type"),
    Column("rights"),
    Column("offset", "hex", spare=3),
    Column("refcount", "number", spare=2),
    Column("resident", "bytes", spare=5),
    Column("shared", "bytes", spare=6),
    Column("segments", spare=4),
    Column("linux"),
]


@click.command(epilog=BOUND)
@click.argument("pid", type=int)
@kernel_option
@json_option
def maps(pid: int, path: str | None, as_json: bool) -> None:
    """Show what process PID has mapped: the kernel's books beside what Linux has there.

    offset: where in its frames it starts; refcount: of these frames; resident, shared: bytes that this process has
    touched, and what of them others have, too (a dash where Linux has joined it with its neighbour); segments: their
    inodes (on a terminal, of many the first, and how many); linux: "agrees", "changing" (it was at work meanwhile), or
    what Linux has there instead. Of a service also the windows of pages that it was lent, as it says, and that it keeps
    for their next use. For the kernel's own pid: KernelLand with its mirrors, its kept windows, and the
    anchors that keep its page tables.

    Example: realmap maps 4711
    """
    with control(path) as kernel:
        rows = view(kernel.snapshot, pid)
    if as_json:
        show_json(rows)
        return
    values = [[getattr(row, column.name) for column in COLUMNS] for row in rows]
    show(COLUMNS, values, "it has no mappings that the kernel knows of")
