"""A table of which only what is on screen is ever written: as fast with ten thousand rows as with ten."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from rich.segment import Segment
from rich.style import Style
from textual.binding import Binding, BindingType
from textual.events import Click, Resize
from textual.geometry import Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from realmap.observe import words

T = TypeVar("T")


@dataclass(frozen=True)
class Column(Generic[T]):
    """A column: how wide (0: the rest of the line), what it says of a row, and what it is sorted by.

    `paint` in place of `text`: segments that fill the cells given. `least`: the width of the table from which on it
    is shown. `down`: the largest first.
    """

    title: str
    width: int
    text: Callable[[T], str] = lambda row: ""
    sort: Callable[[T], Any] | None = None
    right: bool = True
    down: bool = False
    least: int = 0
    paint: Callable[[T, int], list[Segment]] | None = None


class Rows(ScrollView, Generic[T], can_focus=True):
    """Rows with a cursor, sorted and filtered. A row is known again by its `key`: the cursor stays on it."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"rows--head", "rows--cursor"}
    DEFAULT_CSS = """
    Rows { background: $background; overflow-x: hidden; scrollbar-size-vertical: 1; scrollbar-gutter: stable; }
    Rows > .rows--head { color: $text-muted; background: $panel; text-style: bold; }
    Rows > .rows--cursor { background: $primary 30%; text-style: bold; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "Up", show=False),
        Binding("down,j", "move(1)", "Down", show=False),
        Binding("pageup", "page(-1)", "Page up", show=False),
        Binding("pagedown", "page(1)", "Page down", show=False),
        Binding("home", "move(-1000000000)", "First", show=False),
        Binding("end", "move(1000000000)", "Last", show=False),
        Binding("enter", "choose", "Detail"),
    ]

    class Chosen(Message):
        """Enter on a row, or a click on the row that has the cursor."""

        def __init__(self, rows: Rows[Any], row: Any) -> None:
            super().__init__()
            self.rows, self.row = rows, row

        @property
        def control(self) -> Rows[Any]:
            return self.rows

    def __init__(
        self, columns: Sequence[Column[T]], key: Callable[[T], Hashable], sorted_by: int = 0, id: str | None = None
    ) -> None:
        super().__init__(id=id)
        self.columns = columns
        self._key = key
        self.sorted_by = sorted_by
        self.reverse = False
        self.filter = ""
        self._all: Sequence[T] = ()
        self.shown: list[T] = []
        self.cursor = 0

    # ---- what is shown ----------------------------------------------------------------------

    def show(self, rows: Sequence[T]) -> None:
        at = self._key(self.shown[self.cursor]) if self.shown else None
        self._all = rows
        wanted = self.filter.casefold()
        found = [row for row in rows if not wanted or wanted in self._words(row)]
        column = self.columns[self.sorted_by]
        if column.sort is not None:
            found.sort(key=column.sort, reverse=column.down != self.reverse)
        self.shown = found
        if at is not None:
            self.cursor = next((number for number, row in enumerate(found) if self._key(row) == at), self.cursor)
        self.cursor = max(0, min(self.cursor, len(found) - 1))
        self._resized()
        self.refresh()

    @property
    def all(self) -> int:
        """How many rows there are without the filter."""
        return len(self._all)

    def _words(self, row: T) -> str:
        return " ".join(column.text(row) for column in self.columns).casefold()

    def set_filter(self, text: str) -> None:
        self.filter = text
        self.show(self._all)

    def sort_next(self, reverse: bool = False) -> None:
        """By the next column that one can sort by, or the same in the other direction."""
        if reverse:
            self.reverse = not self.reverse
        else:
            able = [at for at, column in enumerate(self.columns) if column.sort is not None]
            able = [at for at in able if self.columns[at].least <= self.size.width] or able
            self.sorted_by = next((at for at in able if at > self.sorted_by), able[0])
            self.reverse = False
        self.show(self._all)

    def rest(self, width: int | None = None) -> int:
        """Cells that the column of width 0 has; in a table of another width."""
        width = self.size.width if width is None else width
        return max(1, width - sum(column.width + 1 for column in self._visible(width) if column.width))

    def _visible(self, width: int) -> list[Column[T]]:
        return [column for column in self.columns if width >= column.least]

    # ---- lines ------------------------------------------------------------------------------

    def render_line(self, y: int) -> Strip:
        width = self.size.width
        if y == 0:
            style = self.get_component_rich_style("rows--head")
            return self._strip(
                [Segment(self._title(column)) for column in self._visible(self.size.width)], style, width
            )
        number, between = divmod(y - 1 + self.scroll_offset.y, self._pitch)
        if between or number >= len(self.shown):
            return Strip.blank(width, self.rich_style)
        row, segments = self.shown[number], []
        for column in self._visible(self.size.width):
            cells = column.width or self.rest()
            if column.paint is not None:
                segments += [*column.paint(row, cells), Segment(" ")]
            else:
                segments.append(Segment(self._fit(column, column.text(row), cells)))
        here = number == self.cursor and self.has_focus
        style = self.get_component_rich_style("rows--cursor") if here else self.rich_style
        return self._strip(segments, style, width)

    def _strip(self, segments: list[Segment], style: Style, width: int) -> Strip:
        return Strip(Segment.apply_style(segments, style)).crop_extend(0, width, style)

    def _title(self, column: Column[T]) -> str:
        mark = ""
        if column is self.columns[self.sorted_by] and column.sort is not None:
            mark = "▼" if column.down != self.reverse else "▲"
        return self._fit(column, column.title + mark, column.width or self.rest())

    def _fit(self, column: Column[T], text: str, cells: int) -> str:
        text = words.cut(text, cells)
        return (text.rjust(cells) if column.right and column.width else text.ljust(cells)) + " "

    # ---- the cursor -------------------------------------------------------------------------

    def _resized(self) -> None:
        self.virtual_size = Size(self.size.width, len(self.shown) * self._pitch + 1)

    @property
    def _pitch(self) -> int:
        """Lines from one row to the next: bars stand apart where there is room for all of them like that."""
        drawn = any(column.paint is not None for column in self.columns)
        return 2 if drawn and len(self.shown) * 2 + 1 <= self.size.height else 1

    def on_resize(self, event: Resize) -> None:
        self._resized()
        self._into_sight()

    def _into_sight(self) -> None:
        high = max(1, self.size.height - 1)
        top = self.scroll_offset.y
        if self.cursor < top:
            self.scroll_to(y=self.cursor, animate=False)
        elif self.cursor >= top + high:
            self.scroll_to(y=self.cursor - high + 1, animate=False)

    def action_move(self, by: int) -> None:
        self.cursor = max(0, min(self.cursor + by, len(self.shown) - 1))
        self._into_sight()
        self.refresh()

    def action_page(self, by: int) -> None:
        self.action_move(by * max(1, self.size.height - 2))

    def action_choose(self) -> None:
        if self.shown:
            self.post_message(self.Chosen(self, self.shown[self.cursor]))

    def on_click(self, event: Click) -> None:
        """On the head: sorted by that column. On a row: the cursor goes there; a second click chooses it."""
        if event.y == 0:
            self._sort_at(event.x)
            return
        number = (event.y - 1 + self.scroll_offset.y) // self._pitch
        if number < len(self.shown):
            again, self.cursor = number == self.cursor, number
            self.refresh()
            if again:
                self.action_choose()

    def _sort_at(self, x: int) -> None:
        edge = 0
        for column in self._visible(self.size.width):
            edge += (column.width or self.rest()) + 1
            if x < edge:
                if column.sort is not None:
                    at = list(self.columns).index(column)
                    self.reverse = not self.reverse if at == self.sorted_by else False
                    self.sorted_by = at
                    self.show(self._all)
                return
