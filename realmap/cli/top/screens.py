"""The screens of `realmap top`: everything, one process, one segment, help."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar

from rich.segment import Segment, Segments
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.css.query import NoMatches
from textual.screen import ModalScreen, Screen
from textual.widgets import ContentSwitcher, Footer, Input, Static

from realmap.cli.top import paint
from realmap.cli.top.rows import Column, Rows
from realmap.cli.top.view import MappingRow, ProcessRow, View, fitting, rates, totals
from realmap.observe import words
from realmap.observe.picture import labels
from realmap.wire.records import CallInfo, FramesInfo

if TYPE_CHECKING:
    from realmap.cli.top.app import Top

PROCESSES: list[Column[ProcessRow]] = [
    Column("pid", 7, lambda row: str(row.process.pid), lambda row: row.process.pid),
    Column("program", 12, lambda row: words.harmless(row.program), lambda row: row.program, least=50, right=False),
    Column("running", 12, lambda row: words.harmless(", ".join(row.running)), lambda row: row.process.calls, down=True,
           least=110, right=False),
    Column("maps", 5, lambda row: str(row.lane.ranges), lambda row: row.lane.ranges, down=True, least=40),
    Column("bytes", 8, lambda row: words.size(row.lane.bytes), lambda row: row.lane.bytes, down=True, least=70),
    Column("lit", 4, lambda row: str(row.mirrored or ""), lambda row: row.mirrored, down=True, least=70),
    Column("UserLand", 0, lambda row: " ".join(sorted({each.type for each in row.process.mappings})),
           paint=lambda row, cells: paint.lane(row.lane, cells)),
]  # fmt: skip

SEGMENTS: list[Column[FramesInfo]] = [
    Column("frames", 7, lambda row: str(row.serial), lambda row: row.serial),
    Column("refs", 6, lambda row: str(row.refcount), lambda row: row.refcount, down=True),
    Column("bytes", 8, lambda row: words.size(row.length), lambda row: row.length, down=True, least=40),
    Column("segs", 6, lambda row: str(len(row.segments)), lambda row: len(row.segments), down=True, least=50),
    Column("holders", 0, lambda row: words.harmless(", ".join(row.holders)), right=False),
]

CALLS: list[Column[CallInfo]] = [
    Column("calls", 9, lambda row: str(row.count), lambda row: row.count, down=True),
    Column("failed", 7, lambda row: str(row.failed or ""), lambda row: row.failed, down=True, least=60),
    Column("p50", 8, lambda row: _took(row.p50), lambda row: row.p50 or 0, down=True, least=40),
    Column("p99", 8, lambda row: _took(row.p99), lambda row: row.p99 or 0, down=True),
    Column("longest", 8, lambda row: _took(row.longest), lambda row: row.longest or 0, down=True, least=50),
    Column("blocking", 8, lambda row: "yes" if row.blocking else "", least=70, right=False),
    Column("servers", 7, lambda row: _servers(row), lambda row: row.servers or 0, down=True, least=80),
    Column("syscall", 0, lambda row: words.harmless(row.name), lambda row: row.name, right=False),
]

MAPPINGS: list[Column[MappingRow]] = [
    Column("address", 14, lambda row: f"{row.mapping.address:#x}", lambda row: row.mapping.address),
    Column("bytes", 8, lambda row: words.size(row.mapping.length), lambda row: row.mapping.length, down=True, least=30),
    Column("type", 14, lambda row: row.mapping.type, lambda row: row.mapping.type, least=50, right=False),
    Column("rights", 6, lambda row: row.rights, least=60, right=False),
    Column("frames", 7, lambda row: "" if row.frames is None else str(row.frames.serial),
           lambda row: row.mapping.frames or 0, least=60),
    Column("offset", 9, lambda row: f"{row.mapping.phys_offset:#x}", least=80),
    Column("refs", 6, lambda row: "" if row.frames is None else str(row.frames.refcount),
           lambda row: row.frames.refcount if row.frames else 0, down=True, least=70),
    Column("mirrors", 0, lambda row: ", ".join(map(str, row.mirrors)), lambda row: len(row.mirrors), down=True,
           right=False),
]  # fmt: skip

HOLDERS: list[Column[str]] = [Column("holder of a reference", 0, words.harmless, lambda row: row, right=False)]


def _took(seconds: float | None) -> str:
    return "" if seconds is None else words.duration(1e9 * seconds)


def _servers(row: CallInfo) -> str:
    return "" if row.servers is None else str(row.servers)


class Head(Static):
    """A line or several that never wrap."""

    DEFAULT_CSS = "Head { height: 1; width: 100%; text-wrap: nowrap; text-overflow: ellipsis; }"

    def say(self, text: str) -> None:
        """Plain text: what a name holds is no markup."""
        self.draw([Segment(text)])

    def draw(self, segments: list[Segment]) -> None:
        """In its own colours. It is as large as it was: nothing is laid out anew."""
        self.update(Segments(segments), layout=False)


#: What is said where there is no kernel; why, the first line says.
NOTHING = "nothing to show; a kernel that starts appears here by itself"


class Live(Screen[None]):
    """A screen that is shown each new view. `table` is the one that keys are about."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("s", "sort", "Sort"),
        Binding("S", "sort(True)", "Other way", show=False),
        Binding("slash", "filter", "Filter"),
        Binding("escape", "back", "Back", show=False),
    ]

    app: Top

    @property
    def table(self) -> Rows[Any]:
        return self.query_one(Rows)

    def show(self, view: View) -> None:
        raise NotImplementedError

    def on_mount(self) -> None:
        self.table.focus()
        self.again()

    def on_resize(self) -> None:
        self.call_after_refresh(self.again)

    def again(self) -> None:
        """Draws the last view once more, at the width that there is now."""
        self.measure()
        self.present(self.app.view)

    def present(self, view: View | None) -> None:
        """Shows it, unless there is nothing to show it with. None: no kernel runs, or none is known of yet."""
        if self.is_mounted:
            with suppress(NoMatches):  # its parts are still being made, or go already
                if view is not None:
                    self.show(view)
                else:
                    self._show_nothing()

    def _show_nothing(self) -> None:
        """What the last kernel had is not what there is."""
        for rows in self.query(Rows):
            rows.show([])
        first, *others = self.query(Head).exclude("#title")
        first.say(f" {NOTHING}")
        for head in others:
            head.say("")

    def measure(self) -> None:
        """Tells the app how wide the lanes of this screen are, where it has any."""

    def marks(self) -> list[str]:
        """What the first line is to say of the table: that not all of it is shown."""
        with suppress(NoMatches):
            table = self.table
            if table.filter:
                return [f'"{words.harmless(table.filter)}": {len(table.shown)} of {table.all}, Esc ends it']
        return []

    def action_sort(self, reverse: bool = False) -> None:
        self.table.sort_next(reverse)

    def action_filter(self) -> None:
        if not self.query(Input):
            field = Input(
                self.table.filter,
                placeholder="what a row must say: a pid, a program, a type …",
                compact=True,
                id="filter",
            )
            self.mount(field, before=self.query_one(Footer))
            field.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        self._filter(event.value)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self._end_filter()

    def _filter(self, text: str) -> None:
        self.table.set_filter(text)
        self.app.show()

    def _end_filter(self) -> None:
        self.query(Input).remove()
        self.table.focus()

    def action_back(self) -> None:
        if self.query(Input) or self.table.filter:
            self._filter("")
            self._end_filter()
        elif len(self.app.screen_stack) > 1:
            self.app.pop_screen()

    def action_choose(self) -> None:
        """Enter, wherever the focus is."""
        self.table.action_choose()


