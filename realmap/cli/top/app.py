"""The live view: a Textual app over a `Feed`."""

from __future__ import annotations

import asyncio
import select
import signal
from typing import ClassVar

from textual.app import App
from textual.binding import Binding, BindingType
from textual.events import AppBlur
from textual.message import Message

from realmap.cli.top.feed import NONE, Feed, MachineFeed, Seen
from realmap.cli.top.screens import Head, Help, Live, Main
from realmap.cli.top.view import View
from realmap.observe import words
from realmap.observe.picture import Numbers


class Fresh(Message):
    """A view that is to be shown; or why there is none."""

    def __init__(self, found: View | str) -> None:
        super().__init__()
        self.found = found


class Top(App[None]):
    """Shows the kernel at `path`, with a snapshot every `interval` seconds.

    `note`: said in the first line. `others`: as `Feed`. `machine`: in place of a kernel, what `MachineFeed` looks at.
    """

    TITLE = "realmap top"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    Screen { layout: vertical; }
    #title { background: $primary-darken-2; color: $text; text-style: bold; }
    #title.lost { background: $error; }
    #title.paused { background: $warning-darken-2; }
    ContentSwitcher, Rows { height: 1fr; }
    #rates, #legend, #parts { color: $text-muted; }
    #kernel { margin-bottom: 1; }
    OneProcess #lane { margin-bottom: 1; }
    Screen.stale Rows, Screen.stale #totals, Screen.stale #rates, Screen.stale #kernel { opacity: 40%; }
    Screen.-low #rates, Screen.-low #legend { display: none; }
    Screen.-low #kernel { margin-bottom: 0; }
    #filter { height: 1; }
    Help { align: center middle; }
    #help { width: auto; max-width: 100%; height: auto; max-height: 100%; padding: 1 2; background: $panel; }
    """
    VERTICAL_BREAKPOINTS = [(0, "-low"), (16, "-high")]  # noqa: RUF012 (no ClassVar in Textual)
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("p", "pause", "Pause"),
        Binding("question_mark", "help", "Help"),
        Binding("q,ctrl+c", "quit", "Quit"),
    ]

    def __init__(
        self, path: str, interval: float, note: str = "", *, others: bool = False, machine: bool = False
    ) -> None:
        super().__init__()
        self.view: View | None = None
        self.note = note
        self._numbers = Numbers()
        self._cells = 40
        self._why = ""
        #: How many views have been shown.
        self.shown = 0
        self.feed = (
            MachineFeed(interval, self._deliver) if machine else Feed(path, interval, self._deliver, others=others)
        )

    @property
    def kernel(self) -> int:
        """The pid of the kernel that is shown; 0: none yet."""
        return self.view.snapshot.pid if self.view is not None else 0

    def get_default_screen(self) -> Main:
        return Main()

    def on_mount(self) -> None:
        if not self.is_headless:
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.exit)
            self.set_interval(1.0, self._end_with_terminal)
        self.feed.start()

    def on_app_blur(self, event: AppBlur) -> None:
        """Nothing changes: a page that nobody has clicked into begins so, and would have no line of keys."""
        event.prevent_default()

    def _end_with_terminal(self) -> None:
        """One that has gone without a SIGHUP would be read from for ever, as fast as the machine can.

        In a browser it is the pipe from the server, which may have been killed.
        """
        look = select.poll()
        look.register(0, 0)
        if look.poll(0):
            self.exit()

    def on_unmount(self) -> None:
        self.feed.stop()

    # ---- from the feed ----------------------------------------------------------------------

    def _deliver(self, found: Seen | str) -> None:
        """In the feed's thread: what takes time is done here."""
        self.post_message(Fresh(found if isinstance(found, str) else self._view(found)))

    def _view(self, seen: Seen) -> View:
        return View(seen, self._cells, self._numbers)

    def on_fresh(self, event: Fresh) -> None:
        if not self.screen_stack:  # it ends
            return
        self._why = event.found if isinstance(event.found, str) else ""
        if self._why.startswith(NONE):
            self.view = None
        elif isinstance(event.found, View) and not self.feed.paused:
            self.view = event.found
        self.show()
        self.shown += 1
        self.feed.consumed()

    def show(self) -> None:
        """The view there is, on every screen."""
        for screen in self.screen_stack:
            if isinstance(screen, Live):
                screen.present(self.view)
        self._title()

    def measured(self, cells: int) -> None:
        """The lanes are drawn this many cells wide from now on."""
        if cells != self._cells:
            self._cells = cells
            if self.view is not None:
                self.view = self._view(self.view.seen)

    def _title(self) -> None:
        path = words.harmless(self.feed.path)
        if self._why:
            said = words.harmless(self._why)
        else:
            pid = "connecting to" if self.view is None else f"kernel {self.kernel}" if self.kernel else "this machine"
            said = f"{pid}  {path}"
        marks = ["PAUSED"] if self.feed.paused else []
        if isinstance(self.screen, Live) and self.screen.is_mounted:
            marks += self.screen.marks()
        marks += [words.harmless(self.note)] if self.note else []
        line = " ".join([" realmap top ", *(f"[{mark}]" for mark in marks), said])
        for screen in self.screen_stack:
            screen.set_class(bool(self._why), "lost")
            screen.set_class(bool(self._why) and self.view is not None, "stale")
            for head in screen.query("#title").results(Head):
                head.say(line)
                head.set_class(bool(self._why), "lost")
                head.set_class(self.feed.paused and not self._why, "paused")

    # ---- keys -------------------------------------------------------------------------------

    def action_pause(self) -> None:
        self.feed.pause(not self.feed.paused)
        self._title()

    def action_help(self) -> None:
        if not isinstance(self.screen, Help):
            self.push_screen(Help())
