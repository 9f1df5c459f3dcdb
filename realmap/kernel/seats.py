"""`Seats`: the sockets of services and sessions. Who serves hears of its sessions by its seat's socket; what caller and
server say to each other goes by a socket and a ring of their own, past the kernel.

    Serve ──▶ a seat: its socket (ours is watched) and its page
    Open  ──▶ a session: a socketpair and a ring. The server's end of the socket stays open here as well: it tells when
              either side hangs up, and is shut down when either dies, whoever else (a forked child) has it
    Lend  ──▶ a grant: answered when the server can know of it

Nobody waits for a server that does not read its socket. What it is still to be told waits as what it is about, once
each (`_Desk.news`): what ends before it was told of is never told. So that is no more than its callers may have.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
from dataclasses import dataclass, field

import msgspec

from realmap._core import Durations, look_over
from realmap.errors import InvalidAddress, KernelError, LimitReached, ServerDied
from realmap.host import files
from realmap.host.translate import SHORT_OF_MEMORY, shortage
from realmap.kernel.books import Books
from realmap.kernel.circles import Looks
from realmap.kernel.limits import require_unreserved
from realmap.kernel.ports import Grant, Seat, Session
from realmap.kernel.processes import UserProcess
from realmap.kernel.services import Answer, Begun, Reply, Service, descriptors
from realmap.serving.logs import log
from realmap.serving.loop import Loop
from realmap.serving.syscalls import encode
from realmap.wire import channel, messages
from realmap.wire.messages import MAX_DESCRIPTORS
from realmap.wire.news import Gone, Granted, News, Opened, Refused, Revoked, Served, Told, Worked
from realmap.wire.ring import RingEnd
from realmap.wire.seat import BUSY, CHANGES, GRANTS, TRACED, WAITING, SeatPage

#: So many datagrams go to a seat before others have their turn.
TURN = 8
#: So many requests may wait for the same grant.
WAITING_FOR_ONE = 64
#: What is to be told: of a session, that it is opened, or gone; of a grant, that it is made, or revoked.
Matter = Session | Grant


@dataclass(eq=False, slots=True)
class _Desk:
    """The kernel's side of a seat."""

    seat: Seat
    sock: socket.socket
    page: SeatPage
    page_fd: int
    #: What epoll is asked to tell of it.
    events: int = select.EPOLLIN
    #: In the order in which it is told.
    news: dict[Matter, None] = field(default_factory=dict)
    #: For a circle of services that it may be in.
    looks: Looks = field(default_factory=Looks)

    def close(self) -> None:
        files.shut(self.sock)
        files.close(self.page_fd)
        self.page.close()


@dataclass(eq=False, slots=True)
class _Line:
    """The kernel's share in a session: the server's end of its socket; and the ring, until the server is told of it."""

    sock: socket.socket
    #: -1: there is none, or the server has it.
    ring: int = -1

    def descriptors(self) -> list[int]:
        return [self.sock.fileno()] + [self.ring] * (self.ring >= 0)

    def forget_ring(self) -> None:
        if self.ring >= 0:
            files.close(self.ring)
            self.ring = -1

    def close(self) -> None:
        files.shut(self.sock)
        self.forget_ring()


