"""`realmap segments`: what memory there is in a kernel, and who holds it."""

from __future__ import annotations

import click

from realmap.cli.output import Column, json_option, show, show_json
from realmap.cli.target import BOUND, control, kernel_option
from realmap.observe import tables

COLUMNS = [
    Column("serial", "number"),
    Column("index", "number"),
    Column("inode", "number"),
    Column("length", "bytes"),
    Column("resident", "bytes"),
    Column("huge", "bytes", optional=True),
    Column("refcount", "number"),
    Column("name", optional=True),
    Column("holders"),
]


@click.command(epilog=BOUND)
@kernel_option
@json_option
def segments(path: str | None, as_json: bool) -> None:
    """Show a kernel's segments of shared memory, and everyone who holds a reference to them.

    Frames (serial) are one segment or several (index); the references are to the frames. resident: bytes that take
    memory, a dash where that cannot be told; huge: bytes that huge pages back; name: of those that others can open.

    Example: realmap segments | grep 'process 3'
    """
    with control(path) as kernel:
        rows = tables.segments(kernel.snapshot())
    if as_json:
        show_json(rows)
        return
    show(COLUMNS, [[*(getattr(row, column.name) for column in COLUMNS[:-1]), "; ".join(row.holders)] for row in rows])
