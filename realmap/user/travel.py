"""How a buffer gets through a pickle: as a handle that is good once, attached wherever it is unpickled."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from realmap._core import Lock
from realmap.user import inheritance
from realmap.user.handle import Handle

if TYPE_CHECKING:
    from realmap.user.buffer import Buffer
    from realmap.user.process import Process

#: How long a pickled buffer that nobody has unpickled yet outlives the process that pickled it. Seconds.
TRANSIT = 30.0
#: This process's connections that were made for what came by a pickle, by the path of their kernel.
_made: dict[str, Process] = {}
_lock = Lock()  # a signal handler may need it while its own thread has it


def _after_fork() -> None:
    global _lock
    _lock = Lock()  # another thread of the parent may have held it


os.register_at_fork(after_in_child=_after_fork)


def process_of(path: str) -> Process:
    """This process as a user of the kernel at `path`: a connection that it has, or else a new one. As `connect`."""
    with _lock:
        for process in inheritance.living():
            if process.path == path:
                return process
        return own_process_of(path)


def own_process_of(path: str) -> Process:
    """The same, never a connection that somebody else may close: one for all that needs one by itself."""
    from realmap.user.process import Process

    with _lock:
        process = made(path)
        if process is None:
            new = Process(path)
            process = _made.setdefault(path, new)
            if process is not new:  # a signal handler was quicker
                new.close()
        return process


def first_of(path: str) -> Process:
    """The connection that the arguments of this process came by, or else a new one: from now on somebody's own."""
    from realmap.user.process import Process

    with _lock:
        return _made.pop(path, None) or Process(path)


def made(path: str) -> Process | None:
    process = _made.get(path)
    if process is not None and process.has_ended:
        _made.pop(path, None)
        return None
    return process


def forget(path: str) -> None:
    """The kernel there has ended: that connection is of no use, also where it has not noticed yet."""
    _made.pop(path, None)


def keep(process: Process) -> None:
    """Makes it that connection, if there is none."""
    with _lock:
        if made(process.path) is None:
            _made[process.path] = process


def load(handle: Handle) -> Buffer:
    """What a pickled buffer is made of again. Errors as `Process.attach`, and as `connect`."""
    return process_of(handle.path).attach(handle)
