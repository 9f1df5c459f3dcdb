"""A snapshot's address space as SVG: KernelLand above, a lane for each process below, ribbons from mirror to mirrored.

Plain SVG for papers, issues and web pages: no script, nothing from outside, light or dark as the reader's page is,
and the same text for the same snapshot.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from xml.sax.saxutils import escape, quoteattr

from realmap.observe import words
from realmap.observe.picture import (
    KEPT,
    MIRROR,
    WINDOW,
    Block,
    Labels,
    Lane,
    Light,
    Picture,
    colour,
    draw,
    fitting_unit,
    kinds,
    labels,
    lit,
    room,
)
from realmap.observe.snapshot import Snapshot
from realmap.rights import MappingAccessRights

#: Pixels: a cell; the column of names; all of it; a lane's bar, and from one lane to the next.
CELL, LEFT, WIDTH, BAR, STEP = 4, 150, 1000, 26, 46
TOP, GAP, FOOT = 84, 74, 56
CELLS = (WIDTH - LEFT - 20) // CELL
#: Cells for a unit of weight at the most, and at the least: a page takes 72 pixels where there is room, or 36.
UNIT, LEAST_UNIT = 6.0, 3.0
#: Pixels a letter: what is written into a block must fit.
LETTER = 6.2
#: Ribbons beyond these would only cover each other.
RIBBONS = 200
LANES = 40
#: Said of what is lit as well, where there is any.
LENT_TOO = "; or a window of a service, and the pages that it was lent"
#: Letters of a program's name that fit beside its pid.
LONGEST = 12

#: Of this drawing alone: a notebook puts it into a page with others.
STYLE = """
.realmap text { font: 12px system-ui, 'DejaVu Sans', sans-serif; fill: #1f2430 }
.realmap .head { font-size: 17px; font-weight: 600 }
.realmap .name { font-weight: 600 }
.realmap .soft { fill: #5d6675; font-size: 11px }
.realmap .in { font-size: 11px; fill: #ffffff; text-anchor: middle }
.realmap .on { font-size: 11px; font-weight: 700; fill: #14161c; text-anchor: middle }
.realmap .paper { fill: #ffffff }
.realmap .land { fill: #eef1f5; stroke: #cfd6df }
.realmap .lit { stroke: #14161c; stroke-width: 0.7 }
.realmap .tie { fill-opacity: 0.42 }
@media (prefers-color-scheme: dark) {
  .realmap text { fill: #e8ebf0 }
  .realmap .soft { fill: #a3adbb }
  .realmap .paper { fill: #14171d }
  .realmap .land { fill: #1e232c; stroke: #39414e }
  .realmap .tie { fill-opacity: 0.34 }
  .realmap .in { fill: #ffffff }
  .realmap .on { fill: #14161c }
}
""".strip()


def svg(snapshot: Snapshot, *, lanes: int = LANES, programs: Mapping[int, str] | None = None) -> str:
    """The drawing as a document.

    `lanes`: at most so many processes, those with the most bytes mirrored or mapped. `programs`: their names by pid.
    """
    unit = max(LEAST_UNIT, fitting_unit(snapshot, CELLS, UNIT))
    picture = draw(snapshot, CELLS, unit=unit, lights=RIBBONS)
    busiest = sorted(picture.users, key=lambda lane: (bool(lane.lights), lane.bytes), reverse=True)[:lanes]
    chosen = {id(lane) for lane in busiest}
    users = [lane for lane in picture.users if id(lane) in chosen]
    height = TOP + BAR + GAP + STEP * max(1, len(users)) + FOOT
    return "\n".join(_document(snapshot, picture, users, height, programs or {})) + "\n"


def _document(
    snapshot: Snapshot, picture: Picture, users: list[Lane], height: int, programs: Mapping[int, str]
) -> Iterator[str]:
    said = _said(snapshot)
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'class="realmap" role="img">'
    )
    names = labels(snapshot)
    head = f"kernel {snapshot.pid}" if snapshot.pid else snapshot.path
    whose = "a realmap kernel and its processes" if snapshot.pid else "processes that share memory"
    yield f"<title>The address space of {whose}</title>"
    yield f"<desc>{_text(said)}</desc>"
    yield f"<style>{STYLE}</style>"
    yield f'<rect class="paper" width="{WIDTH}" height="{height}"/>'
    yield f'<text class="head" x="16" y="30">{_text(f"realmap: {head}")}</text>'
    moment = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(snapshot.time))
    yield f'<text class="soft" x="{WIDTH - 20}" y="30" text-anchor="end">{moment}</text>'
    yield f'<text class="soft" x="16" y="50">{_text(said)}</text>'
    places = {id(lane): TOP + BAR + GAP + STEP * at for at, lane in enumerate(users)}
    yield from _bar(picture.kernel, TOP, names, _above(snapshot, names))
    yield from _ribbons(picture, users, places)
    for lane in users:
        assert lane.process is not None
        detail = f"{words.counted(lane.ranges, 'mapping')}, {words.size(lane.bytes)}"
        yield from _bar(lane, places[id(lane)], names, detail, _name(lane.process.pid, programs))
    bottom = TOP + BAR + GAP + STEP * len(users)
    if not users:
        yield f'<text class="soft" x="{LEFT}" y="{bottom + 16}">{names.nobody}</text>'
    yield from _foot(picture, users, height, names)
    yield "</svg>"


def _name(pid: int, programs: Mapping[int, str]) -> str:
    return f"{words.cut(programs.get(pid, 'pid'), LONGEST)} {pid}"


def _text(text: str) -> str:
    """As text of an element: control characters, which XML has no way to write, as escapes."""
    return escape(words.harmless(text))


def _said(snapshot: Snapshot) -> str:
    stats = snapshot.stats
    parts = [words.counted(len(snapshot.processes), "process"), words.counted(stats["mappings"], "mapping")]
    parts += [words.counted(stats["segments"], "segment") + f" of {words.size(stats['bytes'])}"]
    if snapshot.lent:
        parts += [words.counted(len(snapshot.lent), "window") + " of lent pages"]
    lit = len(snapshot.mirrors)
    parts += [words.counted(lit, "live mirror") if snapshot.pid else f"{lit} of them shared by several"]
    return f"{snapshot.path}: " + ", ".join(parts)


def _above(snapshot: Snapshot, names: Labels) -> str:
    kept = f", {len(snapshot.kept)} kept" if snapshot.kept else ""
    return words.counted(len(snapshot.mirrors), names.lit) + kept


def _bar(lane: Lane, top: int, names: Labels, detail: str, name: str = "") -> Iterator[str]:
    yield f'<text class="name" x="16" y="{top + 12}">{_text(name or names.above)}</text>'
    yield f'<text class="soft" x="16" y="{top + 25}">{_text(detail)}</text>'
    yield f'<rect class="land" x="{LEFT - 4}" y="{top - 4}" width="{CELLS * CELL + 8}" height="{BAR + 8}" rx="4"/>'
    for block in lane.blocks:
        if block.kind != MIRROR:
            yield from _block(block, lane.lights, top)
    yield from _lights(lane, top, names)


def _box(left: int, width: int, top: int, rest: str, title: str) -> str:
    return (
        f'<rect x="{LEFT + left * CELL}" y="{top}" width="{max(2, width * CELL - 1)}" height="{BAR}" rx="2" {rest}>'
        f"<title>{_text(title)}</title></rect>"
    )


def _letters(left: int, width: int, top: int, text: str, kind: str) -> Iterator[str]:
    """`text` in the middle of these cells, where it fits."""
    if len(text) * LETTER <= width * CELL - 4:
        middle = LEFT + left * CELL + width * CELL / 2
        yield f'<text class="{kind}" x="{middle:g}" y="{top + BAR / 2 + 4:g}">{_text(text)}</text>'


def _block(block: Block, lights: list[Light], top: int) -> Iterator[str]:
    rights = MappingAccessRights(block.rights)
    what = f"{block.kind} {rights}" if block.count == 1 else f"{block.count} ranges, the largest {block.kind}"
    title = f"{what}: {words.size(block.bytes)} at {block.address:#x}"
    yield _box(block.left, block.width, top, f"fill={quoteattr(colour(block.kind))}", title)
    label = words.size(block.bytes) if block.count == 1 else f"{block.count} x"
    yield from _letters(*room(block, lights), top, label, "in")


def _lights(lane: Lane, top: int, names: Labels) -> Iterator[str]:
    seen: set[tuple[int, int]] = set()
    where = names.above if lane.process is None else names.below
    for light in lane.lights:
        if (light.left, light.width) not in seen:  # one would lie upon the other
            seen.add((light.left, light.width))
            what = names.lit if light.kind == MIRROR else light.kind
            title = f"{what} {light.number}: {words.size(light.bytes)} at {light.address:#x} in {where}"
            yield _box(light.left, light.width, top, f'class="lit" fill="{lit(light.number)}"', title)
            yield from _letters(light.left, light.width, top, str(light.number), "on")


def _ribbons(picture: Picture, users: list[Lane], places: dict[int, int]) -> Iterator[str]:
    """From each mirror, and each window of lent pages, to what it shows."""
    windows = {light.number: (light, TOP) for light in picture.kernel.lights}
    windows |= {
        light.number: (light, places[id(lane)]) for lane in users for light in lane.lights if light.kind == WINDOW
    }
    seen: set[tuple[int, int, int, int, int]] = set()
    for lane in users:
        for light in lane.lights:
            if light.kind == WINDOW or light.number not in windows:  # its server is not drawn
                continue
            (window, high), low = windows[light.number], places[id(lane)]
            spot = (window.left, high, light.left, light.width, low)
            if spot not in seen and high != low:
                seen.add(spot)
                edges = (high + BAR, low) if high < low else (high, low + BAR)
                yield f'<path class="tie" fill="{lit(light.number)}" d="{_ribbon(window, light, *edges)}"/>'


def _ribbon(window: Light, light: Light, high: int, low: int) -> str:
    half = (high + low) / 2
    (a, b), (c, d) = ((LEFT + each.left * CELL, LEFT + (each.left + each.width) * CELL - 1) for each in (window, light))
    return f"M{a} {high}C{a} {half:g} {c} {half:g} {c} {low}H{d}C{d} {half:g} {b} {half:g} {b} {high}Z"


def _foot(picture: Picture, users: list[Lane], height: int, names: Labels) -> Iterator[str]:
    """What the colours mean, and what was left out."""
    at, y = 16.0, height - 30
    for kind in kinds([*users, picture.kernel]):
        label = "kept for its next use" if kind == KEPT else kind
        yield f'<rect x="{at:g}" y="{y - 10}" width="12" height="12" rx="2" fill="{colour(kind)}"/>'
        yield f'<text class="soft" x="{at + 18:g}" y="{y}">{_text(label)}</text>'
        at += 34 + len(label) * 7.2
    lent = any(light.kind == WINDOW for lane in users for light in lane.lights)
    if picture.kernel.lights or lent:
        for number in range(1, 4):
            yield f'<rect x="{at:g}" y="{y - 10}" width="12" height="12" rx="2" class="lit" fill="{lit(number)}"/>'
            at += 15
        yield f'<text class="soft" x="{at + 4:g}" y="{y}">{names.legend}{LENT_TOO * lent}</text>'
    left_out = []
    if len(users) < len(picture.users):
        left_out.append(f"{len(picture.users) - len(users)} processes more")
    if picture.unlit:
        left_out.append(f"{picture.unlit} places that are mirrored, too")
    note = "lengths are logarithmic, gaps are squeezed" + "".join(f"; {each}" for each in left_out)
    yield f'<text class="soft" x="16" y="{height - 10}">{_text(note)}</text>'
