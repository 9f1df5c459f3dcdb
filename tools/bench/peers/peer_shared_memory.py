"""multiprocessing.shared_memory: the standard library's named segments, as its documentation uses them.

numpy.ndarray(buffer=memory.buf) on both sides, the name sent through a multiprocessing Pipe. A tracker process keeps
the books of all names, and removes what is left when everybody else has died: every create, and before Python 3.13
every attach too, tells it so. From 3.13 on, who attaches says track=False, as the documentation advises where somebody
else does the bookkeeping.

    make LENGTH COUNT             create, close, unlink
    attach LENGTH COUNT           attach by name, read a byte, close
    handover LENGTH COUNT MODE    the name is sent, the partner attaches (or has kept it attached), sums, answers
"""

import functools
import sys
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory

from _protocol import PREFIX, at_end, numpy, partner, require, serve, timed, total

UNTRACKED = {"track": False} if sys.version_info >= (3, 13) else {}


def make(length: int, count: int) -> int:
    def operation() -> None:
        memory = SharedMemory(f"{PREFIX}make", create=True, size=length)
        memory.close()
        memory.unlink()

    return timed(operation, count)


def attach(length: int, count: int) -> int:
    name = segment(length).name

    def operation() -> None:
        memory = SharedMemory(name, **UNTRACKED)
        memory.buf[length - 1]
        memory.close()

    return timed(operation, count)


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
    serve({"make": make, "attach": attach, "handover": handover}, watched=True)