class Seats:
    """All seats and sessions. Only on the loop."""

    def __init__(self, books: Books, loop: Loop, spin: float) -> None:
        """`spin`: microseconds that both sides of a session look for the next message; 0: no rings."""
        self._books = books
        self._loop = loop
        self._spin = spin
        self._desks: dict[Seat, _Desk] = {}
        self._lines: dict[Session, _Line] = {}
        self._decode = msgspec.msgpack.Decoder(Told).decode
        #: As `services.SERVICES`.
        self.services: dict[type, Service] = {
            messages.Serve: self._serve,
            messages.Open: self._open,
            messages.Close: self._close,
            messages.Lend: self._lend,
        }
        books.ports.revoked = self._revoke
        books.ports.traced = self._trace

    # ---- what is asked for ------------------------------------------------------------------

    def _serve(self, books: Books, process: UserProcess, request: messages.Serve) -> Answer:
        """A seat: its number, its socket and its page. Errors as `Ports.serve`; LimitReached, PhysicalMemoryExhaustion:
        no descriptors, or no memory.
        """
        seat = books.ports.serve(process, request, books.syscalls)
        rights: list[int] = []
        try:
            with contextlib.ExitStack() as undo:
                undo.callback(books.ports.end, seat)
                undo.callback(channel.close_all, rights)
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                rights.append(theirs.detach())
                undo.callback(files.shut, ours)
                ours.setblocking(False)
                page, page_fd = SeatPage.create(seat.threads)
                undo.callback(page.close)
                undo.callback(files.close, page_fd)
                rights.append(os.dup(page_fd))
                require_unreserved(books.limits, *rights)
                desk = _Desk(seat, ours, page, page_fd)
                self._loop.watch(ours.fileno(), lambda _: self._on_desk(desk))
                undo.pop_all()
        except OSError as error:
            raise shortage(error, "the kernel cannot make a service") from None
        self._desks[seat] = desk
        page.words[TRACED] = books.observer is not None
        self._count_change(seat)
        log.info("%r serves %s", process, ", ".join(seat.names), extra=process.facts)
        return seat.number, rights

    def _open(self, books: Books, process: UserProcess, request: messages.Open) -> Answer:
        """A session: [number, seat, the server's pid, the time to spin, what it serves]; socket, ring, the seat's page.

        UnknownSyscall: nobody serves that name. LimitReached, PhysicalMemoryExhaustion: it has too many, or there are
        no descriptors.
        """
        most = books.limits.sessions
        if len(request.but) > most:
            why = f"a process has {most} sessions at most (sessions), and excludes no more seats than that"
            raise LimitReached("sessions", most, why=why)
        but = set(request.but)
        while True:
            seat = books.ports.choose(request.name, but, self._load)
            session = books.ports.open(process, seat)
            try:
                rights = self._connect(session)
            except BaseException:
                books.ports.close(session)
                raise
            self._tell(session)
            if not session.ended:
                return [session.number, seat.number, seat.process.pid, self._spin, list(seat.names)], rights
            channel.close_all(rights)  # the server has gone this moment: the next one

    def _load(self, seat: Seat) -> float:
        words = self._desks[seat].page.words
        return (words[BUSY] + words[WAITING]) / seat.threads

    def _connect(self, session: Session) -> list[int]:
        """Makes what caller and server talk by: the caller's descriptors. KernelError: as `_open`; nothing is left."""
        rights: list[int] = []
        try:
            with contextlib.ExitStack() as undo:
                undo.callback(channel.close_all, rights)
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                line = _Line(ours)
                undo.callback(line.close)
                rights.append(theirs.detach())
                if self._spin:
                    line.ring = RingEnd.make()
                    rights.append(os.dup(line.ring))
                page = f"/proc/self/fd/{self._desks[session.seat].page_fd}"
                rights.append(os.open(page, os.O_RDONLY | os.O_CLOEXEC))
                require_unreserved(self._books.limits, *rights)
                self._loop.watch(ours.fileno(), lambda _: self._on_line(session), 0)  # it only hears that one hangs up
                undo.pop_all()
        except OSError as error:
            raise shortage(error, "the kernel cannot make a session") from None
        self._lines[session] = line
        return rights

    def _close(self, books: Books, process: UserProcess, request: messages.Close) -> None:
        """Ends a session; where there is none, nothing. There is no answer."""
        session = process.sessions.get(request.session)
        if session is not None:
            self._end_session(session)

    def _lend(self, books: Books, process: UserProcess, request: messages.Lend) -> Answer | Begun:
        """Grants a mapping. Errors as `Ports.find` and `Ports.lend`; PhysicalMemoryExhaustion: no descriptors."""
        session = books.ports.find(process, request.session)
        grant = books.ports.lend(session, request.address)
        if not grant.left:
            return None, []
        if len(grant.waiting) >= WAITING_FOR_ONE:
            why = f"{WAITING_FOR_ONE} requests wait already until process {session.seat.process.pid} can know of it"
            raise LimitReached("grants", WAITING_FOR_ONE, why=why)

        def begin(reply: Reply) -> None:
            grant.waiting.append(reply)
            self._tell(grant)

        return Begun(begin)

    # ---- what a server is told --------------------------------------------------------------

    def _tell(self, news: Matter) -> None:
        session = news if isinstance(news, Session) else news.session
        desk = self._desks[session.seat]
        desk.news[news] = None
        self._flush(desk)

    def _flush(self, desk: _Desk) -> None:
        """Tells a server what it takes now, and the rest when it can."""
        for _ in range(TURN):
            if not desk.news or not self._say(desk, next(iter(desk.news))):
                break
        if desk.seat in self._desks:
            self._rearm(desk)

    def _rearm(self, desk: _Desk) -> None:
        events = (0 if desk.seat.closing else select.EPOLLIN) | (select.EPOLLOUT if desk.news else 0)
        if events != desk.events:
            desk.events = events
            try:
                self._loop.rewatch(desk.sock.fileno(), events)
            except OSError as error:  # nobody would ever hear of it again
                self._expel(desk, str(error))

    def _say(self, desk: _Desk, news: Matter) -> bool:
        """Tells one thing, or a part of it; whether it could be said."""
        if isinstance(news, Session):
            if not self._send(desk, *self._of_session(news)):
                return False
            del desk.news[news]
            if not news.told:
                news.told = True
                self._lines[news].forget_ring()
            return True
        mapping, session = news.mapping, news.session.number
        if news.ended:
            if not self._send(desk, Revoked(session, mapping.serial), []):
                return False
            del desk.news[news]
            desk.page.count(GRANTS)
            return True
        pieces = [piece[1:] for piece in news.frames.pieces(news.offset, news.left, MAX_DESCRIPTORS)]
        place = mapping.address, mapping.length, int(mapping.type), int(mapping.rights)
        try:
            opened = self._books.patiently(news.session.process, lambda: descriptors(mapping, news.told))
        except KernelError as error:
            del news.session.grants[mapping.serial]
            self._revoke(news, error)
            return False
        try:
            message = Granted(session, mapping.serial, *place, pieces, news.told, news.count)
            if not self._send(desk, message, opened):
                return False
        finally:
            channel.close_all(opened)
        size = sum(length for _, length in pieces)
        news.told, news.offset, news.left = news.told + len(pieces), news.offset + size, news.left - size
        desk.page.count(GRANTS)
        if not news.left:
            del desk.news[news]
            _answer(news, (None, []))
        return True

    def _of_session(self, session: Session) -> tuple[News, list[int]]:
        if session.told:
            return Gone(session.number), []
        caller = session.process
        opened = Opened(session.number, caller.number, caller.pid, caller.uid)
        return opened, self._lines[session].descriptors()

    def _send(self, desk: _Desk, message: News, rights: list[int]) -> bool:
        """Whether it was sent. Where it never can be, the server has gone."""
        try:
            channel.send_one(desk.sock, encode(message), rights)
        except BlockingIOError:
            return False
        except OSError as error:
            # ETOOMANYREFS: too many descriptors in flight for this user; they drain as servers read.
            if error.errno != errno.ETOOMANYREFS and error.errno not in SHORT_OF_MEMORY:
                self._end_seat(desk.seat)
            return False
        return True

    def _revoke(self, grant: Grant, why: KernelError | None = None) -> None:
        """A grant has ended, and its session has not."""
        grant.end()
        desk = self._desks[grant.session.seat]
        if grant.told:
            desk.news[grant] = None
            self._flush(desk)
        else:
            desk.news.pop(grant, None)
        address = grant.mapping.address
        _answer(
            grant, why or InvalidAddress(address, why="it was unmapped, or moved, before its server was told of it")
        )

    # ---- what a server says, and who hangs up -----------------------------------------------

    def _on_desk(self, desk: _Desk) -> None:
        if desk.news:
            self._flush(desk)
        if desk.seat not in self._desks:
            return
        if desk.seat.closing:
            if _hung_up(desk.sock):
                self._end_seat(desk.seat)
            return
        try:
            data = desk.sock.recv(channel.DATAGRAM)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if data:
            self._hear(desk, data)
        elif _hung_up(desk.sock):
            self._end_seat(desk.seat)
        else:  # it closes in good order: what runs goes on
            self._books.ports.withdraw(desk.seat)
            self._count_change(desk.seat)
            self._rearm(desk)

    def _hear(self, desk: _Desk, data: bytes) -> None:
        try:
            if isinstance(look_over(data), int):
                raise ValueError("it is no message, or too large a one")
            told = self._decode(data)
            if isinstance(told, Served):
                for _, _, counts in told.names.values():
                    Durations().add(counts)
        except (msgspec.MsgspecError, ValueError, OverflowError, IndexError, RecursionError) as error:
            self._expel(desk, f"it told what is no message: {error}")
            return
        if isinstance(told, Served):
            desk.seat.served = told
            desk.seat.told += 1
            if told.waits and (circle := desk.looks.again(desk.seat)) is not None:
                last = circle.waits[-1]  # it is refused, so that the others go on
                self._send(self._desks[last.seat], Refused(*last.call, circle.why), [])  # else it is found again
        elif isinstance(told, Gone) and (session := desk.seat.sessions.get(told.session)) is not None:
            self._end_session(session)
        elif isinstance(told, Worked) and (observer := self._books.observer) is not None:
            for caller, id, name, came, began, ended, code in told.calls:
                observer.served(desk.seat.process, caller, id, name, (came, began, ended), code)

    def _trace(self, on: bool) -> None:
        for desk in self._desks.values():
            desk.page.words[TRACED] = on

    def _expel(self, desk: _Desk, why: str) -> None:
        log.warning("a service of %s ends: %s", desk.seat.label, why, extra=desk.seat.process.facts)
        self._end_seat(desk.seat)

    def _on_line(self, session: Session) -> None:
        # Asked again: the event may be of an earlier session whose socket had this number.
        if not session.ended and _hung_up(self._lines[session].sock):
            self._end_session(session)

    # ---- ends -------------------------------------------------------------------------------

    def leave(self, process: UserProcess) -> None:
        """It has ended: so have what it served, and its sessions."""
        for session in list(process.sessions.values()):
            self._end_session(session)
        for seat in list(process.seats.values()):
            self._end_seat(seat)

    def _end_session(self, session: Session) -> None:
        """Both sides are told. Again: nothing."""
        if session.ended:
            return
        self._books.ports.close(session)
        line, seat = self._lines.pop(session), session.seat
        self._loop.unwatch(line.sock.fileno())
        with contextlib.suppress(OSError):  # both have closed it
            line.sock.shutdown(socket.SHUT_RDWR)
        line.close()
        desk = self._desks.get(seat)
        if desk is not None:
            desk.news.pop(session, None)
            for grant in session.grants.values():
                desk.news.pop(grant, None)
            if session.told:
                self._tell(session)
        why = f"session {session.number} with {seat.label} has ended"
        for grant in session.grants.values():
            _answer(grant, ServerDied("", seat.process.pid, False, why=why))
        session.grants.clear()

    def _end_seat(self, seat: Seat) -> None:
        """It and its sessions are no more. Again: nothing."""
        desk = self._desks.pop(seat, None)
        if desk is None:
            return
        self._loop.unwatch(desk.sock.fileno())
        for session in list(seat.sessions.values()):
            self._end_session(session)
        self._books.ports.end(seat)
        self._count_change(seat)
        desk.close()

    def _count_change(self, seat: Seat) -> None:
        """A seat has come or gone: who calls one of its names may want to look for another one."""
        for each in (*self._books.ports.rivals(seat), seat):
            if each in self._desks:
                self._desks[each].page.count(CHANGES)

    def after_fork_in_child(self) -> None:
        ours: list[_Desk | _Line] = [*self._desks.values(), *self._lines.values()]
        for each in ours:
            each.close()
        self._desks.clear()
        self._lines.clear()


def _answer(grant: Grant, got: Answer | KernelError) -> None:
    waiting, grant.waiting = grant.waiting, []
    for reply in waiting:
        reply(got)


def _hung_up(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, 0)  # POLLHUP
    return bool(poll.poll(0))
