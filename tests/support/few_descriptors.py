"""A program: what is done for the first time by a process that has few descriptors left. KERNEL's path is its argument.

Each act is tried with 0, 1, 2, … of them, in a fork of a process that has done nothing yet, until it goes well; after
each time once more with all of them. As JSON: {act: [what came of it with 0, 1, …]}. test_few_descriptors.py runs it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from forked import said_in_a_child

from realmap import (
    PAGE_SIZE,
    Buffer,
    ForeignProcess,
    KernelError,
    Process,
    SyscallFailed,
    UserBuffer,
    connect,
    syscall,
    u_rw,
)
from realmap.kernel import Kernel

#: No act needs so many.
MOST = 30
LENGTH = 3 * PAGE_SIZE


def few_reverse(call: object, data: UserBuffer) -> None:
    with data.mirror() as mirror:
        mirror[:] = bytes(mirror)[::-1]


async def few_reverse_soon(call: object, data: UserBuffer) -> None:
    await asyncio.sleep(0)
    few_reverse(call, data)


def join(path: str) -> Callable[[], object]:
    return lambda: connect(path).close()


def start(path: str) -> Callable[[], object]:
    def act() -> None:
        kernel = Kernel(syscalls=[few_reverse])
        kernel.start()
        try:
            with connect(kernel.path) as me:
                me.call("few_reverse", me.map(LENGTH))
        finally:
            kernel.stop()

    return act


def _own(handler: Callable[..., Any]) -> str:
    """Its name in this process alone."""
    return f"{handler.__name__} of {os.getpid()}"


def _served(path: str) -> tuple[Process, Buffer]:
    """A user that serves itself, and a part of a buffer: whole pages are lent, its edges copied."""
    me = connect(path)
    me.serve(*(syscall(name=_own(each))(each) for each in (few_reverse, few_reverse_soon)))
    return me, me.map(LENGTH, fragment=PAGE_SIZE).slice(5, LENGTH - 9)


def _calling(handler: Callable[..., Any]) -> Callable[[str], Callable[[], object]]:
    def prepare(path: str) -> Callable[[], object]:
        me, part = _served(path)
        return lambda: me.call(_own(handler), part)

    return prepare


def await_it(path: str) -> Callable[[], object]:
    me, part = _served(path)
    loop = asyncio.new_event_loop()
    return lambda: loop.run_until_complete(me.acall(_own(few_reverse), part))


def attach(path: str) -> Callable[[], object]:
    one, other = connect(path), connect(path)
    buffer = one.map(LENGTH, fragment=PAGE_SIZE)
    handle = one.share(buffer, rights=u_rw)
    return lambda: other.attach(handle).unmap()


def look(path: str) -> Callable[[], object]:
    me = connect(path)
    buffers = [me.map(PAGE_SIZE, name=f"few-{number}-{os.getpid()}") for number in range(3)]  # anybody may find them

    def act() -> None:
        with ForeignProcess(os.getppid()) as parent:
            parent.mappings()
        with ForeignProcess(os.getpid()) as process, process.mirror(buffers[0].address, LENGTH) as mirror:
            bytes(mirror)

    return act


ACTS = {
    "connect": join, "start": start, "call": _calling(few_reverse), "call a task": _calling(few_reverse_soon),
    "await": await_it, "attach": attach, "look": look,
}  # fmt: skip


def leave(free: int) -> None:
    """Has no more than so many descriptors free."""
    numbers = (number for number in range(1 << 16) if not os.path.exists(f"/proc/self/fd/{number}"))
    limit = next(itertools.islice(numbers, free, None))
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def outcome(act: Callable[[], object]) -> str:
    try:
        act()
    except SyscallFailed as error:
        return str(error)
    except KernelError as error:
        return type(error).__name__
    except BaseException:
        return traceback.format_exc()
    return "ok"


def attempt(prepare: Callable[[str], Callable[[], object]], path: str, free: int) -> str:
    """In a process of its own."""

    def say() -> str:
        signal.alarm(60)
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        act = prepare(path)
        leave(free)
        first = outcome(act)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        then = outcome(act)
        return first if then == "ok" else f"{first}, then {then}"

    return said_in_a_child(say) or "it died, or hung"


def until_well(prepare: Callable[[str], Callable[[], object]], path: str) -> list[str]:
    found: list[str] = []
    while len(found) < MOST and found[-1:] != ["ok"]:
        found.append(attempt(prepare, path, len(found)))
    return found


if __name__ == "__main__":
    print(json.dumps({name: until_well(prepare, sys.argv[1]) for name, prepare in ACTS.items()}))
