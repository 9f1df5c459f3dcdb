"""`realmap doctor`: what this machine allows, and what to change where it matters."""

from __future__ import annotations

import sys

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from realmap.ambient import VARIABLE
from realmap.cli.output import json_option, show_json
from realmap.cli.target import named
from realmap.observe.doctor import BAD, OK, WARN, Check, examine
from realmap.observe.words import harmless

COLOURS = {OK: "green", WARN: "yellow", BAD: "bold red"}


@click.command()
@click.option(
    "--kernel",
    "path",
    metavar="PATH",
    help=f"Look at this one. By default ${VARIABLE}, or all in the private directory.",
)
@json_option
def doctor(path: str | None, as_json: bool) -> None:
    """Look at what this machine allows realmap, and say what to change where that matters.

    ok: as it should be; warn: it works, with less than there could be; bad: realmap does not work here (exit status 1).
    Nothing is changed. What is tried (a segment, a huge page) is given back. A kernel that is stopped, or has been in
    one handler for a second, is named; none is asked, so that this waits for none.

    Example: realmap doctor | grep -v ^ok
    """
    found = examine(named(path))
    if as_json:
        show_json(found)
    elif sys.stdout.isatty():
        render(Console(highlight=False), found)
    else:
        for each in found:
            advice = f"; {each.advice}" if each.advice else ""
            click.echo(f"{each.status:4}  {each.name}: {harmless(each.found)}{advice}")
    sys.exit(any(each.status == BAD for each in found))


def render(console: Console, found: list[Check]) -> None:
    """A line for each check, its advice below it."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    for each in found:
        table.add_row(Text(each.status, COLOURS[each.status]), Text(each.name, "bold"), Text(harmless(each.found)))
        if each.advice:
            table.add_row("", "", Text(f"→ {each.advice}", COLOURS[each.status]))
    console.print(table)
