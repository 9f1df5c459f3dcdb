"""The books of a kernel, held against what Linux says: /proc/PID/maps of every process, by inode and offset."""

from __future__ import annotations

import contextlib
import os
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable

import msgspec

from realmap.host import SHM, procfs, runtime
from realmap.memory.lands import FOREIGN_LAND, KERNEL_LAND, LENT_LAND, OWN_LAND, USER_LAND, Land
from realmap.observe import words
from realmap.observe.snapshot import Snapshot
from realmap.pages import PAGE_SIZE, align_down, align_up
from realmap.rights import letters
from realmap.wire.records import FramesInfo, GrantInfo, LentInfo, MappingInfo, PartInfo

#: A mapped range: (start, end, rwx as in /proc, inode, offset), in bytes.
Range = tuple[int, int, str, int, int]
#: How long to wait before each further look, in seconds: who has been given memory may not have mapped it yet; and
#: what a server has mapped it says a few times a second.
PAUSES = (0.0, 0.01, 0.05, 0.15, 0.3)
#: So many seconds are given to whoever is kept in the middle of it: stopped, without CPU, or by Linux (munmap(2) of a
#: page of tmpfs has taken 1.5 s).
KEPT = 10.0


class Difference(msgspec.Struct, frozen=True):
    """One thing that the books and Linux disagree about: whose, where, what the books say, what Linux says.

    `pid`: of the process whose land, descriptor or name it is; 0: it is within the books.
    """

    where: str
    address: int
    books: str
    linux: str
    pid: int = 0

    def __str__(self) -> str:
        return f"{self.where} at {self.address:#x}: the books say {self.books}, Linux says {self.linux}"


class Faulted(msgspec.Struct, frozen=True):
    """Zero pages that took the place of bytes which were gone when they were touched (a segment was truncated)."""

    where: str
    address: int
    length: int


class Withheld(msgspec.Struct, frozen=True):
    """Lent pages that a server, process `pid`, has still mapped at `address`: `why` it should not."""

    pid: int
    address: int
    length: int
    why: str


class AuditReport(msgspec.Struct, frozen=True):
    """What an audit found. Clean: `differences` is empty, and the report is true as a bool.

    `processes`, `mappings`, `mirrors`, `frames`: how many were held against Linux. `unregistered`: pids
    that map segments of the kernel without being in its books (forks that never connected). `faulted`: what
    shows zeros since its segment was truncated; no difference, the mapping is there. `withheld`: lent pages that
    servers did not give back: Linux cannot take them away. No difference, where they say so.
    """

    differences: list[Difference]
    processes: int
    mappings: int
    mirrors: int
    frames: int
    unregistered: list[int]
    faulted: list[Faulted]
    withheld: list[Withheld] = []

    def __bool__(self) -> bool:
        return not self.differences

    def __str__(self) -> str:
        told = ((self.processes, "process"), (self.mappings, "mapping"), (self.mirrors, "mirror"))
        what = ", ".join(words.counted(*each) for each in told)
        head = f"{words.counted(len(self.differences), 'difference')} in {what}, {self.frames} frames"
        return "\n".join([head, *map(str, self.differences)])


def merged(ranges: Iterable[Range]) -> list[Range]:
    """Neighbours that continue one another as one: Linux joins them, the books do not."""
    found: list[Range] = []
    for entry in sorted(ranges):
        if found:
            start, end, perms, inode, offset = found[-1]
            follows = inode == 0 or offset + (end - start) == entry[4]
            if end == entry[0] and perms == entry[2] and inode == entry[3] and follows:
                found[-1] = (start, entry[1], perms, inode, offset)
                continue
        found.append(entry)
    return found


def linux_ranges(pid: int, land: Land, kernel: int) -> list[Range]:
    """What Linux has mapped in a land of `pid`, without the segments of other kernels than that of pid `kernel`.

    ProcessLookupError: it is gone.
    """
    return merged(
        (entry.start, entry.end, entry.perms[:3], entry.inode, entry.offset if entry.inode else 0)
        for entry in procfs.process_maps(pid, land.start, land.end)
        if runtime.maker_of(entry.path.removeprefix(f"{SHM}/")) in (0, kernel)
    )


def _show_zeros(ranges: list[Range], zeros: int) -> list[Range]:
    """The ranges of one window, from `zeros` on of zero pages (0: nowhere)."""
    if not zeros:
        return ranges
    kept = [(start, min(end, zeros), *rest) for start, end, *rest in ranges if start < zeros]
    return [*kept, (zeros, ranges[-1][1], ranges[-1][2], 0, 0)]  # type: ignore[list-item]


