"""Any processes of the machine that share memory, as a snapshot: so they are drawn as a kernel and its users are.

    what a kernel has       here
    KernelLand, a mirror    above, each segment that several processes have mapped
    a user, its mappings    a process, and what it has mapped of any shared memory

A segment is lit where it is above, and in every process that maps it.
"""

from __future__ import annotations

from operator import attrgetter

from realmap.host.shared_segments import ANONYMOUS, MEMFD, POSIX, SYSV, UNLINKED, Machine, Segment
from realmap.observe.shm import holders_of, shown
from realmap.observe.snapshot import Snapshot
from realmap.observe.words import program
from realmap.rights import user_rights
from realmap.wire.records import (
    FORM,
    FramesInfo,
    LimitsInfo,
    MappingInfo,
    MirrorInfo,
    PartInfo,
    ProcessInfo,
    SegmentInfo,
)

#: Where a segment lies in the lane above: each has its place, whichever others there are.
ROOM = 1 << 48
#: In which order those of the same inode get their numbers.
KINDS = (POSIX, UNLINKED, MEMFD, ANONYMOUS, SYSV)
#: Of what a snapshot has totals; what only a kernel does is nothing here.
NOTHING = dict.fromkeys(("calls", "mirrored", "mirrored_bytes", "kept_hits", "kept_bytes", "running"), 0)


def snapshot(machine: Machine) -> Snapshot:
    """Processes that have mapped a segment which another has mapped, too; `pid` is 0: it is no kernel's."""
    users = {id(each): {shown.pid for shown in each.maps} for each in machine.segments}
    shared = [each for each in machine.segments if len(users[id(each)]) > 1]
    pids = {pid for each in shared for pid in users[id(each)]}
    serials = _serials(machine)
    seen = [each for each in machine.segments if pids & users[id(each)]]
    mappings: dict[int, list[MappingInfo]] = {pid: [] for pid in pids}
    for each in seen:
        for at in each.maps:
            if at.pid in pids:
                rights = int(user_rights(at.perms))
                length = at.end - at.start
                serial = serials[id(each)]
                mappings[at.pid].append(MappingInfo(at.start, length, each.kind.upper(), rights, at.offset, serial))
    mirrors = []
    for each in shared:
        length = max(each.size, *(at.offset + at.end - at.start for at in each.maps))
        serial = serials[id(each)]
        mirrors.append(MirrorInfo(serial * ROOM, length, serial * ROOM, length, 0, 0, [PartInfo(serial, 0, length)]))
    programs = {pid: program(pid) for each in seen for pid in each.holders}
    processes = [
        ProcessInfo(pid, pid, 0, 0, 0, None, sorted(mappings[pid], key=attrgetter("address")), [])
        for pid in sorted(pids)
    ]
    stats = NOTHING | {
        "mappings": sum(map(len, mappings.values())),
        "segments": len(seen),
        "bytes": sum(each.resident for each in seen),
        "descriptors": sum(sum(each.opened.values()) for each in seen),
    }
    return Snapshot(
        form=FORM, pid=0, path="this machine", alone=False, time=machine.time, kernel_land=(0, 0), anchors=[],
        limits=LimitsInfo(0, 0, 0, 0, 0, 0, None, None, None, 0, 0), stats=stats, calls=[], running=[],
        processes=processes, pinned=[], outbox=[], handles=[], seats=[], sessions=[], grants=[], lent=[],
        mirrors=sorted(mirrors, key=lambda mirror: mirror.base), kept=[],
        frames=[_frames(each, serials[id(each)], programs) for each in seen],
    )  # fmt: skip


def _serials(machine: Machine) -> dict[int, int]:
    """A number for each segment, the same at the next look: its inode, or a larger one where two have the same."""
    found: dict[int, int] = {}
    taken: set[int] = set()
    for each in sorted(machine.segments, key=lambda each: (each.device, KINDS.index(each.kind), each.inode)):
        serial = each.inode
        while serial in taken:
            serial += 1 << 32
        taken.add(serial)
        found[id(each)] = serial
    return found


def _frames(segment: Segment, serial: int, programs: dict[int, str]) -> FramesInfo:
    holders = [str(each) for each in holders_of(segment, programs.__getitem__)]
    name = f"{segment.kind} {shown(segment.name)}".rstrip()
    part = SegmentInfo(segment.inode, segment.device, segment.size, 0, name)
    return FramesInfo(serial, segment.size, len(segment.maps) + sum(segment.opened.values()), holders, [part])
