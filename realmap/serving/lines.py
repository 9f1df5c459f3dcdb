"""`Lines`: everybody who is listened to, by socket and ring: one message of one peer per turn.

What came by the socket comes first, where its peer says so. Who does not read is not listened to.
"""

from __future__ import annotations

import select
from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from realmap.errors import LimitReached
from realmap.serving.line import BACKLOG, Line
from realmap.serving.logs import log
from realmap.serving.loop import Loop
from realmap.wire import channel
from realmap.wire.ring import RingEnd

L = TypeVar("L", bound=Line)


class Lines(ABC, Generic[L]):
    """Only on the thread that has the loop. What is said, and what becomes of who speaks otherwise, is a subclass's."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._by_fd: dict[int, L] = {}
        #: Who had a message from its ring last: its socket waits once, or it would have two a turn.
        self._served: L | None = None
        #: Those of everybody who is listened to.
        self.rings: list[RingEnd] = []

    def all(self) -> list[L]:
        return list(self._by_fd.values())

    @abstractmethod
    def _take(self, line: L, data: bytes) -> None:
        """Does what a message asks for."""

    @abstractmethod
    def expel(self, line: L, why: str) -> None:
        """Sends a peer away that does not speak as it should."""

    @abstractmethod
    def drop(self, line: L) -> None:
        """The peer is gone. Again: nothing."""

    def _held(self, line: L, held: bool) -> None:
        """It has more unread than it may from now on, or no longer."""

    def _facts(self, line: L) -> dict[str, int]:
        """What a record of `logging` about it carries."""
        return {}

    def _add(self, line: L) -> None:
        """Listens to its socket. OSError: as `Loop.watch`."""
        self._loop.watch(line.sock.fileno(), self._on_socket)
        self._by_fd[line.sock.fileno()] = line

    def _remove(self, line: L) -> None:
        fd = line.sock.fileno()
        self._loop.unwatch(fd)
        self.listen_to_ring(line, False)
        if line is self._served:
            self._served = None
        del self._by_fd[fd]

    def _on_socket(self, fd: int) -> None:
        line = self._by_fd[fd]
        try:
            if line.backlog:
                try:
                    line.flush()
                except OSError:
                    self.drop(line)
                    return
            if line is self._served:
                self._served = None
            elif line.backlog <= BACKLOG:
                self._receive(line)
            self.rearm(line)
        except Exception:
            self._fail(line)

    def _receive(self, line: L) -> bool:
        """Does what the next message by its socket asks for, where all of it is there; whether anything was."""
        try:
            data = line.receive()
        except EOFError:
            self.drop(line)
            return False
        except channel.NotAMessage as error:
            self.expel(line, f"it sent what is no message: {error}")
            return False
        except LimitReached as error:
            self.expel(line, str(error))
            return False
        if data:
            self._take(line, data)
        return data is not None

    def rearm(self, line: L) -> None:
        """Listens to a client while its backlog is small, and for it to read while there is one."""
        if line.closed or (not line.backlog and line.events == select.EPOLLIN):
            return
        self.listen_to_ring(line, line.backlog <= BACKLOG)
        reading = select.EPOLLIN if line.backlog <= BACKLOG else 0
        events = reading | (select.EPOLLOUT if line.backlog else 0)
        if events != line.events:
            try:
                self._loop.rewatch(line.sock.fileno(), events)
            except OSError as error:  # nobody would ever hear of it again
                log.warning("a client is dropped: %s", error.strerror, extra=self._facts(line))
                self.drop(line)
                return
            line.events = events
        self._held(line, line.backlog > BACKLOG)  # last: what begins then may fail, and end the line

    def listen_to_ring(self, line: L, listen: bool) -> None:
        """Takes calls from its ring from now on, or no longer."""
        ring = line.ring
        if ring is None or listen == (ring.owner is line):
            return
        if listen:
            ring.owner = line
            self.rings.append(ring)
        else:
            ring.owner = None
            self.rings.remove(ring)

    def take_from_ring(self, ring: RingEnd) -> None:
        """Does what the next message there asks for, if its client is still listened to: one, and others have theirs.

        What came by the socket comes first: where its client says so, the ring waits until the socket is empty.
        """
        self._served = line = ring.owner
        if line is None:
            return
        try:
            if line.behind and self._catch_up(line):
                return
            try:
                data = ring._pop()
            except ValueError as error:
                self.expel(line, f"it sent what is no message: {error}")
                return
            if data:
                self._take(line, data)
            elif data is not None:
                line.behind = True
                self._catch_up(line)
        except Exception:
            self._fail(line)

    def _catch_up(self, line: L) -> bool:
        """Whether there was something by the socket, or it must not be listened to any more."""
        line.behind = self._receive(line)
        self.rearm(line)
        return line.behind or line.closed or line.backlog > BACKLOG

    def _fail(self, line: L) -> None:
        """A bug of ours ends one client at worst, never the kernel."""
        log.exception("realmap failed at something", extra=self._facts(line))
        self.drop(line)
