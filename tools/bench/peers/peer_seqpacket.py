"""A bare socket: the least that a call can cost between two Python processes that block.

A SOCK_SEQPACKET pair keeps messages apart by itself, so one send() and one recv() a message are all there is to it;
the sockets block, as Python's do unless told otherwise.

    call COUNT PIN    32 bytes there, 16 back
"""

import socket

from _protocol import partner, pinned, serve, timed

REQUEST = bytes(32)
ANSWER = bytes(16)


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def answer(channel: socket.socket) -> None:
    recv, send = channel.recv, channel.send
    while recv(64):
        send(ANSWER)


def call(count: int, pin: bool) -> int:
    other = partner(answer, pair=pair)
    recv, send = other.channel.recv, other.channel.send

    def operation() -> None:
        send(REQUEST)
        if recv(64) != ANSWER:
            raise EOFError("the partner ended")

    with pinned(other, pin):
        return timed(operation, count, warm=10)


if __name__ == "__main__":
    serve({"call": call})
