"""A kernel's books at one moment, typed. Addresses, offsets and lengths in bytes.

The same in Python (`kernel.snapshot()`), as JSON, and for every view. What the kernel sends is in rows
(kernel/dump.py): the fields of these structures in their order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from realmap.errors import VersionMismatch
from realmap.memory.frames import in_words
from realmap.rights import MemoryType

T = TypeVar("T")
FORM = 5
#: What comes from the kernel as it is in the snapshot.
_PLAIN = ("form", "pid", "path", "alone", "time", "stakes", "stats", "pinned")
_TYPES = {int(kind): kind.name for kind in MemoryType}


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
    """A user process, its calls that are running, and its mappings in order of address.

    `bytes`: of the frames that it made and that live, whoever holds them; `limit`: how many it may have, None for
    any number.
    """

    number: int
    pid: int
    uid: int
    calls: int
    bytes: int
    limit: int | None
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


class LimitsInfo(msgspec.Struct, frozen=True):
    """What the kernel allows, as `Limits` and `boot` name it: numbers, seconds and bytes; None is no limit."""

    processes: int
    mappings: int
    segments: int
    calls: int
    handles: int
    running: int
    seconds: float | None
    memory_limit: int | None
    process_limit: int | None
    kernel_land: int
    lazy_unmap: int


class CallInfo(msgspec.Struct, frozen=True):
    """A syscall: how often it was called so far, and how many of these calls ended in an error."""

    name: str
    blocking: bool
    count: int
    failed: int


class RunningInfo(msgspec.Struct, frozen=True):
    """A call of a process (its number) that a worker thread is at; `seconds` since it began, None while it waits."""

    process: int
    syscall: str
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
    limits: LimitsInfo
    #: Totals by name: what there is, and what was done so far.
    stats: dict[str, int]
    calls: list[CallInfo]
    running: list[RunningInfo]
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
        plain: dict[str, Any] = {name: books[name] for name in _PLAIN}
        start, length = books["kernel_land"]
        return cls(
            **plain,
            kernel_land=(start, length),
            limits=msgspec.convert(books["limits"], LimitsInfo),
            calls=[CallInfo(*row) for row in books["calls"]],
            running=[RunningInfo(*row) for row in books["running"]],
            processes=[
                _filled(ProcessInfo, row, [_mapping(*each) for each in mappings])
                for *row, mappings in books["processes"]
            ],
            outbox=[(device, inode) for device, inode in books["outbox"]],
            handles=[HandleInfo(*row) for row in books["handles"]],
            mirrors=[_filled(MirrorInfo, row, [PartInfo(*each) for each in parts]) for *row, parts in books["mirrors"]],
            kept=[_filled(KeptInfo, row, PartInfo(*part)) for *row, part in books["kept"]],
            frames=[
                _filled(FramesInfo, row, [in_words(who) for who in holders], [SegmentInfo(*each) for each in segments])
                for *row, holders, segments in books["frames"]
            ],
        )

    def segments(self) -> set[tuple[int, int]]:
        """(device, inode) of every segment: inode numbers alone are those of another mount's files, too."""
        return {(segment.device, segment.inode) for frames in self.frames for segment in frames.segments}

    def running_by_process(self) -> dict[int, list[str]]:
        """The syscalls that are running, by the number of the process that called."""
        found: dict[int, list[str]] = {}
        for each in self.running:
            found.setdefault(each.process, []).append(each.syscall)
        return found

    def frames_by_serial(self) -> dict[int, FramesInfo]:
        """The frames, by serial."""
        return {frames.serial: frames for frames in self.frames}


def _filled(kind: Callable[..., T], row: list[Any], *rest: Any) -> T:
    return kind(*row, *rest)


def _mapping(address: int, length: int, kind: int, *row: Any) -> MappingInfo:
    return MappingInfo(address, length, _TYPES[kind], *row)
