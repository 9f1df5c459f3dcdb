"""All shared memory of the machine as rows: who holds each segment, who made it, whether anybody still can need it; and
every byte of /dev/shm, held against what the file system says.

    /proc, /dev/shm ─▶ host/shared_segments.look ─▶ report() ─▶ Report ─▶ a table, JSON, or what `reclaim` may take
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from realmap.host import SHM, procfs, shared_segments
from realmap.host.shared_segments import POSIX, SYSV, UNLINKED, Machine, Mount, Segment
from realmap.observe import words

if TYPE_CHECKING:
    from realmap.host.reclaim import Named

#: Looks at the most, where /dev/shm has changed during one.
TRIES = 3
#: Seconds for which nothing of a segment must have changed, where its name tells no maker.
OLDER = 3600.0
#: States of a segment: somebody has it; nobody has, and its maker lives, or is gone, or cannot be told.
USED, KEPT, ORPHAN, UNSURE = "used", "kept", "orphan", "unsure"
#: Inode of the machine's first pid namespace (include/linux/proc_ns.h, PROC_PID_INIT_INO): it contains all others.
FIRST_PID_NAMESPACE = 0xEFFFFFFC


class Family(NamedTuple):
    """Names that a program gives. `pattern`: group 1 is its maker's pid, where it tells; `program`: who it would be."""

    label: str
    pattern: str
    program: str = ""


#: Whose a name is. Each from the source that makes it, named beside it.
FAMILIES = [
    Family("realmap", r"realmap\.\d+\.(\d+)\.\d+\.\d+(?:\.\w+)?"),  # host/runtime.py
    Family("Python", r"psm_[0-9a-f]{8}"),  # CPython, Lib/multiprocessing/shared_memory.py, _make_filename
    Family("Python", r"sem\.mp-\w{8}"),  # CPython, Lib/multiprocessing/synchronize.py, SemLock._make_name
    Family("loky", r"sem\.loky-(\d+)-\w+"),  # loky/backend/synchronize.py, SemLock._make_name
    Family("torch", r"torch_(\d+)_\d+_\d+"),  # pytorch, aten/src/ATen/MapAllocator.cpp, NewProcessWideShmHandle
    Family("PostgreSQL", r"PostgreSQL\.\d+", r"postgres|postmaster"),  # src/backend/storage/ipc/dsm_impl.c
    Family("Open MPI", r"sm_segment\..+\.\d+\.[0-9a-f]+\.\d+"),  # opal/mca/btl/sm/btl_sm_component.c
    Family("Open MPI", r"vader_segment\..+\.[0-9a-f]+\.\d+"),  # the same; and before 4.0.2: issue 7220 there
    Family("Open MPI", r"open_mpi\.\d{4}"),  # opal/mca/shmem/posix; open-mpi/ompi, issue 7394
    Family("SGLang", r"sgl_shm_\w+_(\d+)_[0-9a-f]{8}"),  # python/sglang/srt/utils/stale_shm_cleanup.py, make_shm_name
    Family("SGLang", r"multi_tokenizer_args_(\d+)"),  # python/sglang/srt/managers/multi_tokenizer_mixin.py
    Family("vLLM", r"vllm_offload_.+\.mmap"),  # vllm's SharedOffloadRegion; vllm-project/vllm, pull request 51317
    Family("vLLM", r"VLLM_OBJECT_STORAGE_SHM_BUFFER\w*"),  # vllm-project/vllm, pull request 32429
    Family("NCCL", r"nccl-\w{6}"),  # nccl, src/misc/shmutils.cc, ncclShmOpen
    Family("semaphore", r"sem\..+"),  # glibc, SEM_SHM_PREFIX: any program's sem_open
]
#: What the names of each begin with: a pattern that is not needed is not compiled, which takes longer than a look.
_STARTS = tuple(re.split(r"\W", family.pattern, maxsplit=1)[0] for family in FAMILIES)


class HolderRow(NamedTuple):
    """A process that has it mapped so many times, and so many descriptors open on it."""

    pid: int
    program: str
    maps: int
    descriptors: int

    def __str__(self) -> str:
        if not self.descriptors:
            return f"{self.pid} {self.program} ({self.maps}x mapped)"
        mapped = f"{self.maps}x mapped, " if self.maps else ""
        return f"{self.pid} {self.program} ({mapped}{self.descriptors}x open)"


def holders_of(segment: Segment, program: Callable[[int], str]) -> list[HolderRow]:
    """Who holds a segment, by pid. `program`: the name of what runs as a pid."""
    opened = segment.opened
    maps = dict.fromkeys(opened, 0)
    for each in segment.maps:
        maps[each.pid] = maps.get(each.pid, 0) + 1
    return [HolderRow(pid, program(pid), count, opened.get(pid, 0)) for pid, count in sorted(maps.items())]


