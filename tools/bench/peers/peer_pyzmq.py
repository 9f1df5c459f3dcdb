"""pyzmq, as its guide begins: a REQ and a REP socket over ipc. Bulk data as its documentation has it: copy=False.

call COUNT                   32 bytes there, 16 back
handover LENGTH COUNT        the bytes of a numpy array there, their sum back
"""

import os
from multiprocessing.connection import Connection

from _protocol import at_end, numpy, package, partner, require, serve, timed, total

zmq = package("zmq")
REQUEST, ANSWER = bytes(32), bytes(16)
ADDRESS = f"ipc://@realmap-bench-{os.getpid()}"


def answer(_: Connection) -> None:
    socket = zmq.Context().socket(zmq.REP)
    socket.bind(ADDRESS)
    while True:
        frame = socket.recv(copy=False)
        socket.send(ANSWER if len(frame) == len(REQUEST) else total(frame.buffer, len(frame)).to_bytes(8, "little"))


sockets: list[object] = []


def connected() -> "zmq.Socket":
    require("zmq", "numpy")
    partner(answer)  # forked before there is a context here, whose threads it would not have
    if not sockets:
        context = zmq.Context()
        sockets.append(context.socket(zmq.REQ))
        sockets[0].connect(ADDRESS)
        at_end.callback(context.destroy, 0)
    return sockets[0]


def call(count: int) -> int:
    socket = connected()

    def operation() -> None:
        socket.send(REQUEST)
        if socket.recv() != ANSWER:
            raise ValueError("a wrong answer")

    return timed(operation, count, warm=10)


def handover(length: int, count: int) -> int:
    socket = connected()
    data = numpy.full(length, 3, numpy.uint8)
    expected = total(data, length).to_bytes(8, "little")

    def operation() -> None:
        socket.send(data, copy=False)
        if socket.recv() != expected:
            raise ValueError("a wrong sum")

    return timed(operation, count)


if __name__ == "__main__":
    serve({"call": call, "handover": handover})
