"""multiprocessing.Pipe: the standard library's way to send objects, and bytes, between processes.

A Pipe() that goes both ways; objects with send() and recv(), which pickle; bulk data as its documentation has it, with
send_bytes() of the array itself (no pickle) and recv_bytes_into() a buffer that is there already.

    call COUNT PIN               ("nop", ()) there, None back, both pickled
    bytes LENGTH COUNT PIN       a bytes object of LENGTH there, its length back, both pickled
    handover LENGTH COUNT        the bytes of a numpy array there, their sum back
    access LENGTH COUNT WORK     LENGTH bytes fetched into a warm buffer, WORK there (write: filled, sent, confirmed)
"""

from multiprocessing.connection import Connection

from _protocol import numpy, partner, pinned, require, serve, timed, total, worker

SEND, RECEIVE = b"s", b"r"


def answer_none(channel: Connection) -> None:
    while True:
        channel.recv()
        channel.send(None)


def answer_length(channel: Connection) -> None:
    while True:
        channel.send(len(channel.recv()))


def answer_sum(channel: Connection, length: int) -> None:
    buffer = numpy.zeros(length, numpy.uint8)
    while True:
        channel.recv_bytes_into(buffer)
        channel.send(total(buffer, length))


def have_bytes(channel: Connection, length: int) -> None:
    buffer = numpy.ones(length, numpy.uint8)
    while True:
        if channel.recv_bytes() == SEND:
            channel.send_bytes(buffer)
        else:
            channel.recv_bytes_into(buffer)
            channel.send(None)


def call(count: int, pin: bool) -> int:
    other = partner(answer_none)

    def operation() -> None:
        other.channel.send(("nop", ()))
        if other.channel.recv() is not None:
            raise ValueError("a wrong answer")

    with pinned(other, pin):
        return timed(operation, count, warm=10)


def send(length: int, count: int, pin: bool) -> int:
    other = partner(answer_length)
    payload = bytes(length)

    def operation() -> None:
        other.channel.send(payload)
        if other.channel.recv() != length:
            raise ValueError("a wrong answer")

    with pinned(other, pin):
        return timed(operation, count, warm=2)


def handover(length: int, count: int) -> int:
    require("numpy")
    other = partner(answer_sum, length)
    data = numpy.full(length, 3, numpy.uint8)
    expected = total(data, length)

    def operation() -> None:
        other.channel.send_bytes(data)
        if other.channel.recv() != expected:
            raise ValueError("a wrong sum")

    return timed(operation, count)


def access(length: int, count: int, work: str) -> int:
    require("numpy")
    channel = partner(have_bytes, length).channel
    buffer = numpy.zeros(length, numpy.uint8)
    do_work = worker(work, buffer, length)

    def fetch() -> None:
        channel.send_bytes(SEND)
        channel.recv_bytes_into(buffer)
        do_work()

    def store() -> None:
        do_work()
        channel.send_bytes(RECEIVE)
        channel.send_bytes(buffer)
        channel.recv()

    return timed(store if work == "write" else fetch, count)


if __name__ == "__main__":
    serve({"call": call, "bytes": send, "handover": handover, "access": access})