class Main(Live):
    """Totals and rates, KernelLand, and below it a lane for each process, or the segments, or the syscalls."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("1", "tab('processes')", "Processes"),
        Binding("2", "tab('segments')", "Segments"),
        Binding("3", "tab('calls')", "Syscalls"),
    ]

    def compose(self) -> ComposeResult:
        yield Head(id="title")
        yield Head(id="totals")
        yield Head(id="rates")
        yield Head(id="kernel")
        with ContentSwitcher(initial="processes"):
            yield Rows(PROCESSES, lambda row: row.process.number, id="processes")
            yield Rows(SEGMENTS, lambda row: row.serial, sorted_by=1, id="segments")
            yield Rows(CALLS, lambda row: row.name, id="calls")
        yield Head(id="legend")
        yield Footer(show_command_palette=False, compact=True)

    @property
    def table(self) -> Rows[Any]:
        return self.query_one(f"#{self.query_one(ContentSwitcher).current}", Rows)

    def action_tab(self, name: str) -> None:
        self.query(Input).remove()
        self.query_one(ContentSwitcher).current = name
        self.table.focus()
        self.again()

    def label(self) -> int:
        """How wide the names of lanes are. (A table that is not to be seen has no width of its own.)"""
        width = self.size.width - 1  # without the scroll bar
        return width - self.query_one("#processes", Rows).rest(width)

    def measure(self) -> None:
        """Those of the table, and KernelLand's, which start where those do."""
        cells = max(1, self.size.width - 1 - self.label())
        self.app.measured(cells)

    def show(self, view: View) -> None:
        width = self.size.width
        self.query_one("#totals", Head).say(" " + fitting(totals(view.snapshot), width - 2))
        line = fitting(rates(view.seen), width - 2)
        graph = paint.sparkline(view.seen.history, min(40, width - len(line) - 4))
        self.query_one("#rates", Head).say(f" {line}  {graph}")
        label = self.label()
        names, mirrors = labels(view.snapshot), len(view.snapshot.mirrors)
        choice = (f"{names.above}, {mirrors} lit", names.above, names.short)
        name = next((each for each in choice if len(each) < label), "")
        lane = paint.lane(view.picture.kernel, max(1, width - 1 - label))
        self.query_one("#kernel", Head).draw([Segment(f" {name}".ljust(label)), *lane])
        legend = paint.legend([view.picture.kernel, *view.picture.users], names.lit)
        self.query_one("#legend", Head).draw([Segment(" "), *legend])
        rows = self.query_one("#processes", Rows)
        rows.show(view.processes)
        shown = self.query_one(ContentSwitcher).current
        if shown == "segments":
            self.query_one("#segments", Rows).show(view.snapshot.frames)
        elif shown == "calls":
            self.query_one("#calls", Rows).show(view.snapshot.calls)

    def on_rows_chosen(self, event: Rows.Chosen) -> None:
        if isinstance(event.row, ProcessRow):
            self.app.push_screen(OneProcess(self.app.kernel, event.row.process.number, event.row.process.pid))
        elif isinstance(event.row, FramesInfo):
            self.app.push_screen(OneSegment(self.app.kernel, event.row.serial))