class SegmentRow(NamedTuple):
    """A segment. `size`, `resident` in bytes; `exact`: all that it takes, else at least so much is known of.

    `age`: seconds since anything of it last changed, None where Linux does not tell. `family`: whose names look so.
    `maker`: its pid, as far as the name or Linux tells. `state`: USED, or whether its maker may need it, and `why`.
    """

    kind: str
    name: str
    device: int
    inode: int
    size: int
    resident: int
    exact: bool
    uid: int | None
    age: float | None
    links: int
    family: str
    maker: int | None
    maker_program: str
    holders: list[HolderRow]
    state: str
    why: str


class ShmRow(NamedTuple):
    """A /dev/shm, in bytes. `through`: a process that has it, 0 for this one's own.

    `used`: what its file system says, None where that counts nothing. `explained`: what `named` and `unlinked` segments
    take, and `other` things with a name (directories, links). `unexplained`: what is left of `used`.
    `closed`: directories that this user may not read.
    """

    path: str
    through: int
    size: int | None
    used: int | None
    explained: int
    unexplained: int | None
    named: int
    unlinked: int
    other: int
    closed: int


class Total(NamedTuple):
    """Of a kind: how many there are, and their bytes."""

    segments: int
    size: int
    resident: int


class Report(NamedTuple):
    """The machine's shared memory at one moment; `time` in seconds since 1970.

    `elsewhere`: the /dev/shm of other mount namespaces. `processes` were looked into, `unseen` could not be.
    `blind`: in words, what cannot be seen from here.
    """

    time: float
    dev_shm: ShmRow | None
    elsewhere: list[ShmRow]
    totals: dict[str, Total]
    processes: int
    unseen: int
    blind: list[str]
    segments: list[SegmentRow]


def look() -> Machine:
    """Looks, again where this process's /dev/shm has changed meanwhile so that it does not add up.

    OSError: as `shared_segments.look`.
    """
    for _ in range(TRIES):
        machine = shared_segments.look()
        ours = machine.mounts[:1]
        if all(mount.steady or not _shm(mount, machine).unexplained for mount in ours):
            break
    return machine


def report(machine: Machine, older: float = OLDER) -> Report:
    """What was seen, as rows, the largest first. `older`: seconds, as OLDER."""
    judge = _Judge(machine, older)
    rows = [judge.row(segment) for segment in machine.segments]
    rows.sort(key=lambda row: (-row.resident, -row.size, row.kind, row.name))
    mounts = [_shm(mount, machine) for mount in machine.mounts]
    ours = mounts[0] if mounts and mounts[0].through == 0 else None
    kinds: dict[str, list[SegmentRow]] = {}
    for row in rows:
        kinds.setdefault(row.kind, []).append(row)
    totals = {
        kind: Total(len(these), sum(row.size for row in these), sum(row.resident for row in these))
        for kind, these in sorted(kinds.items())
    }
    return Report(
        machine.time, ours, [each for each in mounts if each is not ours], totals, machine.processes, machine.unseen,
        blind_spots(machine), rows,
    )  # fmt: skip


def _shm(mount: Mount, machine: Machine) -> ShmRow:
    sums = {POSIX: 0, UNLINKED: 0}
    for segment in machine.segments:
        if segment.device == mount.device and segment.kind in sums:
            sums[segment.kind] += segment.resident
    explained = sum(sums.values()) + mount.other
    through = 0 if mount.root == mount.path else int(mount.root.split("/")[2])
    return ShmRow(
        shown(mount.path), through, mount.size, mount.used, explained,
        None if mount.used is None else mount.used - explained, sums[POSIX], sums[UNLINKED], mount.other, mount.closed,
    )  # fmt: skip


def shown(name: str) -> str:
    """A name as text that any encoding can carry: bytes that are no UTF-8 as escapes."""
    return name if name.isascii() else os.fsencode(name).decode("utf-8", "backslashreplace")


def blind_spots(machine: Machine) -> list[str]:
    """What this process cannot see, in words. None: every process of the machine was looked into."""
    found = []
    if not procfs.pids():
        found.append("/proc shows no processes: who holds what cannot be told")
    elif not os.path.exists("/proc/1"):
        found.append("/proc hides processes of others (hidepid): what they hold is not told")
    if procfs.pids() and procfs.pid_namespace() != FIRST_PID_NAMESPACE:
        found.append("this is a pid namespace of its own: processes outside of it are not seen")
    if machine.unseen:
        held = "it holds" if machine.unseen == 1 else "they hold"
        found.append(f"{words.counted(machine.unseen, 'process')} may not be looked into: what {held} is not told")
    return found


def cannot_tell_makers(report: Report) -> str:
    """Why makers that look gone may live, in words: processes are hidden. "": every pid can be seen."""
    return next((spot for spot in report.blind if "may not be looked into" not in spot), "")


