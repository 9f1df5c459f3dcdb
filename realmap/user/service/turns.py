"""`Turns`: calls that wait for a thread, each in the line of its session; the sessions take turns, one call each."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from msgspec.structs import replace

from realmap.errors import LimitReached
from realmap.serving import user_buffer
from realmap.user.service.session import Session, Work


class Turns:
    """Only on the thread that has the service's loop."""

    def __init__(self, most: int) -> None:
        """`most`: so many may wait."""
        self._most = most
        self._count = 0
        self._sessions: deque[Session] = deque()

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Work]:
        return (work for session in self._sessions for work in session.waiting)

    def add(self, work: Work) -> None:
        """It waits from now on, its buffers pinned. LimitReached: too many do."""
        if self._count >= self._most:
            syscall = work.syscall.name
            why = f"{self._count} calls wait for {syscall!r} already, its limit: call later, or me.serve(queue=…)"
            raise LimitReached("queue", self._most, why=why)
        for buffer in work.buffers:
            user_buffer.pin(buffer)
        session = work.session
        if not session.waiting:
            self._sessions.append(session)
        session.waiting.append(replace(work, pinned=True))
        self._count += 1

    def next(self) -> Work:
        """Takes out whose turn it is. IndexError: nobody waits."""
        session = self._sessions.popleft()
        work = session.waiting.popleft()
        if session.waiting:
            self._sessions.append(session)
        self._count -= 1
        return work

    def take(self, session: int, id: int) -> Work | None:
        """Takes out the call with that number; None: it does not wait."""
        for work in self:
            if (work.session.number, work.request.id) == (session, id):
                work.session.waiting.remove(work)
                if not work.session.waiting:
                    self._sessions.remove(work.session)
                self._count -= 1
                return work
        return None

    def drop(self, session: Session) -> None:
        """The calls of a session that has ended wait no more."""
        if session.waiting:
            self._sessions.remove(session)
            self._count -= len(session.waiting)
        while session.waiting:
            for buffer in session.waiting.popleft().buffers:
                user_buffer.end(buffer, pinned=True)
