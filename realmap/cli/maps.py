"""`realmap maps`: the mappings of one process, in Linux; of a kernel's user in the books, too."""

from __future__ import annotations

from typing import Any

import click
import msgspec

from realmap.cli.output import Column, json_option, show, show_json, show_records
from realmap.cli.target import BOUND, find, kernel_option, named
from realmap.errors import InvalidHandle, KernelError
from realmap.host import runtime
from realmap.memory import ForeignMapping, ForeignProcess
from realmap.observe.control import Control
from realmap.observe.maps import MapView, view
from realmap.observe.shm import shown

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
FOREIGN = [
    Column("address", "hex"),
    Column("length", "bytes"),
    Column("kind"),
    Column("rights"),
    Column("offset", "hex", spare=3),
    Column("resident", "bytes", spare=1),
    Column("inode", "number", spare=2),
    Column("name"),
    Column("mirror", spare=4),
]
#: Kinds of any process that are its alone.
UNSHARED = ("private", "special")


@click.command(epilog=BOUND)
@click.argument("pid", type=int)
@click.option("--shared", is_flag=True, help="Only shared memory and files: nothing private, nothing of Linux.")
@kernel_option
@json_option
def maps(pid: int, shared: bool, path: str | None, as_json: bool) -> None:
    """Show what process PID has mapped: any, and of a kernel's user the kernel's books beside what Linux has there.

    \b
    offset    where in its frames, or its file, it starts
    resident  bytes that this process has touched (a dash: Linux has joined it with its neighbour)
    Of a kernel's user, and of the kernel itself (KernelLand: mirrors, kept windows, anchors of its page tables):
    shared    what of the resident bytes others have, too
    refcount  of its frames
    segments  their inodes (on a terminal, of many the first, and how many)
    linux     "agrees", "changing" (it was at work meanwhile), or what Linux has there instead
    Of a service also the windows of pages that it was lent, as it says, and that it keeps for their next use.
    Of any other process:
    kind      posix, memfd, sysv, anonymous (all of them shared), file (shared), private, device, special
    mirror    of shared memory: "yes", or why it cannot be mirrored

    With --kernel, PID is one of that kernel's.

    Example: realmap maps 4711
    """
    rows = _in_books(pid, path)
    if rows is None:
        _foreign(pid, shared, as_json)
    else:
        rows = [row for row in rows if row.segments or not shared]
        show_records(COLUMNS, rows, "it has no mappings that the kernel knows of", as_json)


def _in_books(pid: int, path: str | None) -> list[MapView] | None:
    """What the kernel of which it is a user has; None: it is no user of any that can be asked."""
    for socket in [find(path)] if named(path) else runtime.sockets():
        try:
            with Control(socket) as kernel:
                return view(kernel.snapshot, pid)
        except InvalidHandle:
            if path is not None:
                raise
        except KernelError:
            if named(path):
                raise
    return None


def _foreign(pid: int, shared: bool, as_json: bool) -> None:
    with ForeignProcess(pid) as process:
        found = [each for each in process.mappings() if not shared or each.kind not in UNSHARED]
    if as_json:
        rows = [msgspec.structs.asdict(each) | {"rights": str(each.rights), "name": shown(each.name)} for each in found]
        show_json([row | {"why_not": shown(str(row["why_not"]))} for row in rows])
        return
    show(FOREIGN, [_row(each) for each in found], "it has mapped nothing that is shared")


def _row(each: ForeignMapping) -> list[Any]:
    mirror = "" if each.kind in UNSHARED else each.why_not or "yes"
    place = (each.address, each.length, each.kind, str(each.rights)[2:])
    return [*place, each.offset, each.resident, each.inode, each.name, mirror]
