"""A kernel's books at one moment, typed. Addresses, offsets and lengths in bytes."""

from __future__ import annotations

from typing import Any

import msgspec

from realmap.errors import VersionMismatch

FORM = 3


class SegmentInfo(msgspec.Struct, frozen=True):
    """One POSIX segment: `device` and `inode` are what /proc/PID/maps shows of it."""

    inode: int
    device: int
    length: int
    #: Bytes that huge pages back.
    huge: int
    name: str | None


class FramesInfo(msgspec.Struct, frozen=True):
    """Frames: their segments in order, the refcount, and every holder of a reference by name."""

    serial: int
    length: int
    refcount: int
    holders: list[str]
    segments: list[SegmentInfo]

    def pieces(self, offset: int, length: int) -> list[tuple[int, int, int]]:
        """Where [offset, offset + length) of the frames lies: (inode, offset in it, length) each."""
        found = []
        start = 0
        for segment in self.segments:
            low, high = max(offset, start), min(offset + length, start + segment.length)
            if low < high:
                found.append((segment.inode, low - start, high - low))
            start += segment.length
        return found


class MappingInfo(msgspec.Struct, frozen=True):
    """A mapping of a process; `frames` is the serial of its shared frames, None where it has none."""

    address: int
    length: int
    type: str
    rights: int
    phys_offset: int
    frames: int | None


class ProcessInfo(msgspec.Struct, frozen=True):
    """A user process, its calls that are running, and its mappings in order of address."""

    number: int
    pid: int
    uid: int
    calls: int
    mappings: list[MappingInfo]


class PartInfo(msgspec.Struct, frozen=True):
    """A range of frames."""

    frames: int
    offset: int
    length: int


class MirrorInfo(msgspec.Struct, frozen=True):
    """A live mirror.

    What it shows (`address`, `length`), the whole pages that are mapped (`base`, `span`), and of what. `zeros`: from
    there on zero pages are mapped, since a segment was truncated under it; 0 where there are none.
    """

    address: int
    length: int
    base: int
    span: int
    zeros: int
    rights: int
    parts: list[PartInfo]


class KeptInfo(msgspec.Struct, frozen=True):
    """A window that is kept mapped for its next use: whole pages at `base`, and the frames they show. No reference."""

    base: int
    span: int
    rights: int
    part: PartInfo


class HandleInfo(msgspec.Struct, frozen=True):
    """A handle: the beginning of its token (not all of it: that would let one attach), and what it stands for.

    `maker`: the number of the process whose end is its end, `keep` seconds later; None: it has ended. `uses`,
    `seconds`: how much is left.
    """

    name: str
    frames: int
    start: int
    length: int
    rights: int
    maker: int | None
    keep: float
    uses: int | None
    seconds: float | None


class Snapshot(msgspec.Struct, frozen=True):
    """Everything the kernel's books hold. `form` is the version of this structure; `time` seconds since 1970."""

    form: int
    pid: int
    path: str
    #: Whether its process is the kernel's alone; else other segments of that process are not its own.
    alone: bool
    time: float
    kernel_land: tuple[int, int]
    #: Pages of KernelLand without rights, which keep page tables in place.
    stakes: list[int]
    stats: dict[str, int]
    processes: list[ProcessInfo]
    #: Serials of the frames of mappings in nobody's books, once for each: unmapped while a call works on them,
    #: or left by a process whose forked children may still come for them.
    pinned: list[int]
    #: (device, inode) of descriptors on their way to a process that does not read.
    outbox: list[tuple[int, int]]
    handles: list[HandleInfo]
    mirrors: list[MirrorInfo]
    kept: list[KeptInfo]
    frames: list[FramesInfo]

    @classmethod
    def read(cls, books: Any) -> Snapshot:
        """From the kernel's answer. VersionMismatch: its form is another."""
        if not isinstance(books, dict) or books.get("form") != FORM:
            theirs = books.get("form") if isinstance(books, dict) else None
            raise VersionMismatch(f"form {FORM}", f"form {theirs}", why="a snapshot of another version of realmap")
        return msgspec.convert(books, cls)

    def segments(self) -> set[tuple[int, int]]:
        """(device, inode) of every segment: inode numbers alone are those of another mount's files, too."""
        return {(segment.device, segment.inode) for frames in self.frames for segment in frames.segments}

    def frames_by_serial(self) -> dict[int, FramesInfo]:
        """The frames, by serial."""
        return {frames.serial: frames for frames in self.frames}
