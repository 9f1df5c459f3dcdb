"""multiprocessing.shared_memory: the standard library's named segments, as its documentation uses them.

numpy.ndarray(buffer=memory.buf) on both sides, the name sent through a multiprocessing Pipe. A tracker process keeps
the books of all names, and removes what is left when everybody else has died: every create, and before Python 3.13
every attach too, tells it so. From 3.13 on, who attaches says track=False, as the documentation advises where somebody
else does the bookkeeping.

    make LENGTH COUNT             create, close, unlink
    make_touched LENGTH COUNT     the same, with a byte written in every page
    attach LENGTH COUNT           attach by name, close
    handover LENGTH COUNT MODE    the name is sent, the partner attaches (or has kept it attached), sums, answers
"""

import functools
import mmap
import sys
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import Any

from _protocol import PREFIX, at_end, numpy, partner, require, serve, timed, total

PAGE = mmap.PAGESIZE
UNTRACKED = {"track": False} if sys.version_info >= (3, 13) else {}


def operations(SharedMemory: Any, **attached: bool) -> dict[str, Callable[..., int]]:
    """What is measured of such a class, which attaches with those options."""

    @functools.cache
    def segment(length: int) -> str:
        memory = SharedMemory(f"{PREFIX}attach-{length}", create=True, size=length)
        at_end.callback(memory.unlink)
        at_end.callback(memory.close)
        return str(memory.name)

    def make(length: int, count: int) -> int:
        def operation() -> None:
            memory = SharedMemory(create=True, size=length)
            memory.close()
            memory.unlink()

        return timed(operation, count)

    def make_touched(length: int, count: int) -> int:
        ones = bytes(-(-length // PAGE))

        def operation() -> None:
            memory = SharedMemory(create=True, size=length)
            memory.buf[:length:PAGE] = ones
            memory.close()
            memory.unlink()

        return timed(operation, count)

    def attach(length: int, count: int) -> int:
        name = segment(length)
        return timed(lambda: SharedMemory(name, **attached).close(), count)

    return {"make": make, "make_touched": make_touched, "attach": attach}


def sum_anew(channel: Connection) -> None:
    while True:
        name, length = channel.recv()
        memory = SharedMemory(name, **UNTRACKED)
        answer = total(memory.buf, length)
        memory.close()
        channel.send(answer)


def sum_kept(channel: Connection) -> None:
    kept: dict[str, SharedMemory] = {}
    while True:
        name, length = channel.recv()
        if name not in kept:
            kept[name] = SharedMemory(name, **UNTRACKED)
        channel.send(total(kept[name].buf, length))


@functools.cache
def segment(length: int) -> SharedMemory:
    memory = SharedMemory(f"{PREFIX}{length}", create=True, size=length)
    at_end.callback(memory.unlink)
    at_end.callback(memory.close)
    numpy.ndarray((length,), numpy.uint8, memory.buf).fill(3)
    return memory


def handover(length: int, count: int, mode: str) -> int:
    require("numpy")
    memory = segment(length)
    expected = total(memory.buf, length)
    channel = partner(sum_anew if mode == "attach" else sum_kept).channel

    def operation() -> None:
        channel.send((memory.name, length))
        if channel.recv() != expected:
            raise ValueError("a wrong sum")

    return timed(operation, count)


if __name__ == "__main__":
    # Before any partner is forked, so that all share the one tracker; given back last, since it is told of the rest.
    resource_tracker.ensure_running()
    at_end.callback(resource_tracker._resource_tracker._stop)
    serve({**operations(SharedMemory, **UNTRACKED), "handover": handover}, watched=True)
