"""`realmap demo --top`: the demo in a thread, the live view over its kernel; both end together."""

from __future__ import annotations

import threading
from queue import SimpleQueue

from textual.message import Message

from realmap.cli.top.app import Fresh, Top
from realmap.host.signals import Flag
from realmap.lab import demo as lab

INTERVAL = 0.25
#: How long the first picture may take before the demo begins without it. Seconds.
PATIENCE = 10.0


class Left(Exception):
    """Whoever watched has gone."""


class Over(Message):
    """The demo has ended."""


class DemoTop(Top):
    """Says when it has shown something, and ends with the demo."""

    def __init__(self, path: str, watching: Flag) -> None:
        super().__init__(path, INTERVAL, "demo")
        self._watching = watching

    def on_fresh(self, event: Fresh) -> None:
        self._watching.set()

    def on_over(self, event: Over) -> None:
        self.exit()


class Demo:
    """The thread that runs the demo."""

    def __init__(self, planned: list[lab.FileReport], trace: str | None, pace: float) -> None:
        self._planned, self._trace, self._pace = planned, trace, pace
        self._total = sum(len(file.checks) for file in planned)
        self._done = 0
        self._left = Flag()
        self.watching = Flag()
        #: Its kernel's path; None where there will be none.
        self.path: SimpleQueue[str | None] = SimpleQueue()
        self.app: DemoTop | None = None
        self.report: lab.Story | None = None
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="realmap demo")
        self._thread.start()

    def _run(self) -> None:
        try:
            self.report = lab.run(
                self._planned,
                self._checked,
                self._trace,
                on_boot=self._booted,
                on_wait=self._look,
                pace=self._pace,
            )
        except Left:
            pass
        except Exception as error:
            self.error = error
        finally:
            self.path.put(None)
            if self.app is not None:
                self.app.post_message(Over())

    def _booted(self, path: str) -> None:
        self.path.put(path)
        self.watching.wait(PATIENCE)

    def _look(self) -> None:
        if self._left.is_set():
            raise Left

    def _checked(self, check: lab.Check) -> None:
        self._done += 1
        if self.app is not None:
            self.app.note = f"demo: {self._done} of {self._total} ranges"

    def leave(self) -> None:
        """Ends it wherever it is, and waits for that."""
        self._left.set()
        self.watching.set()
        self._thread.join()


def watch(planned: list[lab.FileReport], trace: str | None, pace: float) -> lab.Story | None:
    """Runs the demo under the live view; None where that was left before the end. Errors as `lab.run`."""
    demo = Demo(planned, trace, pace)
    try:
        path = demo.path.get()
        if path is not None:
            demo.app = DemoTop(path, demo.watching)
            demo.app.run()
    finally:
        demo.leave()
    if demo.error is not None:
        raise demo.error
    return demo.report
