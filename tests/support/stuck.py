"""Handlers that do not come back, or not as they should: short ones, of which each loses its kernel's loop."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
import time
from queue import SimpleQueue
from typing import Any

import realmap
from realmap import Call, UserBuffer, syscall

#: One word lets one handler go on.
gate: SimpleQueue[None] = SimpleQueue()
#: What handlers leave for others to tell.
notes: list[Any] = []


@syscall
def go(call: Call) -> None:
    """Lets one go on."""
    gate.put(None)


@syscall
def tell(call: Call) -> list[Any]:
    """What was noted."""
    return notes


@syscall
def nop(call: Call) -> None:
    """Nothing."""


@syscall
def wait_in_c(call: Call, *args: Any) -> str:
    """In a C function, without the GIL."""
    gate.get()
    return "came back"


@syscall
def doze(call: Call, *args: Any) -> str:
    """Asleep, again and again."""
    while gate.empty():
        time.sleep(0.005)
    gate.get()
    return "came back"


@syscall
def spin(call: Call, *args: Any) -> str:
    """In Python, with the GIL."""
    while gate.empty():
        pass
    gate.get()
    return "came back"


@syscall(blocking=True)
def wait_beside(call: Call) -> str:
    """On a worker."""
    gate.get()
    return "came back"


@syscall
def digest(call: Call, data: UserBuffer) -> str:
    """Of bytes that are read only in the end, and noted, too."""
    with data.mirror(realmap.k_r) as mirror:
        gate.get()
        found = hashlib.sha256(mirror).hexdigest()
    notes.append(found)
    return found


@syscall
def end_late(call: Call, how: str) -> Any:
    """Comes back in an odd way."""
    gate.get()
    if how == "what cannot travel":
        return object()
    if how == "memory":
        return call.process
    raise {"SystemExit": SystemExit, "KeyboardInterrupt": KeyboardInterrupt, "ours": realmap.InvalidHandle}[how]("odd")


@syscall
def fork(call: Call, late: bool) -> list[Any]:
    """Forks, and comes back twice: as whom, and the pid of the child."""
    if late:
        gate.get()
    pid = os.fork()
    return ["parent" if pid else "child", pid]


@syscall(blocking=True)
def fork_beside(call: Call) -> list[Any]:
    """The same on a worker."""
    pid = os.fork()
    return ["parent" if pid else "child", pid]


@syscall(blocking=True)
def reap(call: Call, pid: int) -> int:
    """How a child of the kernel has ended."""
    return os.waitpid(pid, 0)[1]


@syscall
def undo(call: Call, how: str) -> None:
    """Ends the kernel's process, one way or the other."""
    if how == "exec":
        os.execv("/bin/true", ["true"])
    if how == "exit":
        os._exit(3)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    os.closerange(3, 1 << 16)


@syscall
def leave_thread(call: Call) -> None:
    """Leaves a thread that is no daemon, and never ends."""
    threading.Thread(target=SimpleQueue().get).start()


@syscall
def call_back(call: Call) -> Any:
    """A user of its own kernel."""
    with realmap.connect(call.kernel.path) as me:
        me.call("nop")
        with me.map(3333) as buffer:
            return len(buffer)


@syscall
def stop_and_wait(call: Call) -> None:
    """Stops its own kernel, late."""
    gate.get()
    call.kernel.stop(wait=True)


@syscall(blocking=True)
def until_cancelled(call: Call) -> None:
    """Notes its deadline (how far off it is), and that nobody waits any more."""
    notes.append(None if call.deadline is None else call.deadline - time.monotonic())
    while not call.cancelled:
        time.sleep(0.001)
    notes.append("cancelled")


@syscall
def deadline(call: Call) -> float | None:
    """How far off it is."""
    return None if call.deadline is None else call.deadline - time.monotonic()


ALL = [value for value in vars(sys.modules[__name__]).values() if hasattr(value, "__realmap_syscall__")]
