"""A kernel's books at one moment, typed. Addresses, offsets and lengths in bytes.

The same in Python (`kernel.snapshot()`), as JSON, and for every view. What the kernel sends is in rows
(wire/records.py).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from realmap.errors import VersionMismatch
from realmap.host.translate import shortage
from realmap.memory.frames import in_words
from realmap.observe import words
from realmap.rights import MemoryType
from realmap.wire import messages
from realmap.wire.client import Client
from realmap.wire.records import (
    FORM,
    CallInfo,
    FramesInfo,
    GrantInfo,
    HandleInfo,
    KeptInfo,
    LentInfo,
    LimitsInfo,
    MappingInfo,
    MirrorInfo,
    ParkedInfo,
    PartInfo,
    ProcessInfo,
    RunningInfo,
    SeatInfo,
    SegmentInfo,
    SessionInfo,
)
from realmap.wire.status import Patience

T = TypeVar("T")
#: What comes from the kernel as it is in the snapshot.
_PLAIN = ("form", "pid", "path", "alone", "time", "anchors", "stats", "pinned")
_TYPES = {int(kind): kind.name for kind in MemoryType}


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
    anchors: list[int]
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
    #: Services of processes, who calls them, and what is lent to them.
    seats: list[SeatInfo] = []
    sessions: list[SessionInfo] = []
    grants: list[GrantInfo] = []
    lent: list[LentInfo] = []

    @classmethod
    def ask(cls, client: Client, timeout: float | None = None) -> Snapshot:
        """From the kernel of a connection, within `timeout` seconds or `Patience`. Errors as `Client.request`, `read`.

        PhysicalMemoryExhaustion: the kernel has no memory or no descriptors for it, or this process has none.
        """
        ask = messages.Ask(client.next_id(), "books")
        bound = Patience(client.path, "books") if timeout is None else timeout
        length, answer = client.request(ask, timeout=bound, name="books")
        if not answer.descriptors:  # Linux delivers what it has room for
            raise shortage(OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "cannot receive a snapshot")
        with open(answer.descriptors[0], "rb", closefd=False) as file:
            return cls.read(msgspec.msgpack.decode(file.read(length)))

    @classmethod
    def read(cls, books: Any) -> Snapshot:
        """From what the kernel wrote. VersionMismatch: its form is another."""
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
                _filled(ProcessInfo, row, [_mapping(*each) for each in mappings], [ParkedInfo(*each) for each in stock])
                for *row, mappings, stock in books["processes"]
            ],
            outbox=[(device, inode) for device, inode in books["outbox"]],
            handles=[HandleInfo(*row) for row in books["handles"]],
            seats=[SeatInfo(*row) for row in books["seats"]],
            sessions=[SessionInfo(*row) for row in books["sessions"]],
            grants=[GrantInfo(*row) for row in books["grants"]],
            lent=[LentInfo(*row) for row in books["lent"]],
            mirrors=[_filled(MirrorInfo, row, [PartInfo(*each) for each in parts]) for *row, parts in books["mirrors"]],
            kept=[_filled(KeptInfo, row, PartInfo(*part)) for *row, part in books["kept"]],
            frames=[
                _filled(FramesInfo, row, [in_words(who) for who in holders], [SegmentInfo(*each) for each in segments])
                for *row, holders, segments in books["frames"]
            ],
        )

    def _repr_svg_(self) -> str:
        from realmap.observe.svg import svg
        from realmap.observe.tables import programs

        return svg(self, programs=programs(self))

    def __repr__(self) -> str:
        there = [(len(self.processes), "process"), (self.stats["mappings"], "mapping"), (len(self.mirrors), "mirror")]
        said = ", ".join(words.counted(*each) for each in there)
        return f"<Snapshot of kernel {self.pid} at {self.path!r}: {said}>"

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
        return {frames.serial: frames for frames in self.frames}


def _filled(kind: Callable[..., T], row: list[Any], *rest: Any) -> T:
    return kind(*row, *rest)


def _mapping(address: int, length: int, kind: int, *row: Any) -> MappingInfo:
    return MappingInfo(address, length, _TYPES[kind], *row)
