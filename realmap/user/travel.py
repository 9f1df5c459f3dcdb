"""How a buffer gets through a pickle: as a handle that is good once, attached wherever it is unpickled."""

from __future__ import annotations

import os
from threading import Lock
from typing import TYPE_CHECKING

from realmap.user.handle import Handle

if TYPE_CHECKING:
    from realmap.user.buffer import Buffer
    from realmap.user.process import Process

#: How long a pickled buffer that nobody has unpickled yet outlives the process that pickled it. Seconds.
TRANSIT = 30.0
#: This process's connections that were made for what came by a pickle, by the path of their kernel.
_made: dict[str, Process] = {}
_lock = Lock()


def _after_fork() -> None:
    global _lock
    _lock = Lock()  # another thread of the parent may have held it


os.register_at_fork(after_in_child=_after_fork)


def process_of(path: str, *, timeout: float | None = None) -> Process:
    """This process as a user of the kernel at `path`: a connection that it has, or else a new one. As `connect`.

    SyscallTimeout: the kernel does not let anybody in within `timeout` seconds.
    """
    from realmap.user.process import Process, living

    for process in living():
        if process.path == path:
            return process
    with _lock:
        process = _made[path] = Process(path, timeout=timeout)
        return process


def load(handle: Handle) -> Buffer:
    """What a pickled buffer is made of again. Errors as `Process.attach`, and as `connect`."""
    return process_of(handle.path).attach(handle)
