"""The clients of a kernel: whom it listens to, by socket and ring, and how each is dropped."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

import msgspec

from realmap._core import look_over
from realmap.errors import KernelError, LimitReached, ProcessKilled
from realmap.host import files, liveness
from realmap.host.translate import shortage
from realmap.kernel import syscalls
from realmap.kernel.admission import Admission
from realmap.kernel.books import Books
from realmap.kernel.connection import BACKLOG, Connection
from realmap.kernel.heirs import Heirs
from realmap.kernel.limits import first_reserved
from realmap.kernel.logs import log
from realmap.kernel.loop import Loop
from realmap.wire import channel, messages
from realmap.wire.messages import FLAWS, PROTOCOL, VERSION, Forked
from realmap.wire.ring import RingEnd

Handle: TypeAlias = Callable[[Connection, messages.Request, Sequence[messages.Place]], None]
#: So many of a client's last words are read, at most: more do not wait in a socket or a ring, unless others go on.
LAST_WORDS = 512


class Clients:
    """Everybody who is connected. Only on the kernel's thread."""

    def __init__(
        self,
        books: Books,
        loop: Loop,
        admission: Admission,
        heirs: Heirs,
        *,
        spin: float,
        gone: Callable[[Connection], None],
    ) -> None:
        """`spin`: microseconds that a client spins for an answer; 0: no rings. `gone`: told of each that is dropped."""
        self._books = books
        self._loop = loop
        self._admission = admission
        self._heirs = heirs
        self._spin = spin
        self._gone = gone
        #: What is done with a request, whose arguments have buffers there.
        self.handle: Handle
        self._decode = msgspec.msgpack.Decoder(messages.Request).decode
        self._by_fd: dict[int, Connection] = {}
        #: Those that have not said who they are.
        self._strangers: set[Connection] = set()
        #: Who had a message from its ring last: its socket waits once, or it would have two a turn.
        self._served: Connection | None = None
        #: Those of everybody who is listened to.
        self.rings: list[RingEnd] = []

    def all(self) -> list[Connection]:
        """Everybody."""
        return list(self._by_fd.values())

    def after_fork_in_child(self) -> None:
        """They are the parent's alone."""
        for connection in self.all():
            connection.after_fork_in_child()

    @property
    def has_strangers(self) -> bool:
        """Whether somebody has not said who it is."""
        return bool(self._strangers)

    def enter(self, sock: socket.socket) -> None:
        """Somebody has connected; who cannot be listened to, or has too many connections, is turned away."""
        pid, _ = liveness.credentials(sock)
        try:
            connection = Connection(sock, self._books.peers.process(pid))
        except LimitReached as error:
            with contextlib.suppress(OSError):
                channel.send_one(sock, b"\0" + _refusal(error))
            files.shut(sock)
            return
        try:
            self._loop.watch(sock.fileno(), self._on_socket)
        except OSError as error:  # nobody would ever hear of it
            log.warning("a client was turned away: %s", error.strerror)
            connection.close()
            return
        self._by_fd[sock.fileno()] = connection
        self._strangers.add(connection)
        self._keep_room_for_commands()

    def _keep_room_for_commands(self) -> None:
        """Of the descriptors in reserve, half are the most that those have who have not said that they are commands."""
        limits = self._books.limits
        first = first_reserved(limits)
        inside = [each for each in self._strangers if each.sock.fileno() >= first]
        if len(inside) > max(1, limits.reserve // 2):
            self.drop(min(inside, key=lambda each: each.since))

    def _on_socket(self, fd: int) -> None:
        connection = self._by_fd[fd]
        try:
            if connection.backlog:
                try:
                    connection.flush()
                except OSError:
                    self.drop(connection)
                    return
            if connection is self._served:
                self._served = None
            elif connection.backlog <= BACKLOG:
                self._receive(connection)
            self.rearm(connection)
        except Exception:
            self._fail(connection)

    def _receive(self, connection: Connection) -> bool:
        """Does what the next message by its socket asks for, where all of it is there; whether anything was."""
        try:
            data = connection.receive()
        except EOFError:
            self.drop(connection)
            return False
        except channel.NotAMessage as error:
            self.expel(connection, f"it sent what is no message: {error}")
            return False
        except LimitReached as error:
            self.expel(connection, str(error))
            return False
        if data:
            self._take(connection, data)
        return data is not None

    def rearm(self, connection: Connection) -> None:
        """Listens to a client while its backlog is small, and for it to read while there is one."""
        if connection.closed or (not connection.backlog and connection.events == select.EPOLLIN):
            return
        self.listen_to_ring(connection, connection.backlog <= BACKLOG)
        reading = select.EPOLLIN if connection.backlog <= BACKLOG else 0
        events = reading | (select.EPOLLOUT if connection.backlog else 0)
        if events != connection.events:
            try:
                self._loop.rewatch(connection.sock.fileno(), events)
            except OSError as error:  # nobody would ever hear of it again
                log.warning("a client is dropped: %s", error.strerror, extra=_facts(connection))
                self.drop(connection)
                return
            connection.events = events
        if connection.process is not None:  # last: what begins then may fail, and end the connection
            connection.calls.hold(connection.backlog > BACKLOG)

    def listen_to_ring(self, connection: Connection, listen: bool) -> None:
        """Takes calls from its ring from now on, or no longer."""
        ring = connection.ring
        if ring is None or listen == (ring.owner is connection):
            return
        if listen:
            ring.owner = connection
            self.rings.append(ring)
        else:
            ring.owner = None
            self.rings.remove(ring)

    def take_from_ring(self, ring: RingEnd) -> None:
        """Does what the next message there asks for, if its client is still listened to: one, and others have theirs.

        What came by the socket comes first: where its client says so, the ring waits until the socket is empty.
        """
        self._served = connection = ring.owner
        if connection is None:
            return
        try:
            if connection.behind and self._catch_up(connection):
                return
            try:
                data = ring._pop()
            except ValueError as error:
                self.expel(connection, f"it sent what is no message: {error}")
                return
            if data:
                self._take(connection, data)
            elif data is not None:
                connection.behind = True
                self._catch_up(connection)
        except Exception:
            self._fail(connection)

    def _catch_up(self, connection: Connection) -> bool:
        """Whether there was something by the socket, or it must not be listened to any more."""
        connection.behind = self._receive(connection)
        self.rearm(connection)
        return connection.behind or connection.closed or connection.backlog > BACKLOG

    def _fail(self, connection: Connection) -> None:
        """A bug of ours ends one client at worst, never the kernel."""
        log.exception("the kernel failed at something", extra=_facts(connection))
        self.drop(connection)

    def _take(self, connection: Connection, data: bytes) -> None:
        """Does what a message asks for."""
        try:
            places = look_over(data)
            if places is not None and isinstance(places, int):
                raise channel.NotAMessage(FLAWS[places])
            if connection.process is None and not connection.control:
                self._greet(connection, data)
                self._strangers.discard(connection)
                return
            request = self._decode(data)
        except (channel.NotAMessage, msgspec.MsgspecError, ValueError, RecursionError) as error:
            self.expel(connection, f"it sent what is no message: {error}")
            return
        self.handle(connection, request, places or ())

    def _greet(self, connection: Connection, data: bytes) -> None:
        """Takes in who says Hello, or refuses in words. MsgspecError: it says something else."""
        try:
            welcome = self._admission.admit(connection, data)
            if connection.process is not None:
                try:
                    self._loop.watch(connection.pidfd, lambda pidfd: self._on_death(connection, pidfd))
                except OSError as error:
                    raise shortage(error, "the kernel cannot take this process in") from None
                log.info("%r has connected", connection.process, extra=connection.process.facts)
        except KernelError as error:
            with contextlib.suppress(OSError):
                connection.send(_refusal(error))
            self.drop(connection)
            return
        self._welcome(connection, welcome)

    def _welcome(self, connection: Connection, welcome: messages.Welcome) -> None:
        """Says so; to a process with a ring, where there is spinning, and a descriptor for it."""
        ring = None
        rights: list[int] = []
        if connection.process is not None and self._spin:
            with contextlib.suppress(OSError):  # without one everything takes the socket
                ring, descriptor = RingEnd.create()
                welcome.spin = self._spin
                rights.append(descriptor)
        try:
            connection.send(syscalls.encode(welcome), rights)
        except OSError:
            self.drop(connection)
            return
        finally:
            channel.close_all(rights)
        if ring is not None:
            connection.ring, ring.owner = ring, None
            assert connection.process is not None
            connection.process.memory.stock.join(ring)
        self.listen_to_ring(connection, True)
        self.rearm(connection)

    def _on_death(self, connection: Connection, pidfd: int) -> None:
        # Asked again: the event may be of an earlier process whose pidfd had this number.
        if liveness.is_dead(pidfd):
            self.drop(connection)

    def _hear_of_forks(self, connection: Connection) -> None:
        """Its end may be known before its last words are read. Of those, only that it has forked matters now."""
        process, ring = connection.process, connection.ring
        if process is None or process.forked or not len(process.memory):
            return
        for take in [connection.receive] if ring is None else [ring._pop, connection.receive, ring._pop]:
            with contextlib.suppress(Exception):  # EOFError, or no sound message: nothing more comes this way
                for _ in range(LAST_WORDS):
                    data = take()
                    if data is None:
                        break
                    if data and not isinstance(look_over(data), int) and isinstance(self._decode(data), Forked):
                        process.forked = True

    def drop_silent(self, before: float) -> None:
        """Closes connections older than `before` that have not said who they are."""
        for connection in [each for each in self._strangers if each.since < before]:
            self.drop(connection)

    def expel(self, connection: Connection, why: str) -> None:
        """Sends a client away that does not speak as it should."""
        pid = connection.process.pid if connection.process else 0
        log.warning("process %d is sent away: %s", pid, why, extra=_facts(connection))
        error = messages.error_of(ProcessKilled(pid, why=f"the kernel sent this process away: {why}"))
        with contextlib.suppress(Exception):
            connection.send(syscalls.encode(messages.Bye(error)))
        self.drop(connection)

    def drop(self, connection: Connection) -> None:
        """The client is gone: its socket is closed, and what its process held is given back. Again: nothing."""
        if connection.closed:
            return
        process, observer = connection.process, self._books.observer
        fd = connection.sock.fileno()
        self._loop.unwatch(fd)
        self.listen_to_ring(connection, False)
        self._hear_of_forks(connection)
        if process is not None:
            len(process.memory)  # while its ring is there: it finds what names it gave
        if connection is self._served:
            self._served = None
        del self._by_fd[fd]
        self._strangers.discard(connection)
        if process is not None:
            log.info("%r has ended, or closed its connection", process, extra=process.facts)
            if observer is not None:
                observer.disconnected(process, liveness.is_ending(connection.pidfd, process.pid))
            self._loop.unwatch(connection.pidfd)
        connection.close()
        self._gone(connection)
        if process is not None:
            if self._books.reap(process, time.monotonic()):
                self._heirs.search(process)
            if observer is not None:
                observer.reaped(process)


def _refusal(error: KernelError) -> bytes:
    return syscalls.encode(messages.Refused(PROTOCOL, VERSION, messages.error_of(error)))


def _facts(connection: Connection) -> dict[str, int]:
    return connection.process.facts if connection.process is not None else {}