def _zeros(start: int, end: int, linux: list[Range]) -> int:
    """From where on a window that should show a segment shows private pages, up to its end; 0: nowhere."""
    index = bisect_left(linux, end, key=lambda entry: entry[1])  # the one that its last byte is in
    if index == len(linux):
        return 0
    low, _, _, inode, _ = linux[index]
    return max(low, start) if not inode and low < end else 0


def mapping_ranges(mapping: MappingInfo, frames: dict[int, FramesInfo], linux: list[Range]) -> tuple[list[Range], int]:
    """What the books say is mapped for one mapping, and from where on `linux` shows zero pages instead (0: nowhere)."""
    end = mapping.address + mapping.length
    if mapping.frames is None:
        private = mapping.type in ("IO", "NORMAL")
        return [(mapping.address, end, letters(mapping.rights), 0, 0)] if private else [], 0
    part = PartInfo(mapping.frames, mapping.phys_offset, mapping.length)
    zeros = _zeros(mapping.address, end, linux)
    return window_ranges(mapping.address, mapping.rights, [part], zeros, frames), zeros


def window_ranges(
    at: int, rights: int, parts: list[PartInfo], zeros: int, frames: dict[int, FramesInfo]
) -> list[Range]:
    """What is mapped from `at` on where these parts of frames are, side by side; from `zeros` on zero pages."""
    shown = []
    for part in parts:
        for inode, offset, length in frames[part.frames].pieces(part.offset, part.length):
            shown.append((at, at + length, letters(rights), inode, offset))
            at += length
    return _show_zeros(shown, zeros)


def user_ranges(snapshot: Snapshot, linux: dict[int, list[Range]]) -> tuple[dict[int, list[Range]], list[Faulted]]:
    """What the books say is mapped in the UserLand of each pid.

    The kernel does not know what a process touched of a segment that was truncated: where `linux` (by pid) shows
    zero pages instead, up to the end of a mapping, they count as that.
    """
    frames = snapshot.frames_by_serial()
    found: dict[int, list[Range]] = {}
    faulted: list[Faulted] = []
    for process in snapshot.processes:
        ranges = found.setdefault(process.pid, [])
        for mapping in process.mappings:
            found_here, zeros = mapping_ranges(mapping, frames, linux.get(process.pid, []))
            if zeros:
                end = mapping.address + mapping.length
                faulted.append(Faulted(f"UserLand of pid {process.pid}", zeros, end - zeros))
            ranges += found_here
        ranges += [(each.address, each.address + each.length, "---", each.inode, each.offset) for each in process.stock]
    return {pid: merged(ranges) for pid, ranges in found.items()}, faulted


def kernel_ranges(snapshot: Snapshot) -> list[Range]:
    """What the books say is mapped in KernelLand."""
    frames = snapshot.frames_by_serial()
    ranges = []
    for mirror in snapshot.mirrors:
        ranges += window_ranges(mirror.base, mirror.rights, mirror.parts, mirror.zeros, frames)
    for kept in snapshot.kept:
        ranges += window_ranges(kept.base, kept.rights, [kept.part], 0, frames)
    ranges += [(at, at + PAGE_SIZE, "---", 0, 0) for at in snapshot.anchors]
    return merged(ranges)


def say(entry: Range) -> str:
    start, end, perms, inode, offset = entry
    what = f"inode {inode} from {offset:#x}" if inode else "private pages"
    return f"[{start:#x}, {end:#x}) {perms} of {what}"


def _compare(where: str, pid: int, books: list[Range], linux: list[Range]) -> list[Difference]:
    in_books, in_linux = set(books), set(linux)
    only_books = [Difference(where, entry[0], say(entry), "otherwise", pid) for entry in books if entry not in in_linux]
    only_linux = [Difference(where, entry[0], "otherwise", say(entry), pid) for entry in linux if entry not in in_books]
    return only_books + only_linux


