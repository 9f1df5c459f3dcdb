"""What is done with a request: which service or handler answers it, and how the answer goes back."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

from realmap.errors import AccessDenied, KernelError, LimitReached, UnknownSyscall
from realmap.kernel import syscalls
from realmap.kernel.books import Books
from realmap.kernel.clients import Clients
from realmap.kernel.connection import Connection
from realmap.kernel.processes import UserProcess
from realmap.kernel.registry import Syscall
from realmap.kernel.services import SERVICES, Answer, Later
from realmap.kernel.syscalls import Call, Running, RunningKernel
from realmap.kernel.user_buffer import UserBuffer
from realmap.memory.frames import SharedFrames
from realmap.wire import channel, messages
from realmap.wire.messages import MAX_ANSWER, MAX_MESSAGE

#: Characters of an unknown name that its error says.
LONGEST = 200
#: A service about the kernel itself, for whoever asks, with a number: what it answers.
Ask: TypeAlias = Callable[[Connection, int], Any]


class Dispatch:
    """Answers requests. Only on the loop; `current` is read from beside."""

    def __init__(self, books: Books, clients: Clients, asks: Mapping[str, Ask], kernel: RunningKernel) -> None:
        """`asks`: the services about the kernel itself, by name. `kernel`: handed to handlers."""
        self._books = books
        self._clients = clients
        self._asks = asks
        self._kernel = kernel
        #: The call whose handler is at work on the kernel's thread.
        self.current: Call | None = None
        #: Those at work on worker threads, or waiting for one.
        self.running: set[Running] = set()

    def handle(self, connection: Connection, request: messages.Request, places: Sequence[messages.Place]) -> None:
        """One request of one client, and where its buffers are. Whatever happens to it is its answer."""
        process, observer = connection.process, self._books.observer
        if observer is not None:
            observer.called(connection, process, request, places)
        try:
            if process is not None and isinstance(request, messages.Call):  # first: it is the common one
                self._call(connection, process, request, places)
            elif isinstance(request, messages.Ask):
                self._reply(connection, request.id, (self._ask(connection, request), []))
            elif process is None:
                raise AccessDenied(why="a control connection is no process: it has no memory and makes no calls")
            else:
                got = SERVICES[type(request)](self._books, process, request)
                if isinstance(got, Later):
                    self._answer_later(connection, process, request.id, got)
                elif got is not None:
                    self._reply(connection, request.id, got)
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
            self.send(connection, id, syscalls.done(id, value, len(descriptors)), descriptors, MAX_ANSWER)
        finally:
            channel.close_all(descriptors)

    def send(
        self,
        connection: Connection,
        id: int,
        message: bytes,
        descriptors: Sequence[int] = (),
        most: int = MAX_MESSAGE,
    ) -> None:
        """Sends the answer to request `id`, of at most so many bytes, whatever becomes of its client."""
        if not connection.closed and id and (descriptors or not connection.send_short(message)):  # 0 wants no answer
            self._send(connection, id, message, descriptors, most)
        observer = self._books.observer
        if observer is not None:
            observer.answered(connection, connection.process, id, message)

    def _send(self, connection: Connection, id: int, message: bytes, descriptors: Sequence[int], most: int) -> None:
        try:
            try:
                connection.send(message, descriptors, id, most)
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
        return ask(connection, request.number)

    def _answer_later(self, connection: Connection, process: UserProcess, id: int, later: Later) -> None:
        def work() -> None:
            try:
                finish(later.work())
            except BaseException as error:
                traceback.clear_frames(error.__traceback__)  # what was taken is given back before anybody hears of it
                self._kernel.post(partial(end, error))

        def finish(frames: SharedFrames) -> None:
            self._kernel.post(lambda: end(frames))

        def end(got: SharedFrames | BaseException) -> None:
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
            raise UnknownSyscall(
                name, why=f"the kernel at {self._kernel.path} has no syscall {name!r} (it has: {known})"
            )
        syscall.calls += 1
        buffers = self._buffers(process, places) if places else ()
        call = Call(process, syscall.name, self._kernel)
        if syscall.blocking:
            self._call_on_worker(connection, process, syscall, call, request, buffers)
            return
        process.calls += 1
        self.current = call
        answer = syscalls.run(syscall, call, request.id, request.args, buffers)
        self.current = None
        process.calls -= 1
        for buffer in buffers:
            buffer.end(pinned=False)
        self.send(connection, request.id, answer)

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
        size = len(memoryview(request.args))
        process.begin_call(size)
        for buffer in buffers:
            buffer.pin()
        running = Running(process, syscall.name, request.id, buffers, partial(self.send, connection, request.id))
        self.running.add(running)

        def ended(answer: bytes | BaseException) -> None:
            process.end_call(size)
            self.running.discard(running)
            for buffer in buffers:
                buffer.end(pinned=True)
            running.answer(answer)

        def end(answer: bytes) -> None:
            ended(answer)
            connection.calls.ended()

        def work() -> None:
            running.began = time.monotonic()
            observer = self._books.observer
            if observer is not None:
                observer.began(process, syscall.name, request.id)
            answer = syscalls.run(syscall, call, request.id, request.args, buffers)
            if observer is not None:
                observer.ended(process, syscall.name, request.id, answer)
            self._kernel.post(lambda: end(answer))

        connection.calls.submit(work, ended)
