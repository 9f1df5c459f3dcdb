"""`Line`: one peer's socket and ring, and what is still to be sent: nothing that a peer does makes us wait."""

from __future__ import annotations

import errno
import os
import select
import socket
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from realmap.errors import LimitReached
from realmap.host import files
from realmap.host.translate import SHORT_OF_MEMORY
from realmap.serving.syscalls import encode
from realmap.wire import channel
from realmap.wire.messages import Carrier
from realmap.wire.ring import RingEnd

#: A peer with this much unread (bytes) is not listened to, nor its blocking calls begun, until it has read some.
BACKLOG = 1 << 20


class Budget(Protocol):
    """What counts what a peer has: bytes `unread`, and `half_sent`."""

    def take(self, what: str, amount: int = 1) -> None:
        """LimitReached: it would be more than it may."""

    def give_back(self, what: str, amount: int = 1) -> None:
        """The reverse of `take`."""


class Line:
    """A non-blocking socket, its ring, and what waits to be sent. Only on the thread that has the loop."""

    __slots__ = ("_assembler", "_half_sent", "_outbox", "backlog", "behind", "closed", "events", "peer", "ring", "sock")
    peer: Budget

    def __init__(self, sock: socket.socket, peer: Budget) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.peer = peer
        self.ring: RingEnd | None = None
        self.closed = False
        #: Bytes that wait to be sent.
        self.backlog = 0
        #: Whether something by the socket comes before what is in the ring.
        self.behind = False
        #: What epoll is asked to tell of it.
        self.events = select.EPOLLIN
        self._assembler = channel.Assembler()
        self._half_sent = 0
        self._outbox: deque[tuple[bytes, list[int]]] = deque()

    def receive(self) -> bytes | None:
        """The next message; None where nothing is there, and nothing (b"") where it is not complete yet.

        EOFError: the peer is gone. NotAMessage: it does not speak as it should. LimitReached: more of what it says is
        half sent than may be. Descriptors that it sends are dropped by Linux: there is no room for them in the call.
        """
        try:
            datagram = self.sock.recv(channel.DATAGRAM)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as error:
            if error.errno in SHORT_OF_MEMORY:
                return None  # it is still there
            raise EOFError(str(error)) from None
        if not datagram:
            raise EOFError("closed")
        message = self._assembler.feed(datagram)
        if self._assembler.size != self._half_sent:
            self.peer.take("half_sent", self._assembler.size - self._half_sent)
            self._half_sent = self._assembler.size
        return message or b""

    def send(self, message: bytes, descriptors: Sequence[int] = (), id: int = 0) -> None:
        """Sends as much as the peer takes now, and the rest when it can. InvalidSize: longer than a message may be.

        A short one goes by the ring, its descriptors (of answer `id`) by the socket before it. Else they
        go with the last part; they stay the caller's (copies wait in the outbox). OSError: it is gone, no descriptors
        are left for copies, or its process has more unread than it may; nothing more can be said to it in order.
        """
        if self._send_by_ring(message, descriptors, id) if descriptors else self.send_short(message):
            return
        parts = channel.datagrams(message)
        for part in parts:
            rights = descriptors if part is parts[-1] else ()
            if self._outbox or not self._try(part, rights):
                self._wait(part, rights)
        self._tell_of_mail()

    def _tell_of_mail(self) -> None:
        """Something was sent by the socket: who sleeps on its ring looks there."""
        if self.ring is not None:
            self.ring._mailed()

    def _wait(self, part: bytes, rights: Sequence[int]) -> None:
        """It is sent when the peer has read what comes before."""
        weight, copies = _weight(part, rights), _copies(rights)
        try:
            self.peer.take("unread", weight)
        except LimitReached as error:
            channel.close_all(copies)
            raise OSError(errno.ENOBUFS, str(error)) from None
        self.backlog += weight
        self._outbox.append((part, copies))

    def send_short(self, message: bytes) -> bool:
        """Sends a message without descriptors by the ring; False where it does not go that way now."""
        return self.ring is not None and not self._outbox and self.ring._send(message, self.sock.fileno()) >= 0

    def _send_by_ring(self, message: bytes, descriptors: Sequence[int], id: int) -> bool:
        """A message whose descriptors go by the socket, right before it: it is known then that it will follow."""
        ring = self.ring
        if ring is None or self._outbox or not ring._takes(len(message)):
            return False
        return self._try(b"\0" + encode(Carrier(id)), descriptors) and ring._send(message, self.sock.fileno()) >= 0

    def _try(self, datagram: bytes, descriptors: Sequence[int]) -> bool:
        try:
            channel.send_one(self.sock, datagram, descriptors)
        except BlockingIOError:
            return False
        except OSError as error:
            # ETOOMANYREFS: too many descriptors in flight for this user; they drain as clients read.
            if error.errno == errno.ETOOMANYREFS or error.errno in SHORT_OF_MEMORY:
                return False
            raise
        return True

    def waiting_inodes(self) -> list[tuple[int, int]]:
        """(device, inode) behind each descriptor that waits for the peer to read."""
        found = [os.fstat(descriptor) for _, descriptors in self._outbox for descriptor in descriptors]
        return [(status.st_dev, status.st_ino) for status in found]

    def flush(self) -> None:
        """Goes on sending what waits. OSError: the peer is gone."""
        while self._outbox and self._try(*self._outbox[0]):
            self._tell_of_mail()
            datagram, descriptors = self._outbox.popleft()
            weight = _weight(datagram, descriptors)
            self.backlog -= weight
            self.peer.give_back("unread", weight)
            channel.close_all(descriptors)

    def close(self) -> None:
        """Closes the socket; what waits to be sent is lost. Again: nothing."""
        if not self.closed:
            self.peer.give_back("unread", self.backlog)
            self.peer.give_back("half_sent", self._half_sent)
        self.closed = True
        while self._outbox:
            channel.close_all(self._outbox.popleft()[1])
        files.shut(self.sock)
        if self.ring is not None:
            self.ring._mailed()
            self.ring._close()
            self.ring = None

    def after_fork_in_child(self) -> None:
        files.shut(self.sock)
        while self._outbox:
            channel.close_all(self._outbox.popleft()[1])


def _weight(datagram: bytes, descriptors: Sequence[int]) -> int:
    """What something unread counts towards the backlog: a descriptor is dearer than bytes."""
    return len(datagram) + len(descriptors) * channel.CHUNK


def _copies(descriptors: Sequence[int]) -> list[int]:
    copies: list[int] = []
    try:
        for descriptor in descriptors:
            copies.append(os.dup(descriptor))
    except OSError:
        channel.close_all(copies)
        raise
    return copies