def compare(snapshot: Snapshot) -> AuditReport:
    """Holds one snapshot against Linux, as it is now."""
    differences: list[Difference] = []
    linux: dict[int, list[Range]] = {}
    for process in snapshot.processes:
        with contextlib.suppress(ProcessLookupError):
            linux[process.pid] = linux_ranges(process.pid, OWN_LAND, snapshot.pid)
    books, faulted = user_ranges(snapshot, linux)
    for pid, ranges in books.items():
        if linux.get(pid) or not procfs.is_dying(pid):
            differences += _compare(f"UserLand of pid {pid}", pid, ranges, linux.get(pid, []))
    faulted += [
        Faulted("KernelLand", mirror.zeros, mirror.base + mirror.span - mirror.zeros)
        for mirror in snapshot.mirrors
        if mirror.zeros
    ]
    own = KERNEL_LAND.part(KERNEL_LAND.start, FOREIGN_LAND.start - KERNEL_LAND.start)
    books_there = [each for each in kernel_ranges(snapshot) if each[0] < own.end]
    differences += _compare("KernelLand", snapshot.pid, books_there, linux_ranges(snapshot.pid, own, snapshot.pid))
    differences += _lent(snapshot)
    differences += _recount(snapshot)
    differences += _descriptors(snapshot)
    differences += _names(snapshot)
    return AuditReport(
        differences,
        len(snapshot.processes),
        sum(len(process.mappings) for process in snapshot.processes),
        len(snapshot.mirrors),
        len(snapshot.frames),
        _unregistered(snapshot),
        faulted,
        _withheld(snapshot),
    )


def lent_to(snapshot: Snapshot, pid: int) -> list[LentInfo]:
    """The windows of lent pages that a process says it has."""
    numbers = {process.number for process in snapshot.processes if process.pid == pid}
    seats = {seat.number for seat in snapshot.seats if seat.process in numbers}
    return [each for each in snapshot.lent if each.seat in seats]


def lent_parts(snapshot: Snapshot, lent: LentInfo) -> list[tuple[int, PartInfo]]:
    """The whole pages that a window of lent pages shows, where they are, of what its process has mapped now."""
    found: list[tuple[int, PartInfo]] = []
    first, last = align_up(lent.address), align_down(lent.address + lent.length)
    for process in snapshot.processes:
        for mapping in process.mappings if process.number == lent.process else ():
            low, high = max(first, mapping.address), min(last, mapping.address + mapping.length)
            if low < high and mapping.frames is not None:
                part = PartInfo(mapping.frames, mapping.phys_offset + low - mapping.address, high - low)
                found.append((lent.at + low - lent.address, part))
    return found


def clipped(linux: list[Range], start: int, end: int) -> list[Range]:
    """What of that is in [start, end)."""
    found: list[Range] = []
    for low, high, perms, inode, offset in linux:
        if low < end and start < high:
            at = max(low, start)
            found.append((at, min(high, end), perms, inode, offset + at - low if inode else 0))
    return found


def _lent(snapshot: Snapshot) -> list[Difference]:
    """LentLand of each process that serves: what it says is mapped there, and nothing else of the kernel's frames."""
    frames, serving = snapshot.frames_by_serial(), {seat.process for seat in snapshot.seats}
    found: list[Difference] = []
    for pid in {process.pid for process in snapshot.processes if process.number in serving}:
        try:
            linux = linux_ranges(pid, LENT_LAND, snapshot.pid)
        except ProcessLookupError:
            continue
        if not linux and procfs.is_dying(pid):
            continue
        where, told = f"{LENT_LAND.name} of pid {pid}", lent_to(snapshot, pid)
        for each in told:
            for at, part in lent_parts(snapshot, each):
                books = merged(window_ranges(at, each.rights, [part], 0, frames))
                found += _compare(where, pid, books, clipped(linux, at, at + part.length))
        covered = [(align_down(each.at), align_up(each.at + each.length)) for each in told]
        found += _compare(where, pid, [], [entry for entry in linux if entry[3] and not _covers(covered, entry)])
    return found


def _covers(windows: list[tuple[int, int]], entry: Range) -> bool:
    """Whether some of these, side by side or not, have all of it."""
    at = entry[0]
    for start, end in sorted(windows):
        if start <= at < end:
            at = end
    return at >= entry[1]


def _withheld(snapshot: Snapshot) -> list[Withheld]:
    """Windows of calls that have ended, or of what is not lent any more."""
    pids = {process.number: process.pid for process in snapshot.processes}
    seats = {seat.number: pids[seat.process] for seat in snapshot.seats}
    sessions = {session.number: (session.seat, session.process) for session in snapshot.sessions}
    granted: dict[tuple[int, int | None], list[GrantInfo]] = {}
    for grant in snapshot.grants:
        granted.setdefault(sessions[grant.session], []).append(grant)
    found: list[Withheld] = []
    for each in snapshot.lent:
        there = granted.get((each.seat, each.process), ())
        end = each.address + each.length
        if not each.kept and not any(own.address < end and each.address < own.address + own.length for own in there):
            why = "the call that had it has ended" if each.process is None else "it is lent no more"
            found.append(Withheld(seats[each.seat], each.at, each.length, why))
    return found


