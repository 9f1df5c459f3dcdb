"""What the screens show, made of a snapshot: rows, and the words at the top. Nothing here knows of a screen."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import msgspec

from realmap.cli.top.feed import Seen
from realmap.observe import words
from realmap.observe.picture import Lane, Numbers, Picture, draw, fitting_unit
from realmap.observe.snapshot import Snapshot
from realmap.observe.words import program
from realmap.rights import MappingAccessRights
from realmap.wire.records import FramesInfo, MappingInfo, ProcessInfo, RunningInfo, SeatInfo

#: Cells that a page takes where there is room.
WIDEST = 3.0


@dataclass(frozen=True)
class ProcessRow:
    """A process, and its lane of the picture."""

    process: ProcessInfo
    lane: Lane
    program: str
    #: The syscalls that worker threads are at for it.
    running: tuple[str, ...]

    @property
    def mirrored(self) -> int:
        """How many live mirrors show some of it."""
        return len({light.number for light in self.lane.lights})


@dataclass(frozen=True)
class MappingRow:
    """A mapping, the frames that it shows, and the numbers of the mirrors that show some of it."""

    mapping: MappingInfo
    frames: FramesInfo | None
    mirrors: tuple[int, ...]

    @property
    def rights(self) -> str:
        return str(MappingAccessRights(self.mapping.rights))


class View:
    """A snapshot as the screens show it. `cells`: of the lanes."""

    def __init__(self, seen: Seen, cells: int, numbers: Numbers) -> None:
        self.seen = seen
        self.snapshot: Snapshot = seen.snapshot
        self._numbers = numbers
        # In half steps: a mapping more or less does not change all of it.
        unit = max(1.0, math.floor(2 * fitting_unit(self.snapshot, cells, WIDEST)) / 2)
        self.picture: Picture = draw(seen.snapshot, cells, unit=unit, numbers=numbers)
        running = self.snapshot.running_by_process()
        self.processes = [
            ProcessRow(each, lane, program(each.pid), tuple(running.get(each.number, ())))
            for lane in self.picture.users
            if (each := lane.process) is not None
        ]

    @cached_property
    def frames(self) -> dict[int, FramesInfo]:
        """The frames, by serial number."""
        return self.snapshot.frames_by_serial()

    def process(self, kernel: int, number: int) -> ProcessRow | None:
        """By the kernel's pid and its number for it; None: it has gone, or that kernel has."""
        ours = self.processes if kernel == self.snapshot.pid else []
        return next((row for row in ours if row.process.number == number), None)

    def segment(self, kernel: int, serial: int) -> FramesInfo | None:
        """The frames of that serial; None: they are gone, or that kernel is."""
        return self.frames.get(serial) if kernel == self.snapshot.pid else None

    def running(self, process: ProcessInfo) -> list[RunningInfo]:
        """The calls of a process that worker threads, or services, are at."""
        return [each for each in self.snapshot.running if each.process == process.number]

    def at_work(self, call: RunningInfo) -> str:
        """What is called, of whom, and since when."""
        server = next((each.pid for each in self.snapshot.processes if each.number == call.server), None)
        whose = f" of process {server}" if server is not None else ""
        return words.harmless(f"in {call.syscall}{whose}") + f" {waited(call.seconds)}"

    def seats(self, process: ProcessInfo) -> list[SeatInfo]:
        return [each for each in self.snapshot.seats if each.process == process.number]

    def alone(self, process: ProcessInfo, cells: int) -> Picture:
        """A process by itself, larger."""
        snapshot = msgspec.structs.replace(self.snapshot, processes=[process])
        return draw(snapshot, cells, unit=2.0, numbers=self._numbers)

    def mappings(self, row: ProcessRow) -> list[MappingRow]:
        lights: dict[int, set[int]] = {}
        ordered = sorted(row.lane.lights, key=lambda light: light.address)
        at = 0
        for mapping in row.process.mappings:  # in order of address, too
            while at < len(ordered) and ordered[at].address < mapping.address + mapping.length:
                lights.setdefault(mapping.address, set()).add(ordered[at].number)
                at += 1
        return [
            MappingRow(
                mapping,
                None if mapping.frames is None else self.frames.get(mapping.frames),
                tuple(sorted(lights.get(mapping.address, ()))),
            )
            for mapping in row.process.mappings
        ]


def totals(snapshot: Snapshot) -> list[str]:
    """What there is now, the most telling first."""
    stats = snapshot.stats
    found = [
        words.counted(len(snapshot.processes), "process"),
        words.counted(stats["mappings"], "mapping"),
        f"{words.counted(stats['segments'], 'segment')} {words.size(stats['bytes'])}",
    ]
    if not snapshot.pid:  # the machine's
        return [*found, f"{len(snapshot.mirrors)} of them shared by several"]
    return [
        *found,
        words.counted(len(snapshot.mirrors), "mirror"),
        f"{len(snapshot.kept)} kept {words.size(stats['kept_bytes'])}",
        *([f"{len(snapshot.lent)} lent to services"] if snapshot.lent else []),
        words.counted(len(snapshot.handles), "handle"),
    ]


def rates(seen: Seen) -> list[str]:
    """How fast it goes, and what it took to find out."""
    stats, found = seen.snapshot.stats, []
    if not seen.snapshot.pid:
        return [words.counted(stats["descriptors"], "descriptor"), f"looked for {seen.took * 1e3:.0f} ms"]
    if seen.rates is None:
        found.append(f"{words.counted(stats['calls'], 'call')} so far")
    else:
        found.append(f"{words.count(seen.rates['calls'])} calls/s")
        found.append(f"{words.count(seen.rates['mirrored'])} mirrors/s")
        if seen.rates["kept_hits"]:
            found.append(f"{words.count(seen.rates['kept_hits'])} kept hits/s")
        found.append(f"{words.size(round(seen.rates['mirrored_bytes']))}/s")
    found.append(f"{stats['running']} running")
    found.append(f"{stats['descriptors']} descriptors")
    return [*found, f"snapshot {seen.took * 1e3:.0f} ms"]


def waited(seconds: float | None) -> str:
    """For how long a call has been at work."""
    return "waiting for its turn" if seconds is None else f"for {seconds:.1f} s"


def fitting(parts: Iterable[str], width: int) -> str:
    """As many of the parts as a line has room for."""
    line = ""
    for part in parts:
        longer = f"{line} · {part}" if line else part
        if len(longer) > width:
            break
        line = longer
    return line