def reclaimable(
    machine: Machine, found: Report, names: Collection[str] = (), force: bool = False
) -> tuple[list[tuple[SegmentRow, Named]], list[tuple[str, str]]]:
    """Which segments of this process's own /dev/shm may go; and of `names` those that may not, and why.

    Without `names` every orphan; with them these alone, also where it cannot be told who made one, and with `force`
    where its maker may live. What somebody has may never go.
    """
    from realmap.host.reclaim import Named

    device = machine.mounts[0].device if found.dev_shm is not None else None
    rows = {(row.device, row.inode): row for row in found.segments if row.kind == POSIX and row.device == device}
    files = {
        segment.inode: Named(tuple(segment.names), segment.device, segment.inode)
        for segment in machine.segments
        if segment.kind == POSIX and segment.device == device
    }
    if not names:
        return [(row, files[row.inode]) for row in rows.values() if row.state == ORPHAN], []
    by_name = {words.harmless(shown(name)): file for file in files.values() for name in file.names}  # as it is shown
    by_name |= {name: file for file in files.values() for name in file.names}
    may, not_these = [], []
    for given in dict.fromkeys(names):
        file = by_name.get(given.removeprefix(f"{SHM}/").removeprefix("/"))
        if file is None:
            not_these.append((given, f"no segment in {SHM} has that name"))
            continue
        row = rows[file.device, file.inode]
        if row.state == USED:
            not_these.append((given, "in use by " + ", ".join(map(str, row.holders))))
        elif row.state == KEPT and not force:
            not_these.append((given, row.why))
        elif (row, file) not in may:
            may.append((row, file))
    return may, not_these


class _Judge:
    """Says of each segment whose it is, and whether anybody can still need it."""

    def __init__(self, machine: Machine, older: float) -> None:
        self._now, self._older = machine.time, older
        self._program = cache(words.program)
        self._inner: set[int] | None = None
        self._running: set[tuple[str, int]] | None = None

    def row(self, segment: Segment) -> SegmentRow:
        family, stamped = family_of(segment)
        maker = stamped or (segment.makers[0] if segment.makers else None)
        used = segment.maps or segment.opened or segment.attached
        state, why = (USED, "") if used else self._verdict(segment, family, stamped)
        return SegmentRow(
            segment.kind, shown(segment.name), segment.device, segment.inode, segment.size, segment.resident,
            segment.exact, segment.uid, None if segment.touched is None else max(0.0, self._now - segment.touched),
            len(segment.names), family.label if family else "", maker, self._program(maker) if maker else "",
            holders_of(segment, self._program), state, why,
        )  # fmt: skip

    def _verdict(self, segment: Segment, family: Family | None, stamped: int | None) -> tuple[str, str]:
        """Of one that nobody holds: its state, and how that is known."""
        if segment.kind == SYSV:
            left = [pid for pid in segment.makers if pid and self._lives(pid, segment)]
            if left:
                return KEPT, f"{left[0]}, which made or used it, lives"
            return ORPHAN, f"who made it and who used it last have ended: ipcrm -m {segment.inode}"
        if segment.kind != POSIX:  # it went while it was looked at
            return UNSURE, ""
        if family is None:
            return UNSURE, "no program is known to give such names"
        if stamped is not None:
            if family.label == "realmap":
                from realmap.host import runtime  # here: nobody else needs it

                alive = runtime.maker_lives(segment.name.removeprefix(runtime.SEGMENT_PREFIX))
            else:
                alive = self._lives(stamped, segment)
            return (KEPT, f"its maker, {stamped}, may live") if alive else (ORPHAN, f"its maker, {stamped}, has ended")
        if family.program:
            runs = self._runs(family.program, segment.uid)
            return (KEPT, f"{family.label} runs") if runs else (ORPHAN, f"{family.label} does not run")
        idle = self._now - (segment.touched or self._now)
        if idle < self._older:
            return UNSURE, f"it was changed {words.lapse(idle)} ago, and may be on its way to somebody"
        return ORPHAN, f"nothing has changed it for {words.lapse(idle)}"

    def _lives(self, pid: int, segment: Segment) -> bool:
        """Whether the maker with that pid may live: a process that started after the segment was there is another."""
        try:
            return procfs.started(pid) <= (segment.touched or self._now) + 1
        except ProcessLookupError:
            if self._inner is None:
                self._inner = procfs.inner_pids()
            return pid in self._inner

    def _runs(self, program: str, uid: int | None) -> bool:
        if self._running is None:
            self._running = {found for pid in procfs.pids() if (found := _who(pid))}
        return any(re.fullmatch(program, name) and owner == uid for name, owner in self._running)


def _who(pid: int) -> tuple[str, int] | None:
    """Its program, as Linux has it, and its user; None: it has ended."""
    try:
        return procfs.comm(pid), os.stat(f"/proc/{pid}").st_uid
    except (ProcessLookupError, FileNotFoundError):
        return None


def family_of(segment: Segment) -> tuple[Family | None, int | None]:
    """Whose names look like this one's, and the maker's pid in it."""
    if segment.kind in (POSIX, UNLINKED) and segment.name.startswith(_STARTS):
        for start, family in zip(_STARTS, FAMILIES, strict=True):
            mine = segment.name.startswith(start)
            if mine and (found := re.fullmatch(family.pattern, segment.name, re.DOTALL)):
                return family, int(found[1]) if found.groups() else None
    return None, None
