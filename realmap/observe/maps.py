"""The mappings of one process as the kernel's books have them, beside what Linux has there."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable

import msgspec

from realmap.errors import InvalidHandle
from realmap.host import procfs
from realmap.host.procfs import Resident
from realmap.memory.lands import KERNEL_LAND, USER_LAND
from realmap.observe.audit import Range, clipped, lent_parts, lent_to, mapping_ranges, merged, say, window_ranges
from realmap.observe.snapshot import Snapshot
from realmap.pages import PAGE_SIZE
from realmap.rights import MappingAccessRights
from realmap.wire.records import FramesInfo, LentInfo, PartInfo

AGREES = "agrees"
#: It differed, and was made or changed between two looks: the books and Linux are not read at one moment.
CHANGING = "changing"
#: How often it is looked again while something differs.
TRIES = 5
#: So many users are listed where somebody asks for another one.
MANY = 20


class MapView(msgspec.Struct, frozen=True):
    """One mapping of a user process, or a window there of pages that it was lent, or that it keeps of these; or a
    mirror, a kept window or an anchor of KernelLand (`type` says so).

    Addresses, offsets and lengths in bytes. `process`: its number in the books, None in KernelLand. `segments`: the
    inodes of those that it shows, `offset` where in its frames it starts. `resident`, `shared`: bytes in memory, and
    how many of these others map, too; None where Linux has joined it with a neighbour. `linux`: "agrees",
    "changing", or what Linux has there instead.
    """

    process: int | None
    address: int
    length: int
    type: str
    rights: str
    segments: list[int]
    offset: int
    refcount: int | None
    resident: int | None
    shared: int | None
    linux: str


def view(take: Callable[[], Snapshot], pid: int) -> list[MapView]:
    """The mappings of `pid`, in order of address; for the kernel's own pid those of KernelLand as well.

    `take` gives a new snapshot.

    InvalidHandle: `pid` is no user of this kernel (who is, is said), or has ended meanwhile.
    AccessDenied, PermissionError: it is not ours to look at.
    """
    found = _look(take(), pid)
    for _ in range(TRIES):
        if all(each.linux == AGREES for each in found):
            break
        before = set(map(_said, found))
        found = [
            each if each.linux == AGREES or _said(each) in before else msgspec.structs.replace(each, linux=CHANGING)
            for each in _look(take(), pid)
        ]
    return found


def _said(each: MapView) -> tuple[int, int, str]:
    return each.address, each.length, each.linux


def _look(snapshot: Snapshot, pid: int) -> list[MapView]:
    users = {process.pid for process in snapshot.processes}
    if pid not in users | {snapshot.pid}:
        listed = [*map(str, sorted(users)[:MANY]), *(["…"] if len(users) > MANY else [])]
        who = ", ".join(listed) or "nobody"
        why = f"process {pid} is no user of the kernel at {snapshot.path!r}; its users: {who}; itself: {snapshot.pid}"
        raise InvalidHandle(pid, why=why)
    try:
        user_side = procfs.smaps(pid, USER_LAND.start, USER_LAND.end)
        kernel_side = procfs.smaps(pid, KERNEL_LAND.start, KERNEL_LAND.end) if pid == snapshot.pid else []
    except ProcessLookupError:
        raise InvalidHandle(pid, why=f"process {pid} has ended meanwhile") from None
    frames = snapshot.frames_by_serial()
    rows = _mappings(snapshot, pid, frames, user_side)
    return rows + (_windows(snapshot, frames, kernel_side) if pid == snapshot.pid else [])


def _mappings(snapshot: Snapshot, pid: int, frames: dict[int, FramesInfo], linux: list[Resident]) -> list[MapView]:
    places = _Places(linux, frames)
    rows = []
    for process in snapshot.processes:
        for each in process.mappings if process.pid == pid else ():
            books, _ = mapping_ranges(each, frames, places.ranges(each.address, each.address + each.length))
            parts = [PartInfo(each.frames, each.phys_offset, each.length)] if each.frames is not None else []
            rows.append(places.row(each.address, each.length, each.type, each.rights, parts, books, process.number))
        for parked in process.stock if process.pid == pid else ():
            start, end = parked.address, parked.address + parked.length
            parts = [PartInfo(parked.frames, parked.offset, parked.length)] if parked.frames is not None else []
            linux_has = [(start, end, "---", parked.inode, parked.offset)]
            rows.append(places.row(start, parked.length, "parked", 0, parts, linux_has))
    return rows + [_lent(snapshot, each, frames, places) for each in lent_to(snapshot, pid)]


def _lent(snapshot: Snapshot, each: LentInfo, frames: dict[int, FramesInfo], places: _Places) -> MapView:
    """The window: what is compared of it is its whole pages; its edges are copies."""
    shown = lent_parts(snapshot, each)
    parts = [part for _, part in shown]
    start = shown[0][0] if shown else each.at
    end = start + sum(part.length for part in parts)
    books = window_ranges(start, each.rights, parts, 0, frames)
    type = "kept" if each.kept else "lent"
    row = places.row(start, end - start, type, each.rights, parts, books)
    return msgspec.structs.replace(row, address=each.at, length=each.length)


def _windows(snapshot: Snapshot, frames: dict[int, FramesInfo], linux: list[Resident]) -> list[MapView]:
    windows = [("mirror", each.base, each.span, each.rights, each.parts, each.zeros) for each in snapshot.mirrors]
    windows += [("kept", each.base, each.span, each.rights, [each.part], 0) for each in snapshot.kept]
    places = _Places(linux, frames)
    rows = [
        places.row(base, span, type, rights, parts, window_ranges(base, rights, parts, zeros, frames))
        for type, base, span, rights, parts, zeros in windows
    ]
    rows += [places.row(at, PAGE_SIZE, "anchor", 0, [], [(at, at + PAGE_SIZE, "---", 0, 0)]) for at in snapshot.anchors]
    return sorted(rows, key=lambda row: row.address)


class _Places:
    """What Linux has mapped where, in one land, beside the books."""

    def __init__(self, linux: list[Resident], frames: dict[int, FramesInfo]) -> None:
        self._linux = linux
        self._frames = frames
        self._starts = [each.map.start for each in linux]
        self._ends = [each.map.end for each in linux]

    def _within(self, start: int, end: int) -> list[Resident]:
        return self._linux[bisect_right(self._ends, start) : bisect_left(self._starts, end)]

    def row(
        self,
        address: int,
        length: int,
        type: str,
        rights: int,
        parts: list[PartInfo],
        books: list[Range],
        process: int | None = None,
    ) -> MapView:
        """The row of [address, address + length), which shows `parts` of frames and is `books` as the books have it."""
        shown = [self._frames[part.frames] for part in parts]
        inodes = [
            piece[0] for part, each in zip(parts, shown, strict=True) for piece in each.pieces(part.offset, part.length)
        ]
        return MapView(
            process,
            address,
            length,
            type,
            str(MappingAccessRights(rights)),
            inodes,
            parts[0].offset if parts else 0,
            shown[0].refcount if shown else None,
            *self._amounts(address, address + length),
            self._compare(address, address + length, books),
        )

    def ranges(self, start: int, end: int) -> list[Range]:
        """What is mapped in [start, end), cut to that."""
        inside = [each.map for each in self._within(start, end)]
        found = [(each.start, each.end, each.perms[:3], each.inode, each.offset) for each in inside]
        return merged(clipped(found, start, end))

    def _amounts(self, start: int, end: int) -> tuple[int | None, int | None]:
        """Bytes in memory, and shared ones, of [start, end); None: more than that is one map."""
        inside = self._within(start, end)
        if any(each.map.start < start or each.map.end > end for each in inside):
            return None, None
        return sum(each.resident for each in inside), sum(each.shared for each in inside)

    def _compare(self, start: int, end: int, books: list[Range]) -> str:
        """Whether Linux agrees with the books about [start, end), or what it has there."""
        linux = self.ranges(start, end)
        if linux == merged(books):
            return AGREES
        return "; ".join(say(each) for each in linux) or "nothing is mapped there"