class OneProcess(Live):
    """A process of a kernel (by pid; the next kernel has other ones): its lane, and its mappings."""

    def __init__(self, kernel: int, number: int, pid: int) -> None:
        super().__init__()
        self._kernel, self._number, self._pid = kernel, number, pid

    def compose(self) -> ComposeResult:
        yield Head(id="title")
        yield Head(id="one")
        yield Head(id="kernel")
        yield Head(id="lane")
        yield Rows(MAPPINGS, lambda row: row.mapping.address)
        yield Footer(show_command_palette=False, compact=True)

    def show(self, view: View) -> None:
        """What it has now; where it has gone, what it had."""
        row = view.process(self._kernel, self._number)
        if row is None:
            self.query_one("#one", Head).say(f" process {self._pid} has gone; Esc goes back")
            return
        process, cells = row.process, max(1, self.size.width - 2)
        said = [f"process {process.pid} {words.harmless(row.program)}"]
        said += [view.at_work(each) for each in view.running(process)]
        said += [f"serves {', '.join(map(words.harmless, seat.names))}" for seat in view.seats(process)]
        said += [f"{words.counted(row.lane.ranges, 'mapping')} {words.size(row.lane.bytes)}", f"uid {process.uid}"]
        self.query_one("#one", Head).say(" " + fitting(said, cells))
        wide = view.alone(process, cells)
        self.query_one("#kernel", Head).draw([Segment(" "), *paint.lane(wide.kernel, cells)])
        self.query_one("#lane", Head).draw([Segment(" "), *paint.lane(wide.users[0], cells)])
        self.table.show(view.mappings(row))

    def on_rows_chosen(self, event: Rows.Chosen) -> None:
        if event.row.frames is not None:
            self.app.push_screen(OneSegment(self._kernel, event.row.frames.serial))


class OneSegment(Live):
    """Frames of a kernel (by pid): their segments, and everyone who holds a reference."""

    def __init__(self, kernel: int, serial: int) -> None:
        super().__init__()
        self._kernel, self._serial = kernel, serial

    def compose(self) -> ComposeResult:
        yield Head(id="title")
        yield Head(id="one")
        yield Head(id="parts")
        yield Rows(HOLDERS, lambda row: row)
        yield Footer(show_command_palette=False, compact=True)

    def show(self, view: View) -> None:
        frames = view.segment(self._kernel, self._serial)
        if frames is None:
            self.query_one("#one", Head).say(f" frames {self._serial} are gone: nobody refers to them; Esc goes back")
            self.table.show([])
            return
        said = [f"frames {frames.serial}", words.size(frames.length), words.counted(frames.refcount, "reference")]
        self.query_one("#one", Head).say(" " + fitting(said, self.size.width - 2))
        parts = [
            f"inode {part.inode} {words.size(part.length)}" + (f" {words.harmless(part.name)}" if part.name else "")
            for part in frames.segments[:20]
        ]
        more = [f"and {len(frames.segments) - 20} more"] if len(frames.segments) > 20 else []
        self.query_one("#parts", Head).say(" " + ", ".join([*parts, *more]))
        self.table.show(frames.holders)


HELP = """\
Each line is a process; its bar is its UserLand, squeezed:
mappings as blocks, as long as the logarithm of their pages.
What is lit is mirrored by the kernel at this moment: the
number is the mirror's, the same in KernelLand and UserLand;
or it is lent to a service: lit in its UserLand as well.
With --machine: segments that several processes map, above
and in each of them.
A mirror that comes and goes between two looks (that of a
short call) is only counted.

 1 2 3   processes, segments, syscalls (how long they took)
 arrows  the cursor             Enter  detail, holders
 s S     sort by the next column, the other way round
 /       filter; Esc ends it    Esc    back
 p       pause                  q      quit
"""


class Help(ModalScreen[None]):
    """What the keys do."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,question_mark,enter,space", "app.pop_screen", "Back"),
        Binding("q", "app.quit", "Quit"),
    ]

    def compose(self) -> ComposeResult:
        yield Static(HELP, id="help", markup=False)
