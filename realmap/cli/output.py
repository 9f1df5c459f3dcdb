"""What commands print: tables for people on a terminal, plain columns in a pipe, JSON for programs; and files.

In a pipe there is no colour, no box and nothing cut off: a line of headings, then a line for each row, its cells
without blanks inside (but for the last one), so that grep and awk have an easy time. Empty cells are a dash.

What only one of these needs (rich: a terminal; msgspec: JSON) is imported there: in a pipe that is most of the time.
"""

from __future__ import annotations

import math
import os
import re
import signal
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import compress, repeat
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from realmap.lab import PROGRESS
from realmap.observe import words
from realmap.observe.words import harmless

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

#: A longer cell sticks out, and does not push all others aside.
WIDEST = 48
#: Of a text at least so much stays on one line of a narrow terminal; of a list so many are shown.
NARROWEST, MANY = 16, 3
#: Kinds of columns that begin at the left.
LEFT = ("text", "lines")
#: How a pipe has what a terminal shows with units.
PLAIN: dict[str, Callable[[Any], str]] = {"hex": "{:#x}".format, "seconds": "{:.9f}".format}
json_option = click.option("--json", "as_json", is_flag=True, help="Everything as JSON.")


def watch_option(default: str, more: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """--watch [SECONDS], by default so many; `more`: the end of what --help says of it."""
    said = f"Again every so many seconds (by default {default}){more}"
    kind = Seconds(min=0.05, max=86_400)
    return click.option("--watch", is_flag=False, flag_value=default, type=kind, metavar="[SECONDS]", help=said)


class Seconds(click.FloatRange):
    """A time within bounds; nan, which compares with nothing, is none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """UsageError: no number, or outside of the bounds."""
        found = float(super().convert(value, param, ctx))
        if math.isnan(found):
            self.fail(f"{value!r} is not a time in seconds.", param, ctx)
        return found


class Column(NamedTuple):
    """A heading, and what is below it: "text", "number", "hex" (an address), "bytes" or "seconds" (both with units on a
    terminal), "lines" (a list that a terminal shows one below the other).

    `optional`: a terminal has no room for it where no row has any. `spare`: where a terminal is too narrow, the columns
    with the highest numbers are left out.
    """

    name: str
    kind: str = "text"
    optional: bool = False
    spare: int = 0


def _cell(value: Any, kind: str) -> str:
    """As a terminal shows it."""
    if value is None or value == "" or value == []:
        return "-"
    if isinstance(value, list):
        return _listed([harmless(each) for each in value], kind)
    if kind == "hex":
        return f"{value:#x}"
    if kind == "bytes":
        return words.size(value)
    if kind == "seconds":
        return words.duration(1e9 * value)
    return harmless(value)


def _listed(each: list[str], kind: str) -> str:
    """The first of many."""
    if kind != "lines":
        return ",".join(each) if len(each) <= MANY else f"{each[0]},… ({len(each)})"
    more = [f"and {len(each) - MANY} more"] if len(each) > MANY + 1 else each[MANY:]
    return "\n".join([*each[:MANY], *more])


def _plain_cells(values: Sequence[Any], kind: str) -> list[str]:
    """Those of a column, for a pipe. There may be thousands: what can be done, or asked, of all at once is."""
    joint, said = "; " if kind == "lines" else ",", PLAIN.get(kind, str)
    types = set(map(type, values))
    if list in types:
        values = [joint.join(map(str, value)) if isinstance(value, list) else value for value in values]
    if said is not str or type(None) in types:
        values = ["" if value is None or value == "" else said(value) for value in values]
    cells = [cell or "-" for cell in map(str, values)]
    return cells if "".join(cells).isprintable() else [*map(harmless, cells)]


def plain(columns: Sequence[Column], rows: Iterable[Sequence[Any]]) -> str:
    """The lines for a pipe."""
    rows, shown = list(rows), []
    for at, column in enumerate(columns):
        cells = _plain_cells([row[at] for row in rows], column.kind)
        if at < len(columns) - 1 and " " in "".join(cells):
            cells = [cell.replace(" ", "\\x20") for cell in cells]
        cells.insert(0, column.name)
        width = min(WIDEST, max(map(len, cells)))
        shown.append(map(str.ljust if column.kind in LEFT else str.rjust, cells, repeat(width)))
    return "\n".join(map(str.rstrip, map("  ".join, zip(*shown, strict=True))))


def _fitting(columns: Sequence[Column], cells: Sequence[Sequence[str]], width: int) -> dict[int, int]:
    """Which columns a terminal of that width has room for, and how much each needs at least."""
    needs = {}
    for at, column in enumerate(columns):
        widest = max(len(line) for cell in (column.name, *(row[at] for row in cells)) for line in cell.split("\n"))
        # A long text may be folded, nothing else: half a number is none.
        needs[at] = min(widest, WIDEST if column.kind == "lines" else NARROWEST) if column.kind in LEFT else widest
    for at in sorted(needs, key=lambda at: -columns[at].spare):
        if columns[at].spare and sum(needs.values()) + 2 * len(needs) - 2 > width:
            del needs[at]
    return needs


def table(columns: Sequence[Column], rows: Iterable[Sequence[Any]], width: int = 1000) -> Table:
    """The table for a terminal of so many letters a line; it says what there was no room for."""
    from rich.table import Table
    from rich.text import Text

    rows = list(rows)
    told = [not column.optional or any(row[at] for row in rows) for at, column in enumerate(columns)]
    columns = list(compress(columns, told))
    cells = [
        [_cell(value, column.kind) for value, column in zip(compress(row, told), columns, strict=True)] for row in rows
    ]
    needs = _fitting(columns, cells, width)
    missing = [column.name for at, column in enumerate(columns) if at not in needs]
    caption = f"no room for: {', '.join(missing)}" if missing else None
    made = Table(box=None, pad_edge=False, header_style="bold", caption=caption, caption_justify="left")
    for at, least in needs.items():
        if columns[at].kind in LEFT:
            made.add_column(Text(columns[at].name), overflow="fold", min_width=min(least, NARROWEST))
        else:
            made.add_column(Text(columns[at].name), justify="right", no_wrap=True, min_width=least)
    for row in cells:
        made.add_row(*(Text(row[at]) for at in needs))  # Text, not str: a name is no markup
    return made


def show(columns: Sequence[Column], rows: Sequence[Sequence[Any]], none: str = "") -> None:
    """Prints rows: as a table on a terminal (`none`: what is said there of no rows), in plain columns elsewhere."""
    if sys.stdout.isatty():
        from rich.console import Console

        console = Console(highlight=False)
        console.print(table(columns, rows, console.width) if rows or not none else none)
    else:
        click.echo(plain(columns, rows))


def show_records(columns: Sequence[Column], records: Sequence[object], none: str, as_json: bool) -> None:
    """The same of records: in a column is what they have by its name. With `as_json`: all of them, as JSON."""
    if as_json:
        show_json(records)
    else:
        show(columns, [[getattr(each, column.name) for column in columns] for each in records], none)


def print_table(console: Console, columns: Sequence[Column], rows: Sequence[Sequence[Any]]) -> None:
    """Prints rows where other things are printed as well: as a table on a terminal, in plain columns elsewhere."""
    console.print(table(columns, rows, console.width) if console.is_terminal else plain(columns, rows))


def show_json(value: Any, *, line: bool = False) -> None:
    """Prints a structure as JSON, on one `line` or more.

    What JSON allows in a text and a terminal acts upon (DEL, C1) is escaped, too.
    """
    import msgspec

    encoded = msgspec.json.encode(value)
    text = (encoded if line else msgspec.json.format(encoded)).decode()
    click.echo(re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", text))


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """What is to be called with a line about how it goes: on a terminal the newest stands there, on stderr."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    if PROGRESS in os.environ:
        yield lambda line: click.echo(line, err=True)
    elif console.is_terminal:
        with console.status("starting") as shown:
            yield shown.update
    else:
        yield lambda line: None


def require_writable(*paths: str | None) -> None:
    """Each that is given: before the run, not after it. A file that was not there is not left behind."""
    for path in filter(None, paths):
        _require_writable(path)


def _require_writable(path: str) -> None:
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


def write_files(*files: tuple[str | None, Callable[[], bytes]]) -> list[str]:
    """Each that has a path. Those that cannot be written are returned, and named on stderr; one that was not there
    before is not left behind.
    """
    failed = []
    for path, make in files:
        if path is None:
            continue
        there, data = os.path.lexists(path), make()
        try:
            with open(path, "wb") as file:
                file.write(data)
        except OSError as error:
            click.echo(f"Error: cannot write {path}: {error.strerror}", err=True)
            failed.append(path)
            if not there:
                with suppress(OSError):
                    os.unlink(path)
    return failed


def require_matplotlib(option: str) -> None:
    """ClickException: it is not installed, and this option needs it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise click.ClickException(f"{option} needs matplotlib: pip install 'realmap[bench]'") from None


@contextmanager
def until_interrupted() -> Iterator[Callable[[float], bool]]:
    """Waits so many seconds, and says whether Ctrl-C or SIGTERM has come: that is how a watch ends, and no error."""
    from realmap.host import signals

    over = signals.Flag()
    with signals.handled(lambda *_: over.set(), signal.SIGINT, signal.SIGTERM):
        yield over.wait
