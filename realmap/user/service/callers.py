"""`Callers`: whom a service listens to, by the sessions that the kernel makes; and how each of these ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TypeAlias
from weakref import WeakValueDictionary

import msgspec

from realmap._core import look_over, read_call
from realmap.errors import KernelError, LimitReached, ProcessKilled
from realmap.memory.frames import FrameAllocator
from realmap.serving.lines import Lines
from realmap.serving.logs import log
from realmap.serving.loop import Loop
from realmap.serving.syscalls import encode
from realmap.user.service.seat import Seat
from realmap.user.service.session import Session
from realmap.wire import channel, messages
from realmap.wire.messages import FLAWS
from realmap.wire.news import Gone, Granted, Opened, Refused, Revoked

Handle: TypeAlias = Callable[[Session, messages.Call, Sequence[messages.Place]], None]
_decode = msgspec.msgpack.Decoder(messages.Call | messages.NestedCall).decode


class Callers(Lines[Session]):
    """Everybody who has a session. Only on the thread that has the service's loop."""

    def __init__(
        self,
        seat: Seat,
        loop: Loop,
        share: int,
        handle: Handle,
        refused: Callable[[Refused], None],
        gone: Callable[[Session], None],
    ) -> None:
        """`share`: so many descriptors are of what one caller lends, at most. `handle`: what is done with a call, whose
        buffers are there. `refused`: is told which call the kernel refuses; `gone`: of each session that ends.
        """
        super().__init__(loop)
        self._seat = seat
        self._share = share
        self.handle, self.refused, self.gone = handle, refused, gone
        self._sessions: dict[int, Session] = {}
        #: What each caller has lent, by its pid: in all its sessions, and what calls hold after their end.
        self._lent: WeakValueDictionary[int, FrameAllocator] = WeakValueDictionary()

    def hear(self) -> None:
        """Does what the kernel says: who has come, what is lent, what has ended."""
        try:
            for news, descriptors in self._seat.hear():
                if isinstance(news, Opened):
                    self._enter(news, descriptors)
                elif isinstance(news, Refused):
                    self.refused(news)
                elif (session := self._sessions.get(news.session)) is None:
                    continue
                elif isinstance(news, Granted):
                    try:
                        session.enter(news, descriptors)
                    except LimitReached as error:  # beyond what the kernel counts: calls hold what was unmapped
                        self._send_away(session, error)
                    except KernelError as error:  # its caller lends anew, by another session
                        log.warning("what a caller lends cannot be taken: %s", error, extra=session.caller.facts)
                        self.drop(session)
                elif isinstance(news, Revoked):
                    session.leave(news.serial)
                else:
                    self.drop(session)
        except EOFError:
            self._loop.unwatch(self._seat.sock.fileno())
            self._loop.end()

    def _enter(self, opened: Opened, descriptors: list[int]) -> None:
        held = self._lent.setdefault(opened.pid, FrameAllocator(segments=self._share))
        try:
            session = Session(opened, descriptors, held)
            try:
                self._add(session)
            except OSError:
                session.shut()
                raise
        except OSError as error:
            log.warning("a caller is turned away: %s", error)
            self._seat.tell(Gone(opened.session))
            return
        self._sessions[session.number] = session
        self.listen_to_ring(session, True)

    def expel(self, line: Session, why: str) -> None:
        """Ends the session of a caller that does not speak as it should."""
        self._send_away(line, ProcessKilled(line.caller.pid, why=f"the server ended this session: {why}"))

    def _send_away(self, line: Session, error: KernelError) -> None:
        log.warning("a caller is sent away: %s", error.why, extra=line.caller.facts)
        try:
            line.send(encode(messages.Bye(messages.error_of(error))))
        except (OSError, KernelError):
            pass
        self.drop(line)

    def drop(self, line: Session) -> None:
        """A session is over. Again: nothing."""
        if line.closed:
            return
        self._remove(line)
        del self._sessions[line.number]
        line.shut()
        self.gone(line)

    def _facts(self, line: Session) -> dict[str, int]:
        return line.caller.facts

    def _take(self, line: Session, data: bytes) -> None:
        if (plain := read_call(data)) is not None:
            self.handle(line, messages.Call(*plain), ())
            return
        try:
            places = look_over(data)
            if isinstance(places, int):
                raise channel.NotAMessage(FLAWS[places])
            request = _decode(data)
        except (channel.NotAMessage, msgspec.MsgspecError, ValueError, RecursionError) as error:
            self.expel(line, f"it sent what is no message: {error}")
            return
        self.handle(line, request, places or ())

    def close(self) -> None:
        """All sessions end. What has come meanwhile was not begun: it is answered so."""
        for session in self.all():
            with contextlib.suppress(ValueError):  # a ring whose indices lie: nothing has come
                for _ in range(session.ring is not None and 64):
                    if (data := session.ring and session.ring._pop()) is None:
                        break
                    if data:
                        self._take(session, data)
            self.drop(session)
