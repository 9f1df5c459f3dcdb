"""The clients of a kernel: whom it listens to, by socket and ring, and how each is dropped."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

import msgspec

from realmap._core import look_over, read_call
from realmap.errors import KernelError, LimitReached, ProcessKilled
from realmap.host import files, liveness
from realmap.host.translate import shortage
from realmap.kernel.admission import Admission
from realmap.kernel.books import Books
from realmap.kernel.connection import Connection
from realmap.kernel.heirs import Heirs
from realmap.kernel.limits import first_reserved
from realmap.serving import syscalls
from realmap.serving.lines import Lines
from realmap.serving.logs import log
from realmap.serving.loop import Loop
from realmap.wire import channel, messages
from realmap.wire.messages import FLAWS, PROTOCOL, VERSION, Forked
from realmap.wire.ring import RingEnd

Handle: TypeAlias = Callable[[Connection, messages.Request, Sequence[messages.Place]], None]
#: So many messages of a client that has ended are read, at most: more do not wait in a socket or a ring, unless
#: others go on.
LAST_MESSAGES = 512


class Clients(Lines[Connection]):
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
        super().__init__(loop)
        self._admission = admission
        self._heirs = heirs
        self._spin = spin
        self._gone = gone
        #: What is done with a request, whose arguments have buffers there.
        self.handle: Handle
        self._decode = msgspec.msgpack.Decoder(messages.Request).decode
        #: Those that have not said who they are.
        self._strangers: set[Connection] = set()

    def after_fork_in_child(self) -> None:
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
            self.turn_away(sock, error)
            return
        try:
            self._add(connection)
        except OSError as error:  # nobody would ever hear of it
            log.warning("a client was turned away: %s", error.strerror)
            connection.close()
            return
        self._strangers.add(connection)
        self._keep_room_for_commands()

    def turn_away(self, sock: socket.socket, error: KernelError) -> None:
        """Tells somebody who has connected why it cannot come in."""
        with contextlib.suppress(OSError):
            channel.send_one(sock, bytes([channel.WHOLE]) + _refusal(error))
        files.shut(sock)

    def _keep_room_for_commands(self) -> None:
        """Of the descriptors in reserve, half are the most that those have who have not said that they are commands."""
        limits = self._books.limits
        first = first_reserved(limits)
        inside = [each for each in self._strangers if each.sock.fileno() >= first]
        if len(inside) > max(1, limits.reserve // 2):
            self.drop(min(inside, key=lambda each: each.since))

    def _held(self, line: Connection, held: bool) -> None:
        if line.process is not None:
            line.calls.hold(held)

    def _facts(self, line: Connection) -> dict[str, int]:
        return line.process.facts if line.process is not None else {}

    def _take(self, line: Connection, data: bytes) -> None:
        """Does what a message asks for."""
        if line.process is not None and (plain := read_call(data)) is not None:
            self.handle(line, messages.Call(*plain), ())
            return
        try:
            places = look_over(data)
            if places is not None and isinstance(places, int):
                raise channel.NotAMessage(FLAWS[places])
            if line.process is None and not line.control:
                self._greet(line, data)
                self._strangers.discard(line)
                return
            request = self._decode(data)
        except (channel.NotAMessage, msgspec.MsgspecError, ValueError, RecursionError) as error:
            self.expel(line, f"it sent what is no message: {error}")
            return
        self.handle(line, request, places or ())

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
        """Its end may be known before its last messages are read. Of those, only that it has forked matters now."""
        process, ring = connection.process, connection.ring
        if process is None or process.forked or not len(process.memory):
            return
        for take in [connection.receive] if ring is None else [ring._pop, connection.receive, ring._pop]:
            with contextlib.suppress(Exception):  # EOFError, or no sound message: nothing more comes this way
                for _ in range(LAST_MESSAGES):
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
        log.warning("process %d is sent away: %s", pid, why, extra=self._facts(connection))
        error = messages.error_of(ProcessKilled(pid, why=f"the kernel sent this process away: {why}"))
        with contextlib.suppress(Exception):
            connection.send(syscalls.encode(messages.Bye(error)))
        self.drop(connection)

    def drop(self, connection: Connection) -> None:
        """The client is gone: its socket is closed, and what its process held is given back. Again: nothing."""
        if connection.closed:
            return
        process, observer = connection.process, self._books.observer
        self._remove(connection)
        self._hear_of_forks(connection)
        if process is not None:
            len(process.memory)  # while its ring is there: it finds what names it gave
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
