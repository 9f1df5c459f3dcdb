"""`realmap segments`: what memory there is in a kernel, and who holds it."""

from __future__ import annotations

import sys
from itertools import groupby
from typing import Any

import click

from realmap.cli.output import Column, json_option, show, show_json
from realmap.cli.target import BOUND, control, kernel_option
from realmap.observe import tables

COLUMNS = [
    Column("serial", "number"),
    Column("index", "number", spare=2),
    Column("inode", "number", spare=3),
    Column("length", "bytes"),
    Column("resident", "bytes", spare=1),
    Column("huge", "bytes", optional=True, spare=1),
    Column("refcount", "number"),
    Column("name", optional=True),
    Column("holders", "lines"),
]


@click.command(epilog=BOUND)
@kernel_option
@json_option
def segments(path: str | None, as_json: bool) -> None:
    """Show a kernel's segments of shared memory, and everyone who holds a reference to them.

    Frames (serial) are one segment or several (index); the references are to the frames. A terminal shows frames, and
    the first few of their holders; a pipe a line for each segment, and everyone. resident: bytes that take memory, a
    dash where that cannot be told; huge: bytes that huge pages back; name: of those that others can open.

    Example: realmap segments | grep 'process 3'
    """
    with control(path) as kernel:
        rows = tables.segments(kernel.snapshot())
    if as_json:
        show_json(rows)
        return
    values = [[getattr(row, column.name) for column in COLUMNS] for row in rows]
    if sys.stdout.isatty():
        values = [_together(list(each)) for _, each in groupby(values, key=lambda row: row[0])]
    show(COLUMNS, values, "it has no segments: nothing is mapped")


def _together(rows: list[list[Any]]) -> list[Any]:
    """The segments of the same frames in one row: which they are, and their bytes in all."""
    if len(rows) == 1:
        return rows[0]
    serial, index, inode, *sizes, refcount, name, holders = map(list, zip(*rows, strict=True))
    totals = [None if None in size else sum(size) for size in sizes]
    return [serial[0], index, inode, *totals, refcount[0], name[0], holders[0]]
