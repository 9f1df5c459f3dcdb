"""`realmap demo --top`: the demo in a thread, the live view over its kernel; both end together."""

from __future__ import annotations

import threading

from textual.messages import ExitApp

from realmap.cli.top.app import Fresh, Top
from realmap.host.signals import Flag
from realmap.lab import demo as lab
from realmap.system import KernelHandle

INTERVAL = 0.25


class Left(Exception):
    """Whoever watched has gone."""


class DemoTop(Top):
    """Runs the demo from its first picture on, and ends with it."""

    def __init__(self, kernel: KernelHandle, planned: list[lab.FileReport], pace: float) -> None:
        super().__init__(kernel.path, INTERVAL, "demo")
        self._demo = kernel, planned
        self._pace = pace
        self._total = sum(len(file.checks) for file in planned)
        self._left = Flag()
        self._thread = threading.Thread(target=self._run_demo, name="realmap demo")
        self.report: lab.Report | None = None
        self.error: Exception | None = None

    def on_fresh(self, event: Fresh) -> None:
        if self._thread.ident is None:
            self._thread.start()

    def _run_demo(self) -> None:
        try:
            self.report = lab.run(*self._demo, self._checked, on_wait=self._look, pace=self._pace)
        except Left:
            pass
        except Exception as error:
            self.error = error
        finally:
            self.post_message(ExitApp())

    def _look(self) -> None:
        if self._left.is_set():
            raise Left

    def _checked(self, done: int) -> None:
        self.note = f"demo: {done} of {self._total} ranges"

    def leave(self) -> None:
        """Ends the demo wherever it is, and waits for that."""
        self._left.set()
        if self._thread.ident is not None:
            self._thread.join()


def watch(planned: list[lab.FileReport], trace: str | None, pace: float) -> lab.Report | None:
    """Runs the demo under the live view; None where that was left before the end. Errors as `lab.run`."""
    with lab.boot(trace) as kernel:
        app = DemoTop(kernel, planned, pace)
        try:
            app.run()
        finally:
            app.leave()
    if app.error is not None:
        raise app.error
    return app.report
