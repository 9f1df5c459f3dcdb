"""`Trace`: everything that happens in a kernel, into a file that Perfetto and chrome://tracing open.

    kernel   records in a ring of bounded size ──▶ taken in batches ──▶ timeline ──▶ the file

The kernel formats nothing and never waits: what does not fit into its ring is counted as lost, and the file says
where. The file is written as things happen; one that ends abruptly opens up to there.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import Any, Self

from realmap.errors import InvalidHandle, KernelError, SyscallTimeout
from realmap.host import forks
from realmap.host.signals import Flag
from realmap.observe.control import Control
from realmap.observe.timeline import Timeline
from realmap.wire.records import CAPACITY

#: How often the records are taken, in seconds; a full batch is followed by the next at once.
INTERVAL = 0.05
#: Services tell of the calls that they have answered so much later, at most, in seconds.
LATE = 0.02
#: How long one answer is waited for before it is looked whether the trace is to end, in seconds.
PATIENCE = 1.0
#: How long the end of a trace waits for a kernel that does not answer, in seconds.
GRACE = 10.0


def _open(path: str, flags: int) -> int:
    """Waits for nobody: a pipe has its reader by now, or is an error."""
    found = os.open(path, flags | os.O_NONBLOCK, 0o666)
    os.set_blocking(found, True)
    return found


class Trace:
    """A trace of the kernel at `kernel` (the path of its socket), from now on until `close`. A context manager.

    `events`: how many have come so far; `lost`: how many did not fit into the kernel's ring; `seconds`: from the
    beginning until now, or until the end; `died`: the error that ended it before its time (the kernel has died, or
    did not answer), or None. A thread of this process takes the records and formats them: about 10 µs of CPU time
    for each. Where this process is the one that is looked at, `realmap trace` from outside disturbs it less.
    """

    def __init__(
        self,
        kernel: str | os.PathLike[str],
        path: str | os.PathLike[str],
        *,
        events: int = CAPACITY,
        nice: int = 0,
    ) -> None:
        """Begins. `events`: how many may wait in the kernel, 64 bytes each, for this process to take them. `nice`: how
        much more modest its thread is than this process; for one that does nothing else (here, the thread may have
        what others wait for).

        KernelDied, AccessDenied, VersionMismatch, SyscallTimeout: as `Control`. LimitReached: the kernel is being
        traced already. InvalidSize: so many events cannot wait, or too few. OSError: the file cannot be written, or is
        a pipe that nobody reads (ENXIO).
        """
        self.path = os.fspath(path)
        self.events = 0
        self.lost = 0
        self._nice = nice
        self.died: KernelError | None = None
        self._failed: OSError | None = None
        self._seconds: float | None = None
        self._stop, self._over = Flag(), Flag()
        self._control = Control(kernel)
        with contextlib.ExitStack() as undo:
            undo.callback(self._control.close)  # with it goes whatever was begun
            began = self._control._ask("trace-start", events)
            # Without a buffer: a forked child would write what is in it once more.
            self._file = open(self.path, "wb", buffering=0, opener=_open)
            undo.callback(self._file.close)
            self._control.timeout = PATIENCE
            self._timeline = Timeline(self._write, began)
            self._began = time.monotonic()
            self._thread = threading.Thread(target=self._run, name="realmap-trace", daemon=True)
            self._thread.start()
            undo.pop_all()
        forks.lose_in_child(self)

    @property
    def seconds(self) -> float:
        """How long it has been going on, or went on."""
        return time.monotonic() - self._began if self._seconds is None else self._seconds

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come: it was closed, or something ended it."""
        return self._over.is_set()

    def close(self) -> None:
        """Ends it: what has happened until now is in the file then. Again: nothing.

        OSError: the file could not be written to its end.
        """
        self._stop.set()
        self._over.wait()  # not `join`, in which a handler that closes it as well would wait for itself
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed

    def _after_fork_in_child(self) -> None:
        """In a forked child: the trace is the parent's."""
        self._file.close()
        self._over = Flag()  # its thread is the parent's as well
        self._over.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with contextlib.suppress(OSError) if kind is not None else contextlib.nullcontext():
            self.close()

    # ---- on its thread ----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._follow()
        finally:
            self._over.set()

    def _follow(self) -> None:
        if self._nice:  # on Linux niceness is a thread's own
            with contextlib.suppress(OSError):
                nice = os.getpriority(os.PRIO_PROCESS, 0) + self._nice
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
        try:
            while not self._stop.is_set():
                if not self._read() and self._stop.wait(INTERVAL):
                    break
            time.sleep(LATE)
            self._drain()
        except KernelError as error:
            self.died = error
        except OSError as error:
            self._failed = error
        try:
            with self._file:
                self._timeline.end(self.events, self.lost, str(self.died or ""))
        except OSError as error:
            self._failed = self._failed or error
        self._seconds = self.seconds
        self._control.close()

    def _write(self, text: bytes) -> None:
        left = memoryview(text)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            error.filename = self.path
            raise

    def _read(self) -> bool:
        """Takes what waits; whether there may be more at once. An answer that does not come yet comes late."""
        try:
            return self._take(self._control._ask("trace-read", late=self._take))
        except SyscallTimeout:
            return False

    def _take(self, answer: Any) -> bool:
        records, self.lost, names = answer
        self._timeline.names += names
        self.events += self._timeline.feed(records)
        return bool(records)

    def _drain(self) -> None:
        """Has the kernel stop, and takes what it has told until then."""
        end = time.monotonic() + GRACE
        stopped = False
        while True:
            try:
                if not stopped:
                    self._control._ask("trace-stop")
                stopped = True
                if not self._take(self._control._ask("trace-read", late=self._take)):
                    return
            except SyscallTimeout:
                if time.monotonic() > end:
                    raise
            except InvalidHandle:  # the last answer was one that came late
                return
