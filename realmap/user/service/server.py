"""`Server`: takes the calls of a service's sessions, and runs their handlers. As the kernel does, without its books.

a session's ring or socket ──▶ callers ──▶ fewer than `threads` at work: run it
                                    └────▶ else it waits, in its session's own line; who waits longest is next, and
                                           of each session one after the other's
run     a short handler on the thread that has the loop; one that does not come back loses the loop to the standby
        blocking ones on a worker thread, `async` ones as tasks of an event loop
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import msgspec
from msgspec.structs import replace

from realmap.errors import (
    KernelError,
    LimitReached,
    PhysicalMemoryExhaustion,
    ServerDied,
    SyscallTimeout,
    UnknownSyscall,
)
from realmap.host import forks
from realmap.host.translate import shortage
from realmap.memory.lending import LentLand
from realmap.serving import nesting, user_buffer
from realmap.serving.logs import log
from realmap.serving.loop import Loop, Lost
from realmap.serving.registry import Syscall
from realmap.serving.standby import LOOK, Relay, Taken
from realmap.serving.syscalls import Call, failed, has_failed, run
from realmap.serving.user_buffer import UserBuffer
from realmap.serving.workers import Workers
from realmap.user.service.callers import Callers
from realmap.user.service.elsewhere import Elsewhere
from realmap.user.service.reports import MOST, Beside, Trace, served
from realmap.user.service.seat import Seat
from realmap.user.service.session import Session, Work
from realmap.user.service.turns import Turns
from realmap.wire import messages
from realmap.wire.messages import DONE
from realmap.wire.news import Refused
from realmap.wire.ring import SPIN
from realmap.wire.seat import BUSY, TRACED, WAITING
from realmap.wire.status import Page

if TYPE_CHECKING:
    from realmap.user.service.tasks import Tasks

#: How often the kernel is told what has changed, in seconds.
TELL = 0.2
#: Buffers of a call, and mappings that they lie in, at most.
BUFFERS = 1024


class Server:
    """Only on the thread that has its loop, but for `open`, `end_soon` and what the loop is for."""

    def __init__(
        self, seat: Seat, handlers: dict[str, Syscall], land: LentLand, threads: int, queue: int, share: int
    ) -> None:
        """`share`: so many descriptors are of what one caller lends, at most."""
        self._page = Page()  # a loop writes there; nobody looks
        self.loop = Loop(self._page)
        self._seat = seat
        self._handlers = handlers
        self._land = land
        self._threads, self._queue = threads, queue
        self._elsewhere = Elsewhere(land)
        self._callers = Callers(seat, self.loop, share, self._handle, self._break_circle, self._lose)
        self._mine = (seat.number,)
        #: Of the thread that has the loop.
        self._place = nesting.Place(seat.kernel, self._mine)
        # Where more may be at work at a time, the next one does not wait so long for the one before.
        self.relay: Relay[Work] = Relay(self._run, "service", LOOK if threads == 1 else LOOK / 10)
        self._workers = Workers()
        self._tasks: Tasks | None = None
        #: Calls at work beside the loop; how many of them are tasks, which take no thread, and how many take one.
        self._beside: dict[Call, Beside] = {}
        self._awaiting = self._busy = 0
        #: Those that wait.
        self._turns = Turns(queue)
        self._is_told = True
        self._trace = Trace(seat, self.loop)
        self.closing = False
        #: What ended it other than its owner.
        self.error: Exception | None = None
        #: Called at the end, on the loop's thread.
        self.ended: Callable[[], None] = lambda: None
        forks.lose_in_child(self)

    # ---- its threads ------------------------------------------------------------------------

    def open(self) -> None:
        """OSError: no descriptors, or no memory. RuntimeError: no thread."""
        self.loop.open()
        try:
            self.loop.watch(self._seat.sock.fileno(), lambda _: self._callers.hear())
            self.relay.start()
        except BaseException:
            self.loop.close()
            raise

    def _run(self, taken: Taken[Work] | None) -> None:
        """On the thread that has the loop: runs it to its end. Lost: another one has it now."""
        before, self._place = self._place, nesting.Place(self._seat.kernel, self._mine)
        self._place.enter()
        try:
            if taken is not None:
                self._take_over(taken, before)
                del taken.work
            if not self.relay.stand_by():
                log.warning("no thread stands by for a service: a slow handler keeps it")
            self.loop.run(self._callers.rings, self._callers.take_from_ring, SPIN)
        except Exception as error:
            self.error = error
            log.exception("a service ends")
        self._close()

    def end_soon(self) -> None:
        """Ends it in good order: those at work end, those that wait are told to go elsewhere. From any thread."""
        self.loop.post(self._begin_end)

    def _begin_end(self) -> None:
        if self.closing:
            return
        self.closing = self._elsewhere.ending = True
        self._tell()
        self._seat.leave()
        while self._turns:
            self._refuse(self._turns.next())
        if not self._beside:
            self.loop.end()

    def _close(self) -> None:
        self.closing = self._elsewhere.ending = True
        self.relay.end()
        self._callers.close()
        self._trace.tell()
        self._seat.close()
        self._workers.close()
        if self._tasks is not None:
            self._tasks.close()
        self.loop.close()
        self.ended()

    def _after_fork_in_child(self) -> None:
        """It is the parent's alone."""
        self.ended()
        for session in self._callers.all():
            session.after_fork_in_child()
        self.loop.after_fork_in_child()
        self.relay.after_fork_in_child()
        self._seat.close()

    # ---- calls -------------------------------------------------------------------------------

    def _handle(self, session: Session, request: messages.Call, places: Sequence[messages.Place]) -> None:
        syscall = self._handlers.get(request.name)
        try:
            self._call(session, request, syscall, places)
        except KernelError as error:  # before its handler began
            if syscall is not None:
                syscall.failed += 1
            self._send(session, failed(request.id, error))

    def _call(
        self, session: Session, request: messages.Call, syscall: Syscall | None, places: Sequence[messages.Place]
    ) -> None:
        if syscall is None:
            known = ", ".join(sorted(self._handlers))
            raise UnknownSyscall(request.name, why=f"this service has no {request.name!r} (it has: {known})")
        if self.closing:
            raise self._elsewhere_now(request.name)
        syscall.calls += 1
        if self._is_told:
            self._tell_soon()
        if type(request) is messages.NestedCall:
            self._require_no_circle(request, syscall.is_async)
        if places and self._seat.has_news:
            self._callers.hear()
        buffers = self._buffers(session, places) if places else ()
        call = Call(session.caller, syscall.name, self._elsewhere)  # type: ignore[arg-type]
        if request.timeout is not None:
            call.deadline = self._page.now / 1e9 + request.timeout
        work = Work(session, call, syscall, request, buffers, False, self._page.now)
        if syscall.is_async:
            self._require_few_tasks(syscall.name)
        if self._busy >= self._threads and not syscall.is_async:
            self._turns.add(work)
            self._say()
        else:
            self._begin(work)

    def _buffers(self, session: Session, places: Sequence[messages.Place]) -> list[UserBuffer]:
        if len(places) > BUFFERS:
            why = f"a call of {len(places)} buffers; a service takes {BUFFERS}: make several calls"
            raise LimitReached("buffers", BUFFERS, why=why)
        most = BUFFERS // len(places)
        return [UserBuffer(session.caller, self._land, None, *place, most) for place in places]

    def _require_few_tasks(self, name: str) -> None:
        """LimitReached: as many calls of `async` handlers are at work as may wait, where they were not `async`."""
        if self._awaiting >= self._threads + self._queue:
            why = f"{self._awaiting} calls are at work; {name!r} takes no more: call later, or me.serve(queue=…)"
            raise LimitReached("queue", self._queue, why=why)

    def _require_no_circle(self, request: messages.NestedCall, is_async: bool) -> None:
        """LimitReached: every thread of this service would wait for the one that it waits for."""
        if request.seats.count(self._seat.number) >= self._threads and not is_async:
            why = f"{request.name!r} would wait for itself: it is called by what its {self._threads} thread(s) wait for"
            raise LimitReached("threads", self._threads, why=f"{why}; serve with more threads, or do not call back")

    def _break_circle(self, refused: Refused) -> None:
        """A call waits for a thread that waits for it, through others. Where it does not any more: nothing."""
        work = self._turns.take(refused.session, refused.id)
        if work is not None:
            self._answer(work, failed(refused.id, LimitReached("threads", self._threads, why=refused.why)))
            self._say()

    def _next(self) -> None:
        """Begins what waits, as far as threads are free."""
        while self._turns and self._busy < self._threads:
            work = self._turns.next()
            if self.closing:
                self._refuse(work)
            elif work.call.cancelled:
                late = SyscallTimeout(work.syscall.name, work.request.timeout or 0.0)
                self._answer(work, failed(work.request.id, late))
            else:
                self._begin(work)
        self._say()
        if self.closing and not self._beside:
            self.loop.end()

    def _refuse(self, work: Work) -> None:
        self._answer(work, failed(work.request.id, self._elsewhere_now(work.syscall.name)))

    def _elsewhere_now(self, name: str) -> ServerDied:
        return ServerDied(name, os.getpid(), False, why=f"the process that served {name!r} serves no more")

    def _begin(self, work: Work) -> None:
        syscall = work.syscall
        if syscall.blocking or syscall.is_async:
            self._begin_beside(work)
            return
        session, call, request, buffers = work.session, work.call, work.request, work.buffers
        words, relay = self._seat.words, self.relay
        words[BUSY] = self._busy + 1
        nested = type(request) is messages.NestedCall
        if nested:
            self._place.seats = request.seats + self._mine  # type: ignore[attr-defined]
        relay.away[call] = work
        if relay.parked:
            relay.wake()
        began = self._page.now
        answer = run(syscall, call, request, buffers)
        syscall.durations.since(began)
        try:
            del relay.away[call]
        except KeyError:
            self._come_late(call, answer)
        if nested:
            self._place.seats = self._mine
        words[BUSY] = self._busy
        if buffers:
            answer = self._settled(request.id, answer, buffers)
        if words[TRACED]:
            self._trace.note(work, began, answer)
        if answer[1] != DONE:
            syscall.failed += 1
        for buffer in buffers:
            user_buffer.end(buffer, pinned=work.pinned)
        if session.closed or not session.send_short(answer):
            self._send(session, answer)

    def _come_late(self, call: Call, answer: bytes) -> NoReturn:
        """On a thread that has lost the loop."""
        self.loop.post(partial(self._end, call, answer))
        raise Lost

    def _take_over(self, taken: Taken[Work], place: nesting.Place) -> None:
        """The handler of a call has lost the loop: it goes on where it is. On the new thread, before anything else."""
        self._put_beside(taken.work, taken.since, place)
        self.loop.post(self._next)  # and what else was posted, which the late one was about to do

    def _put_beside(self, work: Work, since: float, place: nesting.Place) -> Work:
        if not work.pinned:
            buffers = [
                buffer
                for buffer in work.buffers
                if not any(mapping.released for mapping, _, _ in user_buffer.parts_of(buffer))
            ]
            for buffer in buffers:
                user_buffer.pin(buffer)
            work = replace(work, buffers=buffers, pinned=True)
        self._beside[work.call] = Beside(work, since, place)
        self._awaiting += work.syscall.is_async
        self._busy += not work.syscall.is_async
        self._say()
        return work

    def _begin_beside(self, work: Work) -> None:
        """Runs a handler on a worker thread, or as a task."""
        place = nesting.Place(self._seat.kernel, (*getattr(work.request, "seats", ()), *self._mine))
        work = self._put_beside(work, time.monotonic(), place)
        call, syscall, request, buffers = work.call, work.syscall, work.request, work.buffers
        began = time.monotonic_ns()

        def end(answer: bytes) -> None:
            syscall.durations.since(began)
            self.loop.post(partial(self._end, call, answer))

        def on_thread() -> None:
            place.enter()
            end(run(syscall, call, request, buffers))

        try:
            if syscall.is_async:
                if self._tasks is None:
                    from realmap.user.service.tasks import Tasks  # asyncio takes a while to import

                    self._tasks = Tasks()
                self._tasks.submit(syscall, call, request, buffers, place, end)
            else:
                self._workers.submit(on_thread)
        except OSError as error:  # here and below posted, for `_end` begins the next one, which may fail as well
            self.loop.post(partial(self._end, call, failed(request.id, shortage(error, "no event loop for it"))))
        except RuntimeError as error:
            why = PhysicalMemoryExhaustion(why=f"no thread for it: {error}")
            self.loop.post(partial(self._end, call, failed(request.id, why)))

    def _end(self, call: Call, answer: bytes) -> None:
        """A handler beside the loop has returned."""
        work, since, _ = self._beside.pop(call)
        self._awaiting -= work.syscall.is_async
        self._busy -= not work.syscall.is_async
        answer = self._settled(work.request.id, answer, work.buffers)
        if self._seat.words[TRACED]:
            self._trace.note(work, int(since * 1e9), answer)
        self._answer(work, answer)
        self._next()

    def _settled(self, id: int, answer: bytes, buffers: Sequence[UserBuffer]) -> bytes:
        """The answer to a request, now that all which its handler changed is the caller's; or why it is not."""
        try:
            self._land.settle(buffers)
        except KernelError as error:
            if not has_failed(answer):
                return failed(id, error)
        return answer

    def _answer(self, work: Work, answer: bytes) -> None:
        if has_failed(answer):
            work.syscall.failed += 1
        for buffer in work.buffers:
            user_buffer.end(buffer, pinned=work.pinned)
        self._send(work.session, answer)

    def _send(self, session: Session, answer: bytes) -> None:
        if session.closed:
            return
        try:
            try:
                session.send(answer)
            except KernelError as error:  # longer than a message may be
                session.send(failed(msgspec.msgpack.decode(answer)[1], error))
        except OSError as error:  # it is gone, or reads nothing
            log.info("a session ends: %s", error, extra=session.caller.facts)
            self._callers.drop(session)
            return
        self._callers.rearm(session)

    def _lose(self, session: Session) -> None:
        """Nobody waits for its calls any more."""
        self._turns.drop(session)
        for work, _, _ in self._beside.values():
            if work.session is session and self._tasks is not None:
                self._tasks.cancel(work.call)

    # ---- what the kernel is told -------------------------------------------------------------

    def _say(self) -> None:
        words = self._seat.words
        words[BUSY], words[WAITING] = self._busy, len(self._turns)

    def _tell_soon(self) -> None:
        self._is_told = False
        self.loop.after(TELL, self._tell)

    def _tell(self) -> None:
        self._is_told = True
        most = MOST
        while (
            not self._seat.tell(served(self._handlers, self._beside.values(), self._turns, self._land, most)) and most
        ):
            most //= 2
        if self._beside or self._turns:
            self._tell_soon()
