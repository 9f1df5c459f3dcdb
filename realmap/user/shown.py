"""How a process and a buffer show themselves in a notebook: HTML of what this process knows. Nobody is asked."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

from realmap.errors import KernelError

if TYPE_CHECKING:
    from realmap.user.buffer import Buffer, UserWindow
    from realmap.user.process import Process

#: So many mappings are listed, and so many bytes shown, in lines of so many.
ROWS, BYTES, LINE = 20, 128, 16
HEADS = ("address", "bytes", "rights")


def of_process(process: Process, windows: Iterable[UserWindow]) -> str:
    """What it is, and its mappings in order of address."""
    found = sorted((window.address, len(window), str(window.rights)) for window in windows if window.alive)
    rows = [f"<td>{address:#x}</td><td>{length:,}</td><td>{escape(rights)}</td>" for address, length, rights in found]
    if len(rows) > ROWS:
        rows[ROWS:] = [f"<td colspan={len(HEADS)}>and {len(rows) - ROWS} more</td>"]
    head = "".join(f"<th>{name}</th>" for name in HEADS)
    table = f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>" if rows else ""
    return f"<p>{escape(repr(process))}</p>{table}"


def of_buffer(buffer: Buffer) -> str:
    """What it is, and its first bytes; where they are gone, that."""
    head = f"<p>{escape(repr(buffer))}</p>"
    try:
        data = buffer[:BYTES]
    except (BufferError, KernelError) as error:
        return f"{head}<p>{escape(str(error))}</p>"
    lines = [_line(at, data[at : at + LINE]) for at in range(0, len(data), LINE)]
    more = [f"… and {len(buffer) - BYTES:,} bytes more"] if len(buffer) > BYTES else []
    return f"{head}<pre>{escape(chr(10).join([*lines, *more]))}</pre>"


def _line(at: int, data: bytes) -> str:
    letters = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in data)
    return f"{at:6}  {data.hex(' '):{3 * LINE - 1}}  {letters}"
