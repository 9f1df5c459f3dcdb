"""The address space as a drawing, in data: lanes of blocks, and what is lit on them. For the screen and SVG alike.

    Snapshot ──▶ draw(snapshot, cells) ──▶ Picture
                                             kernel   KernelLand ▐1▌ ▐22▌            mirrors, kept windows
                                             users    pid 4711   ▐██11██▌▐███▌       mappings; lit where mirrored,
                                                      pid 4712   ▐█22▌  ▐3▌          or lent: here to a server
                                                      pid 4713   ▐33█▌

A land has 16 TiB and a mapping some KiB, so addresses are squeezed: order is kept, a gap between neighbours is one
unit however wide it is, and a range is as long as the logarithm of its pages says (`weight`). A lane that would not
fit is shrunk, and ranges that fall into the same cell become one block with a count. A cell is a column of a
terminal, or some pixels. Nothing here knows of a screen.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

from realmap.observe.snapshot import Snapshot
from realmap.pages import PAGE_SIZE, align_up
from realmap.wire.records import LentInfo, MirrorInfo, PartInfo, ProcessInfo

#: Kinds of block beside the memory types of UserLand: on KernelLand, and of what a process was lent.
MIRROR, KEPT = "MIRROR", "KEPT"
#: Kinds of light beside those of mirrors: a server's window, and the pages of its caller that it shows.
WINDOW, LENT = "window of lent pages", "lent pages"
#: What a gap between ranges takes, in units; and a range of one page.
GAP, LEAST = 1.0, 3.0
#: Lights on UserLand in one picture: more can be told apart by nobody, and would cost a refresh its time.
LIGHTS = 2000


@dataclass(frozen=True, slots=True)
class Labels:
    """What the parts of a picture are called: the lane above, in short too; the lanes below; what is lit, and why."""

    above: str
    short: str
    below: str
    lit: str
    legend: str
    nobody: str


KERNEL = Labels(
    "KernelLand", "Kernel", "UserLand", "mirror", "a live mirror, and what it mirrors", "no process is connected"
)
MACHINE = Labels(
    "Shared by several", "Shared", "shared memory", "segment", "a segment, and who maps it", "no two share memory"
)


def labels(snapshot: Snapshot) -> Labels:
    """Those of a kernel, or of the machine (observe/machine.py)."""
    return KERNEL if snapshot.pid else MACHINE


@dataclass(frozen=True, slots=True)
class Block:
    """Cells of a lane, [left, left + width), and what lies there.

    `count` ranges from `address` to `end` with `bytes` in all; `kind` (a memory type, MIRROR or KEPT) and `rights`
    are those of the largest.
    """

    left: int
    width: int
    address: int
    end: int
    bytes: int
    count: int
    kind: str
    rights: int


@dataclass(frozen=True, slots=True)
class Light:
    """Cells where a live mirror shows: on KernelLand all of it, on UserLand the part of a mapping that it mirrors.

    Or where pages are lent (`kind`): a window on the server's lane, and what it shows on the caller's. `number`: the
    same on both ends. `address`, `bytes`: what is lit.
    """

    left: int
    width: int
    number: int
    address: int
    bytes: int
    kind: str = MIRROR


@dataclass(slots=True)
class Lane:
    """One process's UserLand, or KernelLand (`process` is None then)."""

    process: ProcessInfo | None
    blocks: list[Block] = field(default_factory=list)
    lights: list[Light] = field(default_factory=list)
    bytes: int = 0
    ranges: int = 0


@dataclass(slots=True)
class Picture:
    """Both lands. `unlit`: how many lights there were no room for."""

    kernel: Lane
    users: list[Lane]
    unlit: int = 0


