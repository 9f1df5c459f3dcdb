"""A client that speaks the wire by hand, so that it can say what `realmap.connect` never would."""

from __future__ import annotations

import itertools
import os
import select
import socket
from typing import Any, Self

import msgspec

from realmap.host import procfs
from realmap.rights import MemoryType
from realmap.wire import channel, messages
from realmap.wire.news import News, Told
from realmap.wire.ring import RingEnd

BOUND = 60.0
_reply = msgspec.msgpack.Decoder(messages.Reply).decode
_news = msgspec.msgpack.Decoder(News).decode


def receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """The next datagram, and its descriptors. TimeoutError: none comes."""
    sock.settimeout(BOUND)
    data, fds, flags, _ = socket.recv_fds(sock, channel.DATAGRAM, 253, socket.MSG_CMSG_CLOEXEC)
    assert not flags & socket.MSG_CTRUNC
    return data, fds


class RawClient:
    """A connection that was let in: its socket, and its end of the ring, where there is one. A context manager."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.connect(path)
        self.numbers = itertools.count(1)
        pid = os.getpid()
        hello = messages.Hello(messages.PROTOCOL, messages.VERSION, pid, procfs.start_time(pid))
        self.sock.send(b"\0" + msgspec.msgpack.encode(hello))
        welcome, fds = receive(self.sock)
        self.number = msgspec.msgpack.decode(welcome[1:], type=messages.Welcome).process
        self.ring = RingEnd.join(fds[0]) if fds else None
        channel.close_all(fds)

    def say(self, request: messages.Request) -> None:
        """Sends it by the socket."""
        self.sock.send(b"\0" + msgspec.msgpack.encode(request))

    def hear(self) -> tuple[Any, list[int]]:
        """The next answer's value, and its descriptors, which are whose asks. Raises what it is instead."""
        carried: list[int] = []
        while True:
            data = self.ring._pop() if self.ring is not None else None
            if data is None:
                ready = select.select([self.sock], [], [], 0.001 if self.ring is not None else BOUND)[0]
                assert ready or self.ring is not None, "no answer"
                if not ready:
                    continue
                datagram, fds = receive(self.sock)
                carried += fds
                if datagram == channel.BELL:
                    continue
                data = datagram[1:]
            reply = _reply(data)
            if isinstance(reply, messages.Carrier):
                continue
            if isinstance(reply, messages.Done):
                while len(carried) < reply.descriptors:  # they were sent before it, by the socket
                    carried += receive(self.sock)[1]
                return reply.value, carried
            raise messages.exception_of(reply.error)

    def ask(self, kind: type, *facts: Any, **named: Any) -> tuple[Any, list[int]]:
        """Sends a request of this kind, and hears its answer."""
        self.say(kind(next(self.numbers), *facts, **named))
        return self.hear()

    def map(
        self, length: int, rights: int = 11, fragment: int | None = None, kind: MemoryType = MemoryType.HEAP
    ) -> int:
        """Memory of its own: the address."""
        value, fds = self.ask(messages.Map, length, int(kind), rights, fragment, None, True)
        channel.close_all(fds)
        return int(value[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.ring is not None:
            self.ring._close()
        self.sock.close()


class RawServer:
    """A seat of such a client: its socket, and its page. A context manager."""

    def __init__(
        self, client: RawClient, *names: str, threads: int = 1, queue: int = 0, descriptors: int = 256
    ) -> None:
        self.number, (sock, self.page) = client.ask(messages.Serve, list(names), threads, queue, descriptors)
        self.sock = socket.socket(fileno=sock)

    def hear(self) -> tuple[News, list[int]]:
        """The next news, and their descriptors. EOFError: there are no more."""
        data, fds = receive(self.sock)
        if not data:
            raise EOFError
        return _news(data), fds

    def tell(self, told: Told | bytes) -> None:
        """Tells the kernel of itself."""
        self.sock.send(told if isinstance(told, bytes) else msgspec.msgpack.encode(told))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()
        os.close(self.page)


class RawSession:
    """A caller's session: its socket, ring and page. A context manager."""

    def __init__(self, client: RawClient, name: str, but: tuple[int, ...] = ()) -> None:
        (self.number, self.seat, self.pid, self.spin, self.names), fds = client.ask(messages.Open, name, list(but))
        sock, *self.fds = fds
        self.sock = socket.socket(fileno=sock)
        self.client = client

    def lend(self, address: int) -> None:
        """Lends the mapping there."""
        assert self.client.ask(messages.Lend, self.number, address) == (None, [])

    @property
    def has_ended(self) -> bool:
        """Whether the other side has hung up."""
        poll = select.poll()
        poll.register(self.sock, 0)
        return bool(poll.poll(0))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()
        channel.close_all(self.fds)
