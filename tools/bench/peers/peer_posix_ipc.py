"""posix_ipc and mmap: POSIX segments by hand, as the library's README and demo have it.

SharedMemory() for a descriptor, mmap.mmap() of it, close_fd() as soon as it is mapped. Nobody keeps any books: a name
stays until it is unlinked.

    make LENGTH COUNT             create, mmap, close the descriptor, close the map, unlink
    attach LENGTH COUNT           open, mmap, close the descriptor, close the map
    handover LENGTH COUNT MODE    the name is sent through a Pipe, the partner attaches (or has kept it), sums, answers
"""

import functools
import mmap
from multiprocessing.connection import Connection

from _protocol import PREFIX, at_end, numpy, package, partner, require, serve, timed, total

posix_ipc = package("posix_ipc")


def create(name: str, length: int) -> mmap.mmap:
    memory = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, size=length)
    try:
        view = mmap.mmap(memory.fd, length)
    except BaseException:
        memory.unlink()
        raise
    memory.close_fd()
    return view


def attach(name: str) -> mmap.mmap:
    memory = posix_ipc.SharedMemory(name)
    view = mmap.mmap(memory.fd, memory.size)
    memory.close_fd()
    return view


def make(length: int, count: int) -> int:
    require("posix_ipc")
    name = f"/{PREFIX}make"

    def operation() -> None:
        create(name, length).close()
        posix_ipc.unlink_shared_memory(name)

    return timed(operation, count)


def sum_anew(channel: Connection) -> None:
    while True:
        name, length = channel.recv()
        view = attach(name)
        answer = total(view, length)
        view.close()
        channel.send(answer)


def sum_kept(channel: Connection) -> None:
    kept: dict[str, mmap.mmap] = {}
    while True:
        name, length = channel.recv()
        if name not in kept:
            kept[name] = attach(name)
        channel.send(total(kept[name], length))


@functools.cache
def segment(length: int) -> tuple[str, int]:
    name = f"/{PREFIX}{length}"
    view = create(name, length)
    at_end.callback(posix_ipc.unlink_shared_memory, name)
    at_end.callback(view.close)
    numpy.ndarray((length,), numpy.uint8, view).fill(3)
    return name, total(view, length)


def attach_once(length: int, count: int) -> int:
    require("posix_ipc", "numpy")
    name, _ = segment(length)
    return timed(lambda: attach(name).close(), count)


def handover(length: int, count: int, mode: str) -> int:
    require("posix_ipc", "numpy")
    channel = partner(sum_anew if mode == "attach" else sum_kept).channel
    name, expected = segment(length)

    def operation() -> None:
        channel.send((name, length))
        if channel.recv() != expected:
            raise ValueError("a wrong sum")

    return timed(operation, count)


if __name__ == "__main__":
    serve({"make": make, "attach": attach_once, "handover": handover}, watched=True)
