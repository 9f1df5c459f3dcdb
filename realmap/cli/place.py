"""Where in a process `peek` and `poke` look: at an address, or at a segment by the name that `realmap shm` prints."""

from __future__ import annotations

import click

from realmap.host import SHM
from realmap.memory import ForeignMapping, ForeignProcess
from realmap.observe.shm import shown
from realmap.observe.words import harmless

#: What /proc/PID/maps has before the name of a segment.
BEFORE = {"posix": f"{SHM}/", "memfd": "/memfd:"}
DELETED = " (deleted)"


def place_of(process: ForeignProcess, text: str) -> int:
    """An address: hex with 0x, or decimal; or of a segment of that name: where the process has mapped its beginning.

    BadParameter: it is neither, or it has mapped several of that name, or one several times: they are listed.
    """
    try:
        return int(text, 0)
    except ValueError:
        named = [each for each in process.mappings() if each.kind in BEFORE]
    found = _beginnings([each for each in named if _as_shown(text) in (_name(each), _name(each) + DELETED)])
    if len(found) == 1:
        return found[0].address
    if found:
        why = f"{text!r} is mapped more than once; write the address of one"
    else:
        found = _beginnings(named)
        why = f"{text!r} is no address (0x7f0012345000), and process {process.pid} has mapped no segment of that name"
    listed = "".join(f"\n  {each.address:#x}  {each.kind}  {_name(each)}" for each in found)
    raise click.BadParameter(why + (f":{listed}" if found else "."))


def _beginnings(mappings: list[ForeignMapping]) -> list[ForeignMapping]:
    """Of each segment, where the first of its bytes that are mapped are."""
    first: dict[tuple[int, int], int] = {}
    for each in mappings:
        segment = each.device, each.inode
        first[segment] = min(each.offset, first.get(segment, each.offset))
    return [each for each in mappings if each.offset == first[each.device, each.inode]]


def _name(each: ForeignMapping) -> str:
    return _as_shown(each.name.removeprefix(BEFORE[each.kind]).removesuffix(DELETED))


def _as_shown(name: str) -> str:
    """The same for a name as /proc/PID/maps has it, as `realmap shm` shows it, and as it does in a pipe."""
    return harmless(shown(name.replace("\\012", "\n"))).replace("\\x20", " ")