class Numbers:
    """Numbers for live mirrors, and windows of lent pages: small ones, kept from one snapshot to the next."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], int] = {}

    def assign(self, mirrors: Iterable[MirrorInfo], lent: Iterable[LentInfo] = ()) -> list[int]:
        """A number for each, from 1 on."""
        keys = [(each.base, each.span, *(part.frames for part in each.parts[:1])) for each in mirrors]
        keys += [(each.at, each.length, -each.seat) for each in lent]
        known = {key: self._known[key] for key in keys if key in self._known}
        taken = set(known.values())
        free = (number for number in count(1) if number not in taken)
        for key in keys:
            if key not in known:
                known[key] = next(free)
        self._known = known
        return [known[key] for key in keys]


@dataclass(slots=True)
class _Range:
    """A range of addresses, and the cells that it got."""

    address: int
    length: int
    kind: str
    rights: int
    left: int = 0
    right: int = 0


def weight(length: int) -> float:
    """How long a range of `length` bytes is drawn, in units: LEAST for a page, one more for each doubling."""
    return LEAST + math.log2(max(1, align_up(length) // PAGE_SIZE))


def fitting_unit(snapshot: Snapshot, cells: int, most: float) -> float:
    """The unit, `most` at most, at which the fullest lane just fits: all others are drawn to the same scale."""
    lent = _lent_to(snapshot)
    lanes = [
        [each.length for each in (*process.mappings, *lent.get(process.number, ()))] for process in snapshot.processes
    ]
    lanes.append([mirror.span for mirror in snapshot.mirrors] + [window.span for window in snapshot.kept])
    longest = max(sum(weight(length) + GAP for length in lane) for lane in lanes)
    return min(most, cells / longest) if longest else most


def _lent_to(snapshot: Snapshot) -> dict[int, list[LentInfo]]:
    """The windows of lent pages, by the numbers of the processes that have them."""
    serves = {seat.number: seat.process for seat in snapshot.seats}
    found: dict[int, list[LentInfo]] = {}
    for each in snapshot.lent:
        found.setdefault(serves[each.seat], []).append(each)
    return found


def _arrange(ranges: Sequence[_Range], cells: int, unit: float) -> list[Block]:
    """Gives each range (in order of address) its cells, at most `unit` of them for a unit; the blocks that result."""
    at, end, spots = 0.0, None, []
    for each in ranges:
        if end is not None and each.address != end:
            at += GAP
        spots.append((at, at := at + weight(each.length)))
        end = each.address + each.length
    scale = min(unit, cells / at) if at else unit
    blocks: list[Block] = []
    edge = 0  # the first free cell
    run: list[_Range] = []
    for each, (low, high) in zip(ranges, spots, strict=True):
        left, right = int(low * scale), min(cells, int(high * scale))
        each.left, each.right = left, max(right, left + 1)
        if run and each.right <= edge:
            run.append(each)
            continue
        each.left = max(left, edge)
        if run:
            blocks.append(_block(run))
        run, edge = [each], each.right
    if run:
        blocks.append(_block(run))
    return blocks


def _block(run: list[_Range]) -> Block:
    first, largest = run[0], max(run, key=lambda each: each.length)
    end = run[-1].address + run[-1].length
    total = sum(each.length for each in run)
    return Block(
        first.left, first.right - first.left, first.address, end, total, len(run), largest.kind, largest.rights
    )


class _Shown:
    """Which mappings show a range of some frames: found by their offset, without looking through all of them."""

    def __init__(self, entries: list[tuple[int, int, int, _Range]]) -> None:
        """`entries`: (offset in the frames, its end, lane, range) of each mapping."""
        self._entries = sorted(entries, key=lambda entry: entry[:3])
        self._starts = [entry[0] for entry in self._entries]
        self._reach: list[int] = []  # the furthest end of the entries up to here
        for entry in self._entries:
            self._reach.append(max(entry[1], self._reach[-1] if self._reach else 0))

    def overlaps(self, part: PartInfo) -> Iterator[tuple[int, _Range, int, int]]:
        """(lane, range, first byte, last byte + 1) in each mapping that shows some of `part`."""
        end = part.offset + part.length
        for at in range(bisect_left(self._starts, end) - 1, -1, -1):
            if self._reach[at] <= part.offset:
                return
            start, stop, lane, found = self._entries[at]
            if stop > part.offset:
                yield lane, found, max(start, part.offset) - start, min(stop, end) - start


def _lit(found: _Range, low: int, high: int, number: int, kind: str = MIRROR) -> Light:
    """Bytes [low, high) of a range, as cells; one at least."""
    width = found.right - found.left
    left = found.left + min(width - 1, low * width // found.length)
    right = found.left + -(-high * width // found.length)
    return Light(left, max(1, right - left), number, found.address + low, high - low, kind)


def draw(
    snapshot: Snapshot,
    cells: int,
    *,
    unit: float = 1.0,
    numbers: Numbers | None = None,
    lights: int = LIGHTS,
) -> Picture:
    """The drawing of a snapshot.

    `cells`: of a lane. `unit`: cells that a unit of `weight`
    takes where there is room. `numbers`: those of the mirrors, carried over from the last drawing. `lights`: at most
    so many on UserLand.
    """
    cells = max(1, cells)
    shown = [each for each in snapshot.lent if not each.kept]
    marks = (numbers or Numbers()).assign(snapshot.mirrors, shown)
    lent = list(zip(shown, marks[len(snapshot.mirrors) :], strict=True))
    del marks[len(snapshot.mirrors) :]
    picture = Picture(_kernel_lane(snapshot, marks, cells, unit), [])
    wanted = {part.frames for mirror in snapshot.mirrors for part in mirror.parts}
    entries: dict[int, list[tuple[int, int, int, _Range]]] = {serial: [] for serial in wanted}
    windows, users = _lent_to(snapshot), {}
    for number, process in enumerate(snapshot.processes):
        ranges = [_Range(each.address, each.length, each.type, each.rights) for each in process.mappings]
        others = [
            _Range(each.at, each.length, KEPT if each.kept else MIRROR, each.rights)
            for each in sorted(windows.get(process.number, ()), key=lambda each: each.at)
        ]
        users[process.number] = number, ranges, others
        blocks = _arrange([*ranges, *others], cells, unit)
        total = sum(each.length for each in ranges)
        picture.users.append(Lane(process, blocks, [], total, len(ranges)))
        for mapping, found in zip(process.mappings, ranges, strict=True):
            if mapping.frames in wanted:
                spot = (mapping.phys_offset, mapping.phys_offset + mapping.length, number, found)
                entries[mapping.frames].append(spot)
    left = _light(picture, snapshot, marks, entries, lights)
    _light_lent(picture, {seat.number: seat.process for seat in snapshot.seats}, lent, users, left)
    return picture


def _kernel_lane(snapshot: Snapshot, marks: list[int], cells: int, unit: float) -> Lane:
    ranges = [
        (_Range(each.base, each.span, MIRROR, each.rights), number)
        for each, number in zip(snapshot.mirrors, marks, strict=True)
    ]
    ranges += [(_Range(each.base, each.span, KEPT, each.rights), 0) for each in snapshot.kept]
    ranges.sort(key=lambda entry: entry[0].address)
    blocks = _arrange([found for found, _ in ranges], cells, unit)
    lights = [
        Light(found.left, found.right - found.left, number, found.address, found.length)
        for found, number in ranges
        if number
    ]
    return Lane(None, blocks, lights, sum(found.length for found, _ in ranges), len(ranges))


def _light(
    picture: Picture,
    snapshot: Snapshot,
    marks: list[int],
    entries: dict[int, list[tuple[int, int, int, _Range]]],
    most: int,
) -> int:
    """Lights what the mirrors show, on the lanes of UserLand; how many lights there is still room for."""
    shown = {serial: _Shown(found) for serial, found in entries.items()}
    left = most
    for mirror, number in zip(snapshot.mirrors, marks, strict=True):
        for part in mirror.parts:
            for lane, found, low, high in shown[part.frames].overlaps(part):
                if not left:
                    picture.unlit += 1
                    break
                left -= 1
                picture.users[lane].lights.append(_lit(found, low, high, number))
    return left


def _light_lent(
    picture: Picture,
    serves: dict[int, int],
    lent: list[tuple[LentInfo, int]],
    users: dict[int, tuple[int, list[_Range], list[_Range]]],
    most: int,
) -> None:
    """Lights each window on its server's lane, and what it shows on its caller's, where these are drawn."""
    for each, number in lent:
        if not most:
            picture.unlit += 1
            continue
        most -= 1
        if serves[each.seat] in users:
            lane, _, windows = users[serves[each.seat]]
            found = windows[bisect_left(windows, each.at, key=lambda window: window.address)]
            picture.users[lane].lights.append(_lit(found, 0, found.length, number, WINDOW))
        lane, ranges, _ = users.get(each.process or 0, (0, [], []))
        for at in range(bisect_left(ranges, each.address, key=lambda found: found.address + found.length), len(ranges)):
            found = ranges[at]
            low, high = (
                max(0, each.address - found.address),
                min(found.length, each.address + each.length - found.address),
            )
            if high <= 0:
                break
            if low < high:
                picture.users[lane].lights.append(_lit(found, low, high, number, LENT))


def room(block: Block, lights: Iterable[Light]) -> tuple[int, int]:
    """Where a block's own label may stand, (left, width): the widest run of its cells that is not lit."""
    best, at = (block.left, 0), block.left
    end = block.left + block.width
    for light in [*sorted(lights, key=lambda each: each.left), Light(end, 0, 0, 0, 0)]:
        if light.left > end or light.left + light.width < block.left:
            continue
        if light.left - at > best[1]:
            best = (at, light.left - at)
        at = max(at, light.left + light.width)
    return best


