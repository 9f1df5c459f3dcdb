"""What is done with a request: which service or handler answers it, and how the answer goes back."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn, TypeAlias

from realmap.errors import (
    AccessDenied,
    KernelError,
    LimitReached,
    PhysicalMemoryExhaustion,
    SyscallTimeout,
    UnknownSyscall,
)
from realmap.kernel.books import Books
from realmap.kernel.clients import Clients
from realmap.kernel.connection import Connection
from realmap.kernel.given_up import GivenUp
from realmap.kernel.processes import UserProcess
from realmap.kernel.running import Running
from realmap.kernel.seats import Seats
from realmap.kernel.services import SERVICES, Answer, Begun, Later
from realmap.memory.frames import SharedFrames
from realmap.serving import syscalls, user_buffer
from realmap.serving.caller import RunningKernel
from realmap.serving.logs import log
from realmap.serving.loop import Loop, Lost
from realmap.serving.registry import Syscall
from realmap.serving.standby import Relay, Taken
from realmap.serving.syscalls import Call
from realmap.serving.user_buffer import UserBuffer
from realmap.wire import channel, messages
from realmap.wire.messages import DONE
from realmap.wire.status import CALLER, Page

#: Characters of an unknown name that its error says.
LONGEST = 200
#: A service about the kernel itself, for whoever asks, about what: what it answers.
Ask: TypeAlias = Callable[[Connection, Any], Any]


#: A call whose handler is at work on the thread that has the loop: a plain tuple, for every call makes one.
Away: TypeAlias = tuple[Connection, Call, Syscall, messages.Call, Sequence[UserBuffer]]


class Dispatch:
    """Answers requests. Only on the loop."""

    def __init__(
        self,
        books: Books,
        clients: Clients,
        loop: Loop,
        asks: Mapping[str, Ask],
        kernel: RunningKernel,
        relay: Relay[Away],
        page: Page,
        seats: Seats,
    ) -> None:
        """`asks`: the services about the kernel itself, by name. `kernel`: handed to handlers. `relay`: it may take the
        loop from a handler. `page`: is told whose handler has the loop.
        """
        self._books = books
        self._clients = clients
        self._loop = loop
        self._asks = asks
        self._kernel = kernel
        self._relay = relay
        self._page = page
        self._services = SERVICES | seats.services
        #: Called where there may be something to watch from now on.
        self.busy: Callable[[], None]
        #: Those at work on worker threads, or waiting for one, and those that lost the loop.
        self.running: set[Running] = set()
        #: The latter, by their calls.
        self._late: dict[Call, Running] = {}
        self.given_up = GivenUp(books.limits.given_up)

    def handle(self, connection: Connection, request: messages.Request, places: Sequence[messages.Place]) -> None:
        """One request of one client, and where its buffers are. Whatever happens to it is its answer."""
        process, observer = connection.process, self._books.observer
        if observer is not None:
            observer.called(connection, process, request, places)
        try:
            if process is not None and isinstance(request, messages.Call):  # first: it is the common one
                self._call(connection, process, request, places)
            elif isinstance(request, messages.Ask):
                value = self._ask(connection, request)
                if isinstance(value, Begun):
                    value.begin(partial(self._reply, connection, request.id))
                else:
                    self._reply(connection, request.id, (value, []))
            elif process is None:
                raise AccessDenied(why="a control connection is no process: it has no memory and makes no calls")
            else:
                service = self._services[type(request)]
                got = self._books.patiently(process, lambda: service(self._books, process, request))
                if isinstance(got, Later):
                    self._answer_later(connection, process, request.id, got)
                elif isinstance(got, Begun):
                    got.begin(partial(self._reply, connection, request.id))
                elif got is not None:
                    self._reply(connection, request.id, got)
                self.busy()
        except Exception as error:  # one of ours, or a bug of ours: the caller is told either way
            if isinstance(request, messages.Call) and request.name in self._books.syscalls:
                self._books.syscalls[request.name].failed += 1  # before its handler began
            self._reply(connection, request.id, error)
        if observer is not None:
            observer.done(connection, process, request)

    def _reply(self, connection: Connection, id: int, got: Answer | BaseException) -> None:
        if isinstance(got, BaseException):
            self.send(connection, id, syscalls.failed(id, got, "kernel"))
            return
        value, descriptors = got
        try:
            self.send(connection, id, syscalls.done(id, value, len(descriptors)), descriptors)
        finally:
            channel.close_all(descriptors)

    def send(self, connection: Connection, id: int, message: bytes, descriptors: Sequence[int] = ()) -> None:
        """Sends the answer to request `id`, whatever becomes of its client."""
        if not connection.closed and id and (descriptors or not connection.send_short(message)):  # 0 wants no answer
            self._send(connection, id, message, descriptors)
        observer = self._books.observer
        if observer is not None:
            observer.answered(connection, connection.process, id, message)

    def _send(self, connection: Connection, id: int, message: bytes, descriptors: Sequence[int]) -> None:
        try:
            try:
                connection.send(message, descriptors, id)
            except KernelError as error:  # longer than a message may be
                connection.send(syscalls.failed(id, error))
        except OSError as error:  # it is gone, or there are no descriptors for copies
            self._clients.expel(connection, f"its answers cannot be sent: {error.strerror}")
            return
        self._clients.rearm(connection)

    def _ask(self, connection: Connection, request: messages.Ask) -> Any:
        ask = self._asks.get(request.what)
        if ask is None:
            raise UnknownSyscall(request.what, why="the kernel has no such service")
        return ask(connection, request.about)

    def _answer_later(self, connection: Connection, process: UserProcess, id: int, later: Later) -> None:
        tries = 2

        def work() -> None:
            try:
                finish(later.work())
            except BaseException as error:
                traceback.clear_frames(error.__traceback__)  # what was taken is given back before anybody hears of it
                self._loop.post(partial(end, error))

        def finish(frames: SharedFrames) -> None:
            self._loop.post(lambda: end(frames))

        def end(got: SharedFrames | BaseException) -> None:
            nonlocal tries
            if isinstance(got, PhysicalMemoryExhaustion) and process.alive and tries and self._books.give_way(process):
                tries -= 1
                connection.maps.submit(work, failed)  # once more
                connection.maps.ended()
                return
            process.coming -= 1
            connection.maps.ended()
            try:
                answer = later.end(got) if isinstance(got, SharedFrames) else got
            except Exception as error:
                self._reply(connection, id, error)
            else:
                self._reply(connection, id, answer)

        def failed(error: BaseException) -> None:
            process.coming -= 1
            self._reply(connection, id, later.failed(error))

        process.coming += 1
        connection.maps.submit(work, failed)

    def _call(
        self, connection: Connection, process: UserProcess, request: messages.Call, places: Sequence[messages.Place]
    ) -> None:
        books = self._books
        syscall = books.syscalls.get(request.name)
        if syscall is None:
            known = ", ".join(sorted(books.syscalls)) or "none"
            name = request.name[:LONGEST]
            why = f"the kernel at {self._kernel.path} has no syscall {name!r} (it has: {known})"
            raise UnknownSyscall(name, why=f"{why}, and no process serves it")
        syscall.calls += 1
        if self.given_up.of_pid:
            self.given_up.check(process, syscall)
        buffers = self._buffers(process, places) if places else ()
        call = Call(process, syscall.name, self._kernel)
        page, relay = self._page, self._relay
        away = relay.away
        began = page.now  # when the loop took it up: the clock is dear to read
        if request.timeout is not None:
            call.deadline = began / 1e9 + request.timeout
        if syscall.blocking:
            self._call_on_worker(connection, process, syscall, call, request, buffers)
            return
        if books.limits.seconds is not None:
            _bound(call, began / 1e9 + books.limits.seconds)
        if page.named is not syscall.label:
            page.name(syscall.label)
        page.words[CALLER] = process.pid
        away[call] = (connection, call, syscall, request, buffers)
        if relay.parked:
            relay.wake()
        answer = syscalls.run(syscall, call, request, buffers)
        syscall.durations.since(began)
        try:
            del away[call]
        except KeyError:
            self._come_late(process, call, request, answer)
        page.words[CALLER] = 0
        if answer[1] != DONE:
            syscall.failed += 1
        for buffer in buffers:
            user_buffer.end(buffer, pinned=False)
        self.send(connection, request.id, answer)

    def _come_late(self, process: UserProcess, call: Call, request: messages.Call, answer: bytes) -> NoReturn:
        """On a thread that has lost the loop."""
        observer = self._books.observer
        if observer is not None:
            observer.ended(process, call.name, request.id, answer)
        self._loop.post(lambda: self._end(self._late.pop(call), answer))
        raise Lost

    def take_over(self, taken: Taken[Away], thread: int) -> None:
        """The handler of a call has lost the loop: it goes on, on that thread, as those of workers do. On the new
        thread, before anything else.
        """
        connection, call, syscall, request, buffers = taken.work
        process = connection.process
        assert process is not None
        process.calls += 1  # nobody could see that it was at work before
        # What the handler itself has unmapped cannot be kept.
        buffers = [
            buffer for buffer in buffers if not any(mapping.released for mapping, _, _ in user_buffer.parts_of(buffer))
        ]
        self._page.words[CALLER] = 0
        running = self._run_beside(connection, process, call, syscall, request, buffers)
        running.began, running.thread = taken.since, thread
        running.place = self._page.begin(process.pid, syscall.label, taken.since)
        self._late[call] = running
        syscall.late += 1
        self.given_up.add(running)
        log.info("the syscall %r of %r has lost the loop", syscall.name, process, extra=running.facts)
        if self._books.observer is not None:
            self._books.observer.began(process, syscall.name, request.id, thread)

    def lose(self, connection: Connection) -> None:
        """A client is gone: nobody waits for its handlers that are at work."""
        for running in self.running:
            if running.client is connection and running.began is not None:
                self.given_up.add_orphan(running)

    def _run_beside(
        self,
        connection: Connection,
        process: UserProcess,
        call: Call,
        syscall: Syscall,
        request: messages.Call,
        buffers: Sequence[UserBuffer],
    ) -> Running:
        for buffer in buffers:
            user_buffer.pin(buffer)
        send = partial(self.send, connection, request.id)
        running = Running(connection, process, call, syscall, request.id, buffers, send)
        self.running.add(running)
        self.busy()
        return running

    def _end(self, running: Running, answer: bytes | BaseException) -> None:
        """Its handler has returned, or never will begin."""
        if running.size is None:
            running.process.calls -= 1
        else:
            running.process.end_call(running.size)
        self.running.discard(running)
        self.given_up.discard(running)
        self._page.end(running.place)
        if syscalls.has_failed(answer):
            running.syscall.failed += 1
        for buffer in running.buffers:
            user_buffer.end(buffer, pinned=True)
        running.answer(answer)

    def _buffers(self, process: UserProcess, places: Sequence[messages.Place]) -> list[UserBuffer]:
        """What the buffers of a call are. LimitReached: they, or the mappings that they lie in, are too many."""
        books, found = self._books, []
        limit = books.limits.buffers
        if len(places) > limit:
            why = f"a call of {len(places)} buffers; the kernel's limit (buffers) is {limit}: make several calls"
            raise LimitReached("buffers", limit, why=why)
        most = limit // len(places)
        for address, length in places:
            found.append(UserBuffer(process, books.memory, books.observer, address, length, most))
        return found

    def _call_on_worker(
        self,
        connection: Connection,
        process: UserProcess,
        syscall: Syscall,
        call: Call,
        request: messages.Call,
        buffers: Sequence[UserBuffer],
    ) -> None:
        packed: Any = request.args
        size = len(syscalls.encode(packed) if type(packed) is list else memoryview(packed))
        process.begin_call(size)
        running = self._run_beside(connection, process, call, syscall, request, buffers)
        running.size = size

        def end(answer: bytes) -> None:
            self._end(running, answer)
            connection.calls.ended()

        def work() -> None:
            if call.cancelled:  # while it waited for its turn
                self._loop.post(
                    lambda: end(syscalls.failed(request.id, SyscallTimeout(syscall.name, request.timeout or 0.0)))
                )
                return
            running.thread = threading.get_ident()
            running.began = time.monotonic()
            if self._books.limits.seconds is not None:
                _bound(call, running.began + self._books.limits.seconds)
            observer = self._books.observer
            if observer is not None:
                observer.began(process, syscall.name, request.id, running.thread)
            running.place = self._page.begin(process.pid, syscall.label, running.began)
            began = time.monotonic_ns()
            answer = syscalls.run(syscall, call, request, buffers)
            syscall.durations.since(began)
            if observer is not None:
                observer.ended(process, syscall.name, request.id, answer)
            self._loop.post(lambda: end(answer))

        connection.calls.submit(work, partial(self._end, running))


def _bound(call: Call, until: float) -> None:
    """The kernel lets its handler take until then; its caller may wait less long."""
    if call.deadline is None or until < call.deadline:
        call.deadline = until
