"""What commands print: tables for people on a terminal, plain columns in a pipe, JSON for programs; and files.

In a pipe there is no colour, no box and nothing cut off: a line of headings, then a line for each row, its cells
without blanks inside (but for the last one), so that grep and awk have an easy time. Empty cells are a dash.
"""

from __future__ import annotations

import math
import os
import re
import stat
import sys
from collections.abc import Iterable, Sequence
from itertools import compress
from typing import Any, NamedTuple

import click
import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from realmap.observe import words

#: A longer cell sticks out, and does not push all others aside.
WIDEST = 40
json_option = click.option("--json", "as_json", is_flag=True, help="Everything as JSON.")


class Seconds(click.FloatRange):
    """A time within bounds; nan, which compares with nothing, is none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """UsageError: no number, or outside of the bounds."""
        found = float(super().convert(value, param, ctx))
        if math.isnan(found):
            self.fail(f"{value!r} is not a time in seconds.", param, ctx)
        return found


def harmless(text: object) -> str:
    """`text` as it may be shown: what is not printable (control characters, as in a name) is escaped."""
    return words.harmless(str(text))


class Column(NamedTuple):
    """A heading, and what is below it: "text", "number", "hex" (an address), or "bytes" (with units on a terminal).

    `optional`: a terminal has no room for it where no row has any.
    """

    name: str
    kind: str = "text"
    optional: bool = False


def _cell(value: Any, kind: str, in_words: bool) -> str:
    if value is None or value == "" or value == []:
        return "-"
    if isinstance(value, list):
        return ",".join(harmless(each) for each in value)
    if kind == "hex":
        return f"{value:#x}"
    if kind == "bytes" and in_words:
        return words.size(value)
    return harmless(value)


def plain(columns: Sequence[Column], rows: Iterable[Sequence[Any]]) -> str:
    """The lines for a pipe."""
    cells = [[column.name for column in columns]]
    for row in rows:
        found = [_cell(value, column.kind, False) for value, column in zip(row, columns, strict=True)]
        cells.append([cell.replace(" ", "\\x20") for cell in found[:-1]] + found[-1:])
    widths = [min(WIDEST, max(map(len, column))) for column in zip(*cells, strict=True)]
    left = [column.kind == "text" for column in columns]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if is_left else cell.rjust(width)
            for cell, width, is_left in zip(line, widths, left, strict=True)
        ).rstrip()
        for line in cells
    )


def table(columns: Sequence[Column], rows: Iterable[Sequence[Any]]) -> Table:
    """The table for a terminal."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    rows = list(rows)
    told = [not column.optional or any(row[at] for row in rows) for at, column in enumerate(columns)]
    for column in compress(columns, told):
        made.add_column(Text(column.name), justify="left" if column.kind == "text" else "right", overflow="fold")
    for row in rows:
        # Text, not str: a name is no markup.
        cells = zip(row, columns, strict=True)
        made.add_row(*(Text(_cell(value, column.kind, True)) for value, column in compress(cells, told)))
    return made


def show(columns: Sequence[Column], rows: Iterable[Sequence[Any]]) -> None:
    """Prints rows: as a table on a terminal, in plain columns elsewhere."""
    if sys.stdout.isatty():
        Console(highlight=False).print(table(columns, rows))
    else:
        click.echo(plain(columns, rows))


def show_json(value: Any, *, line: bool = False) -> None:
    """Prints a structure as JSON, on one `line` or more.

    What JSON allows in a text and a terminal acts upon (DEL, C1) is escaped, too.
    """
    encoded = msgspec.json.encode(value)
    text = (encoded if line else msgspec.json.format(encoded)).decode()
    click.echo(re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", text))


def require_writable(path: str) -> None:
    """Before the run, not after it. A file that was not there is not left behind."""
    there = os.path.lexists(path)
    try:
        # A pipe is not opened: its reader would take the end of this look for the end.
        if there and stat.S_ISFIFO(os.stat(path).st_mode):
            return
        with open(path, "ab"):
            pass
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror}") from None
    if not there:
        os.unlink(path)
