"""A function in a user process of its own: what runs there, and its end as its booter sees it."""

from __future__ import annotations

import contextlib
import inspect
import os
import socket
import sys
from collections.abc import Callable
from threading import RLock
from typing import Any

from realmap.errors import ProcessKilled
from realmap.host import files, interpreter, outcome
from realmap.host.interpreter import Child, Unsendable
from realmap.host.translate import shortage
from realmap.user import travel


def spawn(
    kernel: Any,
    path: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    name: str | None,
    kwargs: dict[str, Any],
) -> SpawnedProcess:
    """Starts it, for `KernelHandle.spawn`, which says the errors. `kernel`: lives as long as what is returned."""
    if not callable(function):
        raise TypeError(f"what is spawned is a function, not {function!r}")
    called = name if name is not None else getattr(function, "__name__", type(function).__name__)
    if not isinstance(called, str) or not called:
        raise TypeError(f"the name of a process is text, not {called!r}")
    try:
        takes = inspect.signature(function)
    except (ValueError, TypeError):  # of something built in: it says itself what it takes
        takes = None
    if takes is not None:
        try:
            takes.bind(None, *args, **kwargs)
        except TypeError as error:
            hint = "; name= is how the process is called" if name is not None and "name" in takes.parameters else ""
            why = f"{called}{takes} gets its Process first, and then what spawn is given: {error}{hint}"
            raise TypeError(why) from None
    interpreter.dumps(function, f"the function {called!r}")
    for what, argument in [*enumerate(args, 1), *kwargs.items()]:
        interpreter.dumps(argument, f"argument {what!r} of {called!r}")
    try:
        child = Child(_main, path, function, args, kwargs, called)
    except OSError as error:
        raise shortage(error, f"cannot start a process for {called!r}") from None
    return SpawnedProcess(child, kernel, called)


def _main(
    report: socket.socket,
    booter: int,
    path: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    name: str,
) -> None:
    interpreter.end_with(booter, 0)
    interpreter.call_itself(name)
    pid, status = os.getpid(), 1
    try:
        with travel.first_of(path) as me:
            value = function(me, *args, **kwargs)
            if os.getpid() == pid:  # a fork that comes back here has nothing to say
                _tell(report, value, name)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException as error:
        where = f"process {os.getpid()}, spawned as {name!r}"
        print(f"In {where}:\n{outcome.text_of(error)}", end="", file=sys.stderr, flush=True)
        if os.getpid() == pid and isinstance(error, Exception):
            with contextlib.suppress(OSError):
                outcome.send(report, outcome.of_error(error, where))
    files.shut(report)
    sys.exit(status)


def _tell(report: socket.socket, value: Any, name: str) -> None:
    try:
        data = outcome.of_value(value, f"what {name!r} returned")
    except Unsendable as error:  # who asks for it is told
        data = outcome.of_error(error, "")
    with contextlib.suppress(OSError):
        outcome.send(report, data)


class SpawnedProcess:
    """A user process that `KernelHandle.spawn` started. It ends with its booter at the latest."""

    def __init__(self, child: Child, kernel: Any, name: str) -> None:
        #: What ps and top call it (Linux keeps 15 bytes of that).
        self.name = name
        self.child = child
        self._kernel = kernel  # which ends when nobody refers to it any more
        self._report = socket.socket(fileno=child.report.detach())  # read also after the kernel's end
        self._outcome: bytes | None = None
        self._lock = RLock()

    @property
    def pid(self) -> int:
        return self.child.pid

    @property
    def exitcode(self) -> int | None:
        """None while it runs; then 0, its exit status, or minus the signal that ended it."""
        return self.child.exitcode

    def join(self, timeout: float | None = None) -> int | None:
        """Waits at most `timeout` seconds (None: for ever) for its end; the exit code, or None if it still runs."""
        return self.child.wait(timeout)

    def result(self, timeout: float | None = None) -> Any:
        """What the function returned, once its process has ended; waits at most `timeout` seconds (None: for ever).

        What it raised is raised here, with the traceback of its process as the cause. TimeoutError: it still runs.
        ProcessKilled: it ended before it returned (killed, or by sys.exit). TypeError: what it returned cannot be sent.
        """
        exitcode = self.join(timeout)
        if exitcode is None:
            raise TimeoutError(f"process {self.pid} ({self.name!r}) still runs after {timeout} s")
        with self._lock:
            if self._outcome is None:
                self._outcome = outcome.receive(self._report)
            files.shut(self._report)
        if self._outcome is None:
            why = f"process {self.pid} ({self.name!r}) {outcome.ended(exitcode)} before its function had returned"
            raise ProcessKilled(self.pid, why=why)
        return outcome.read(self._outcome)

    def kill(self) -> None:
        """Kills it (SIGKILL), if it still runs; `join` waits for the end."""
        self.child.kill()

    def __del__(self) -> None:
        if hasattr(self, "_report"):
            files.shut(self._report)

    def __repr__(self) -> str:
        state = "running" if self.exitcode is None else f"exit code {self.exitcode}"
        return f"<SpawnedProcess {self.pid} ({self.name!r}), {state}>"
