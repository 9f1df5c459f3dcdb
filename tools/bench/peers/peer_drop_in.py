"""realmap.shared_memory: what peer_shared_memory.py does with the standard module.

make LENGTH COUNT             create, close, unlink
attach LENGTH COUNT           attach by name, read a byte, close
"""

import functools

from _protocol import at_end, serve, timed

from realmap.shared_memory import SharedMemory


def make(length: int, count: int) -> int:
    def operation() -> None:
        memory = SharedMemory(create=True, size=length)
        memory.close()
        memory.unlink()

    return timed(operation, count)


@functools.cache
def segment(length: int) -> SharedMemory:
    memory = SharedMemory(create=True, size=length)
    at_end.callback(memory.unlink)
    at_end.callback(memory.close)
    return memory


def attach(length: int, count: int) -> int:
    name = segment(length).name

    def operation() -> None:
        memory = SharedMemory(name)
        memory.buf[length - 1]
        memory.close()

    return timed(operation, count)


if __name__ == "__main__":
    serve({"make": make, "attach": attach})