def kinds(lanes: Iterable[Lane]) -> list[str]:
    """What their blocks are, in the order of a legend; mirrors are told of by themselves."""
    found = {block.kind for lane in lanes for block in lane.blocks}
    return sorted(found - {MIRROR}, key=lambda kind: (kind == KEPT, kind))


# ---- colours --------------------------------------------------------------------------------

#: Of blocks: dark enough for white letters, apart from each other by lightness too.
COLOURS = {
    "HEAP": "#33669e", "SHARED_MEMORY": "#1f7a6d", "IPC": "#46763c", "TRANSFER_MEMORY": "#46763c",
    "POSIX": "#33669e", "UNLINKED": "#75559f", "MEMFD": "#46763c", "SYSV": "#8d5f2b", "ANONYMOUS": "#5a6575",
    "CODE_STATIC": "#75559f", "CODE_MUTABLE": "#75559f", "STACK": "#8d5f2b", "THREAD_LOCAL": "#8d5f2b",
    KEPT: "#6b6b78",
}  # fmt: skip
OTHER = "#5a6575"
#: Of live mirrors, and of what they show: light, for black letters.
LIT = ("#ffc83d", "#ff7eb6", "#6fdc8c", "#5cc8ff", "#ff9f55", "#c5a3ff", "#e8ef60", "#4fd6be")


def colour(kind: str) -> str:
    return COLOURS.get(kind, OTHER)


def lit(number: int) -> str:
    """Of a mirror with this number, on both ends."""
    return LIT[(number - 1) % len(LIT)]
