"""multiprocessing.SimpleQueue: the standard library's queue between processes, with as little in it as there can be.

messages LENGTH COUNT        COUNT bytes objects of LENGTH from this process to another one, until that has them all
"""

from multiprocessing import SimpleQueue
from multiprocessing.connection import Connection

from _protocol import partner, serve, timed

queues: dict[int, SimpleQueue] = {}


def take(channel: Connection, length: int) -> None:
    while True:
        for _ in range(channel.recv()):
            if len(queues[length].get()) != length:
                raise ValueError("a wrong message")
        channel.send(None)


def messages(length: int, count: int) -> int:
    queue = queues.setdefault(length, SimpleQueue())  # before its partner is forked
    channel, message = partner(take, length).channel, bytes(length)

    def operation() -> None:
        channel.send(count)
        for _ in range(count):
            queue.put(message)
        channel.recv()

    return timed(operation, 1, warm=0)


if __name__ == "__main__":
    serve({"messages": messages})