def _recount(snapshot: Snapshot) -> list[Difference]:
    """Every refcount, counted again from the mappings and mirrors."""
    counted: dict[int, int] = {frames.serial: 0 for frames in snapshot.frames}
    for process in snapshot.processes:
        for mapping in process.mappings:
            if mapping.frames is not None:
                counted[mapping.frames] += 1
        for parked in process.stock:
            if parked.frames is not None:
                counted[parked.frames] += 1
    for mirror in snapshot.mirrors:
        for serial in {part.frames for part in mirror.parts}:
            counted[serial] += 1
    held = [*(handle.frames for handle in snapshot.handles), *(grant.frames for grant in snapshot.grants)]
    for serial in [*snapshot.pinned, *held]:
        counted[serial] += 1
    return [
        Difference(
            f"frames {frames.serial} ({', '.join(frames.holders)})",
            0,
            f"{frames.refcount} references",
            f"{counted[frames.serial]} mappings and mirrors are there",
        )
        for frames in snapshot.frames
        if frames.refcount != counted[frames.serial]
    ]


def _descriptors(snapshot: Snapshot) -> list[Difference]:
    """The kernel's descriptors of segments: one for each in the books, and (where that can be told) no other."""
    books = snapshot.segments()
    found: Counter[tuple[int, int]] = Counter()
    names: dict[tuple[int, int], str] = {}
    exact = snapshot.alone and not snapshot.stats["taking"]  # frames that are being taken are in no books yet
    folder = f"/proc/{snapshot.pid}/fd"
    for number in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            name = os.readlink(f"{folder}/{number}")
            if os.path.dirname(name) == SHM:  # not what lies in the directory of sockets
                status = os.stat(f"{folder}/{number}")
                found[status.st_dev, status.st_ino] += 1
                names[status.st_dev, status.st_ino] = name
    found.subtract(Counter(snapshot.outbox))
    return [
        Difference(
            f"descriptors of inode {key[1]} ({names.get(key, 'a segment')})",
            0,
            f"{int(key in books)} of them",
            f"{found[key]} are open in the kernel",
            snapshot.pid,
        )
        for key in books | set(found)
        # A read-only one is open while an answer brings it to a process; the next look does not find it.
        if found[key] != (key in books) and (key in books or exact)
    ]


def _names(snapshot: Snapshot) -> list[Difference]:
    """The names in /dev/shm: those of the books' named segments, and none of this kernel's besides."""
    found: list[Difference] = []
    named: set[int] = set()
    for frames in snapshot.frames:
        for segment in frames.segments:
            if segment.name is not None:
                named.add(segment.inode)
                try:
                    inode = os.stat(f"{SHM}/{segment.name}").st_ino
                except FileNotFoundError:
                    inode = None
                if inode != segment.inode:
                    linux = "the name is gone" if inode is None else f"it is inode {inode}"
                    books = f"it is inode {segment.inode}"
                    found.append(Difference(f"{SHM}/{segment.name}", 0, books, linux, snapshot.pid))
    for name, inode in runtime.own_names(snapshot.pid).items():
        if inode in named:  # by which a sweep finds it
            continue
        books = "nothing has a name like this"
        found.append(Difference(f"{SHM}/{name}", 0, books, "it is there", snapshot.pid))
    return found


def _unregistered(snapshot: Snapshot) -> list[int]:
    known = {process.pid for process in snapshot.processes} | {snapshot.pid}
    return procfs.who_maps(snapshot.segments(), USER_LAND.start, USER_LAND.end, known)


def audit(take: Callable[[], Snapshot]) -> AuditReport:
    """Audits a kernel that is at work: a difference counts where every further look finds it again.

    The last look is one before which all whose differences they are were at rest, or the last for which there is time.
    `take` gives a new snapshot.
    """
    report = compare(take())
    pauses = iter(PAUSES)
    end = time.monotonic() + KEPT
    last = False
    while not (report or last):
        pause = next(pauses, PAUSES[-1])
        time.sleep(pause)
        last = pause == PAUSES[-1] and (time.monotonic() > end or not any(map(_is_kept, report.differences)))
        again = compare(take())
        before = set(report.differences)
        still = [difference for difference in again.differences if difference in before]
        report = msgspec.structs.replace(again, differences=still)
    return report


def _is_kept(difference: Difference) -> bool:
    """Whether whoever's it is may be in the middle of changing that, and is kept there."""
    try:
        return bool(difference.pid) and not procfs.is_at_rest(difference.pid)
    except OSError:  # it ends
        return True
