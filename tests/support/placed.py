"""Handlers that run anywhere: in a kernel's loop, on its workers, in processes that serve."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
import types
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

import realmap
from realmap import Call, KernelDied, Process, ProcessKilled, SpawnedProcess, UserBuffer

gates: defaultdict[str, SimpleQueue[None]] = defaultdict(SimpleQueue)
kept: list[UserBuffer] = []
mapped: set[str] = set()


def nop(call: Call) -> None:
    """Nothing."""


def echo(call: Call, *args: Any, **kwargs: Any) -> list[Any]:
    """The plain arguments again; of a buffer how long it is."""

    def shown(value: Any) -> Any:
        if isinstance(value, list):
            return [shown(each) for each in value]
        if isinstance(value, dict):
            return {key: shown(each) for key, each in value.items()}
        return len(value) if isinstance(value, UserBuffer) else value

    return [shown(list(args)), shown(kwargs)]


def typed(call: Call, data: UserBuffer, count: int, *, name: str = "none") -> list[Any]:
    """What came."""
    return [len(data), count, name]


def who(call: Call) -> list[Any]:
    """Who calls what, where it runs, and what is known of that."""
    return [call.process.pid, call.process.uid, call.name, os.getpid(), call.cancelled, call.deadline is not None]


def explode(call: Call, kind: str) -> None:
    """Raises."""
    if kind == "ours":
        raise realmap.InvalidHandle("odd", why="one of ours")
    raise {"ValueError": ValueError, "SystemExit": SystemExit}[kind]("a reason")


def unsendable(call: Call) -> Any:
    """Answers what cannot travel."""
    return {1, 2}


def long_text(call: Call, length: int) -> str:
    """An answer of this length."""
    return "x" * length


def wait(call: Call, name: str, *held: UserBuffer) -> str:
    """Comes back when `go` lets it."""
    gates[name].get(timeout=60)
    return name


def go(call: Call, name: str) -> None:
    """Lets one `wait` go."""
    gates[name].put(None)


def until_cancelled(call: Call, name: str) -> None:
    """Comes back when nobody waits for it; `wait` of that name may come back then."""
    while not call.cancelled:
        threading.Event().wait(0.001)
    gates[name].put(None)


def pid_here(call: Call) -> int:
    """Of the process that it runs in."""
    return os.getpid()


def nap(call: Call, seconds: float) -> int:
    """Takes so long; the pid."""
    time.sleep(seconds)
    return os.getpid()


def die(call: Call, data: UserBuffer) -> None:
    """SIGKILL, with a window."""
    with data.mirror() as mirror:
        mirror[0] = 1
        os.kill(os.getpid(), signal.SIGKILL)


def digest_later(call: Call, name: str, data: UserBuffer) -> str:
    """With a window that is there until `go` lets it."""
    with data.mirror(realmap.k_r) as mirror:
        mapped.add(name)
        gates[name].get(timeout=60)
        mapped.discard(name)
        return hashlib.sha256(mirror).hexdigest()


def has_mapped(call: Call, name: str) -> bool:
    """Whether `digest_later` has its window."""
    return name in mapped


def digest(call: Call, data: UserBuffer, offset: int = 0, length: int | None = None) -> str:
    """Of a part of it, in place."""
    with data.mirror(realmap.k_r, offset, length) as mirror:
        return hashlib.sha256(mirror).hexdigest()


def reverse(call: Call, data: UserBuffer, offset: int = 0, length: int | None = None) -> int:
    """Reverses a part of it, in place."""
    with data.mirror(offset=offset, length=length) as mirror:
        mirror[:] = bytes(mirror)[::-1]
        return len(mirror)


def fill(call: Call, data: UserBuffer, byte: int) -> None:
    """Writes without reading."""
    with data.mirror(realmap.k_w) as mirror:
        mirror[:] = bytes([byte]) * len(mirror)


def peek(call: Call, data: UserBuffer, length: int | None = None, offset: int = 0) -> bytes:
    """copy_in."""
    return data.copy_in(length, offset)


def poke(call: Call, data: UserBuffer, content: bytes, offset: int = 0) -> None:
    """copy_out."""
    data.copy_out(content, offset)


def copy(call: Call, source: UserBuffer, target: UserBuffer) -> int:
    """One into the other, both mapped at once."""
    with source.mirror(realmap.k_r) as there, target.mirror() as here:
        here[:] = bytes(there)
    return len(source)


def access(call: Call, data: UserBuffer) -> int:
    """Adds one to each byte, wherever they are."""
    with data.access() as found:
        found[:] = bytes((byte + 1) % 256 for byte in bytes(found))
        return len(found)


def scale(call: Call, data: UserBuffer, by: float) -> float:
    """As an array of numbers."""
    with data.array("float64") as values:
        values *= by
        return float(values.sum())


def mirror_with(call: Call, data: UserBuffer, rights: int) -> int:
    """With these rights."""
    with data.mirror(realmap.MappingAccessRights(rights)) as mirror:
        return len(mirror)


def two_mirrors(call: Call, data: UserBuffer, split: int) -> bytes:
    """Two at a time of one buffer, which meet."""
    with data.mirror(offset=0, length=split) as left, data.mirror(offset=split) as right:
        left[-1], right[0] = 1, 2
        return bytes([left[-1], right[0]])


def leave_mapped(call: Call, data: UserBuffer) -> int:
    """Leaves it to the end of the call to unmap it."""
    mirror = data.mirror()
    mirror[0] = 77
    return len(mirror)


def drop_under_view(call: Call, data: UserBuffer) -> str:
    """A view lives while it is to be dropped."""
    mirror = data.mirror()
    view = memoryview(mirror)
    try:
        mirror.drop()
    except BufferError as error:
        return str(error)
    finally:
        view.release()
        mirror.drop()
    return "dropped"


def keep(call: Call, data: UserBuffer) -> None:
    """Keeps a buffer beyond its call."""
    kept.append(data)


def use_kept(call: Call) -> bytes:
    """Uses it then."""
    return kept.pop().copy_in()


HANDLERS: list[Callable[..., Any]] = [
    each
    for each in list(globals().values())
    if isinstance(each, types.FunctionType) and next(iter(each.__annotations__), "") == "call"
]


def on_a_worker(function: Any) -> Callable[..., Any]:
    """The same handler, on a thread of its own."""
    other = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
    other.__kwdefaults__, other.__annotations__ = function.__kwdefaults__, function.__annotations__
    other.__module__ = __name__
    return realmap.syscall(blocking=True)(other)


ON_WORKERS = [on_a_worker(function) for function in HANDLERS]


def serve(me: Process, threads: int = 2) -> None:
    """In a process of its own, until the kernel ends."""
    with suppress(KernelDied, ProcessKilled), me.serve(*HANDLERS, threads=threads) as service:
        service.wait()


def servers_of(me: Process, name: str, count: int) -> set[int]:
    """The pids of that many servers of a name, or of fewer where there are no more."""
    sessions = []
    try:
        for _ in range(count):
            sessions.append(me.session(name))
    except realmap.UnknownSyscall:
        pass
    finally:
        for session in sessions:
            session.close()
    return {session.pid for session in sessions}


def kill_all(spawned: list[SpawnedProcess]) -> None:
    """Those that are stopped, too; the list is empty then."""
    for each in spawned:
        with suppress(ProcessLookupError):
            os.kill(each.pid, signal.SIGCONT)
        each.kill()
        each.join()
    spawned.clear()
