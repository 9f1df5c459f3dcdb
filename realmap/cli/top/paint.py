"""Lanes of the picture as cells of a terminal: colours, numbers of mirrors, sizes where there is room."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from rich.segment import Segment
from rich.style import Style

from realmap.observe import words
from realmap.observe.picture import MIRROR, Block, Lane, Light, colour, kinds, lit, room

#: The last cell of a block is half of one, so that neighbours can be told apart.
EDGE = "▌"
BARS = " ▁▂▃▄▅▆▇█"
WHITE, BLACK = "#ffffff", "#101216"


@lru_cache(1024)
def _style(ink: str | None, paper: str | None, bold: bool = False) -> Style:
    return Style(color=ink, bgcolor=paper, bold=bold)


class Canvas:
    """A line of cells, each with a letter and its colours."""

    def __init__(self, cells: int) -> None:
        self.letters = [" "] * cells
        self.papers: list[str | None] = [None] * cells
        self.inks: list[tuple[str | None, bool]] = [(None, False)] * cells

    def fill(self, left: int, width: int, paper: str) -> None:
        """Cells in one colour; the last of several is half of one, with what was there behind it."""
        end = min(left + width, len(self.letters))
        if width > 1 and end - 1 >= left:
            end -= 1
            self.letters[end] = EDGE
            self.inks[end] = (paper, False)
        for at in range(left, end):
            self.letters[at] = " "
            self.papers[at] = paper

    def write(self, left: int, width: int, text: str, ink: str, bold: bool = False) -> None:
        """`text` in the middle of these cells but the last, which is an edge; where it does not fit, nothing."""
        space = max(1, width - 1)
        if width and len(text) <= space:
            start = left + (space - len(text)) // 2
            for at, letter in enumerate(text, start):
                if at < len(self.letters):
                    self.letters[at], self.inks[at] = letter, (ink, bold)

    def segments(self) -> list[Segment]:
        """Runs of the same style."""
        found: list[Segment] = []
        run, before = "", None
        for letter, paper, ink in zip(self.letters, self.papers, self.inks, strict=True):
            look = (ink[0], paper, ink[1])
            if look != before and run and before is not None:
                found.append(Segment(run, _style(*before)))
                run = ""
            run, before = run + letter, look
        if before is not None:
            found.append(Segment(run, _style(*before)))
        return found


def lane(shown: Lane, cells: int) -> list[Segment]:
    """A lane in exactly `cells` columns."""
    canvas = Canvas(cells)
    by_left = sorted(shown.lights, key=lambda light: light.left)
    for block in shown.blocks:
        if block.kind != MIRROR:
            _block(canvas, block, by_left)
    for light in reversed(by_left):
        canvas.fill(light.left, light.width, lit(light.number))
        canvas.write(light.left, light.width, str(light.number), BLACK, True)
    return canvas.segments()


def _block(canvas: Canvas, block: Block, lights: Iterable[Light]) -> None:
    canvas.fill(block.left, block.width, colour(block.kind))
    label = words.short_size(block.bytes) if block.count == 1 else f"{block.count}x"
    left, width = room(block, lights)
    canvas.write(left, width, label, WHITE)


def legend(lanes: Iterable[Lane], what: str = "mirror") -> list[Segment]:
    found = []
    for kind in kinds(lanes):
        found += [Segment("  ", _style(None, colour(kind))), Segment(f" {kind.lower()}  ")]
    for number in (1, 2, 3):
        found.append(Segment(f" {number}", _style(BLACK, lit(number), True)))
    return [*found, Segment(f" {what}, lit on both ends")]


def sparkline(values: Iterable[float], width: int) -> str:
    """The last `width` values as bars, beside the largest of them."""
    last = list(values)[-width:] if width > 0 else []
    highest = max(last, default=0)
    return "".join(BARS[round(value / highest * 8) if highest else 0] for value in last)
