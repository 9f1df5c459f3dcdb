"""The least that a server of many processes can be in Python: SOCK_SEQPACKET, one epoll, one recv and send a call.

32 bytes there, 16 back.
"""

import select
import socket
from collections.abc import Callable

REQUEST = bytes(32)
ANSWER = bytes(16)


def server(address: str) -> Callable[[], None]:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind(f"\0{address}")
    listening.listen(128)

    def serve() -> None:
        ready, clients = select.epoll(), {}
        ready.register(listening, select.EPOLLIN)
        while True:
            for number, _ in ready.poll():
                if number == listening.fileno():
                    client, _ = listening.accept()
                    clients[client.fileno()] = client
                    ready.register(client, select.EPOLLIN)
                elif clients[number].recv(64):
                    clients[number].send(ANSWER)
                else:
                    ready.unregister(number)
                    clients.pop(number).close()

    return serve


def client(address: str) -> Callable[[], object]:
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel.connect(f"\0{address}")
    send, recv = channel.send, channel.recv

    def call() -> None:
        send(REQUEST)
        if recv(64) != ANSWER:
            raise EOFError("the server ended")

    return call
