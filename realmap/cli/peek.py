"""`realmap peek`: the memory of any process, once or again and again."""

from __future__ import annotations

import struct
import sys
import time
from collections.abc import Callable
from typing import Any

import click
from rich.console import Console
from rich.live import Live
from rich.text import Text

from realmap.cli.output import json_option, show_json, until_interrupted, watch_option
from realmap.cli.place import place_of
from realmap.cli.values import Form, form_option, values
from realmap.errors import InvalidAddress
from realmap.memory import ForeignProcess
from realmap.observe.words import harmless

#: So much is shown unless a length is given, in bytes; and so much in a line.
LENGTH, ROW = 256, 16
CHANGED = "bold black on yellow"


@click.command()
@click.argument("pid", type=int)
@click.argument("place", metavar="ADDRESS|NAME")
@click.argument("length", type=click.IntRange(min=1), required=False)
@form_option
@watch_option("0.5", ", until Ctrl-C. What changes is lit, or, in a pipe, shown.")
@json_option
def peek(pid: int, place: str, length: int | None, form: Form, watch: float | None, as_json: bool) -> None:
    """Show LENGTH bytes at ADDRESS of process PID, any: as hex and text, or --as numbers.

    By default 256 bytes, or what is mapped of that. `realmap maps PID` says what is where. The NAME of a segment that
    it has mapped, as `realmap shm` prints it, stands for the address of its beginning. What it shares with others is
    read in place, all else through /proc/PID/mem; what that takes, and is missing, is said.

    \b
    Example: realmap peek 4711 0x7f0012345000 --as f8 --watch
             realmap peek 4711 psm_9f3c21ab 64
    """
    with ForeignProcess(pid) as process:
        address = place_of(process, place)
        data = _read(process, address, length)
        if isinstance(form, struct.Struct) and len(data) < form.size:
            raise click.ClickException(f"a value of that form has {form.size} bytes, and here are {len(data)}")
        if watch is None:
            _show(process, address, data, form, as_json)
            return
        with until_interrupted() as is_over:
            _watch(process, address, data, form, as_json, lambda: not is_over(watch))


def _read(process: ForeignProcess, address: int, length: int | None) -> bytes:
    try:
        return process.copy_in(address, LENGTH if length is None else length)
    except InvalidAddress as error:
        if length is not None or not error.address > address:
            raise
        return process.copy_in(address, error.address - address)  # up to the hole


def lines(address: int, data: bytes, form: Form = None, before: bytes | None = None) -> list[Text]:
    """Them, a line for each row or value; what differs from `before` is lit."""
    old = data if before is None else before
    if isinstance(form, str):
        (text,) = values(form, data)
        return [Text(harmless(line), style=CHANGED if old != data else "") for line in text.split("\n")]
    if form is not None:
        size, found = form.size, []
        for number, value in enumerate(values(form, data)):
            part = slice(number * size, (number + 1) * size)
            line = Text().append(f"{address + part.start:#x}  ", style="dim")
            found.append(line.append(harmless(value), style=CHANGED if old[part] != data[part] else ""))
        return found
    return [_row(address, data, old, at) for at in range(0, len(data), ROW)]


def _row(address: int, data: bytes, old: bytes, at: int) -> Text:
    """Short enough for 80 columns."""
    row, letters = data[at : at + ROW], Text(" ")
    line = Text().append(f"{address + at:#x}", style="dim")
    for number, byte in enumerate(row, at):
        style = CHANGED if old[number] != byte else ""
        line.append(" ").append(f"{byte:02x}", style=style)
        letters.append(chr(byte) if 32 <= byte < 127 else ".", style=style)
    return line.append("   " * (ROW - len(row))).append(letters)


def _record(process: ForeignProcess, address: int, data: bytes, form: Form) -> dict[str, Any]:
    found = {"time": time.time(), "pid": process.pid, "address": address, "length": len(data), "hex": data.hex()}
    if form is not None:
        found["values"] = values(form, data)
    return found


def _show(process: ForeignProcess, address: int, data: bytes, form: Form, as_json: bool) -> None:
    if as_json:
        show_json(_record(process, address, data, form))
    elif sys.stdout.isatty():
        Console(highlight=False).print(*lines(address, data, form), sep="\n", soft_wrap=True)
    else:
        click.echo("\n".join(line.plain for line in lines(address, data, form)))


def _watch(
    process: ForeignProcess,
    address: int,
    data: bytes,
    form: Form,
    as_json: bool,
    goes_on: Callable[[], bool],
) -> None:
    before = data
    if sys.stdout.isatty() and not as_json:
        head = Text(harmless(f"{len(data)} bytes at {address:#x} of process {process.pid}, {process.name}"))
        console = Console(highlight=False)
        with Live(head, console=console, auto_refresh=False, screen=True) as live:
            while goes_on():
                now = process.copy_in(address, len(data))
                live.update(Text("\n").join([head, Text(), *lines(address, now, form, before)]), refresh=True)
                before = now
        return
    _show(process, address, data, form, as_json)
    while goes_on():
        now = process.copy_in(address, len(data))
        if now != before:
            if as_json:
                show_json(_record(process, address, now, form), line=True)
            else:
                changed = [line for line in lines(address, now, form, before) if CHANGED in str(line.spans)]
                click.echo("\n".join(line.plain for line in changed))
        before = now
