"""What `realmap ps` and `realmap segments` show: a row for each process, and for each segment."""

from __future__ import annotations

import os
from collections import Counter

import msgspec

from realmap.observe.snapshot import Snapshot
from realmap.observe.words import program


class ProcessRow(msgspec.Struct, frozen=True):
    """A user process. `mapped`: bytes of its mappings; `frames`: bytes of the frames that it made and that live.

    `program`: its name, or "gone" where it has ended since the snapshot; `handles`: those it made that can be used;
    `running`: the syscalls that worker threads are at for it, or services, whose pids are `waits_for`. `serves`: the
    names that it serves.
    """

    number: int
    pid: int
    uid: int
    mappings: int
    mapped: int
    frames: int
    limit: int | None
    handles: int
    calls: int
    running: list[str]
    waits_for: list[int]
    serves: list[str]
    program: str


class SegmentRow(msgspec.Struct, frozen=True):
    """A segment: its frames' serial, and which of theirs it is (from 0). Bytes.

    `resident`: what of it takes memory; None where that cannot be told (the kernel's descriptors are not ours to see).
    `holders`: who holds a reference to its frames, in words.
    """

    serial: int
    index: int
    inode: int
    length: int
    resident: int | None
    huge: int
    refcount: int
    name: str | None
    holders: list[str]


def processes(snapshot: Snapshot) -> list[ProcessRow]:
    """The processes of a snapshot, in order of their numbers."""
    handles = Counter(handle.maker for handle in snapshot.handles)
    running, pids = snapshot.running_by_process(), {process.number: process.pid for process in snapshot.processes}
    serves: dict[int, set[str]] = {}
    for seat in snapshot.seats:
        serves.setdefault(seat.process, set()).update(seat.names)
    waits_for: dict[int, set[int]] = {}
    for call in snapshot.running:
        if call.server in pids:
            waits_for.setdefault(call.process, set()).add(pids[call.server])
    return [
        ProcessRow(
            process.number,
            process.pid,
            process.uid,
            len(process.mappings),
            sum(mapping.length for mapping in process.mappings),
            process.bytes,
            process.limit,
            handles[process.number],
            process.calls,
            sorted(running.get(process.number, ())),
            sorted(waits_for.get(process.number, ())),
            sorted(serves.get(process.number, ())),
            program(process.pid),
        )
        for process in sorted(snapshot.processes, key=lambda each: each.number)
    ]


def programs(snapshot: Snapshot) -> dict[int, str]:
    return {process.pid: program(process.pid) for process in snapshot.processes}


def segments(snapshot: Snapshot) -> list[SegmentRow]:
    """The segments of a snapshot, in order of their frames' serials."""
    resident = _resident(snapshot.pid)
    return [
        SegmentRow(
            frames.serial,
            index,
            segment.inode,
            segment.length,
            None if resident is None else resident.get((segment.device, segment.inode)),
            segment.huge,
            frames.refcount,
            segment.name,
            frames.holders,
        )
        for frames in sorted(snapshot.frames, key=lambda frames: frames.serial)
        for index, segment in enumerate(frames.segments)
    ]


def _resident(pid: int) -> dict[tuple[int, int], int] | None:
    """Bytes that each file takes which `pid` has open, by (device, inode); None: it is not ours to look at."""
    folder, found = f"/proc/{pid}/fd", {}
    try:
        numbers = os.listdir(folder)
    except OSError:
        return None
    for number in numbers:
        try:
            status = os.stat(f"{folder}/{number}")
        except OSError:  # closed meanwhile
            continue
        found[status.st_dev, status.st_ino] = status.st_blocks * 512
    return found
