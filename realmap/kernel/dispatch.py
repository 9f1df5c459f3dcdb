"""What is done with a request: which service or handler answers it, and how the answer goes back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from realmap.errors import AccessDenied, KernelError, LimitReached, UnknownSyscall
from realmap.kernel import dump, services, syscalls
from realmap.kernel.connection import Connection
from realmap.kernel.processes import UserProcess
from realmap.kernel.syscalls import Call, Syscall
from realmap.kernel.user_buffer import UserBuffer
from realmap.wire import channel, messages

if TYPE_CHECKING:
    from realmap.kernel.kernel import Kernel


class Dispatch:
    """Answers requests for a kernel. Only on the kernel's thread."""

    def __init__(self, kernel: Kernel, running: set[Running] | None = None) -> None:
        """`running`: those of whom it takes the place of."""
        self._kernel = kernel
        #: The call whose handler is at work on the kernel's thread.
        self.current: Call | None = None
        #: Those at work on worker threads, or waiting for one.
        self.running: set[Running] = set() if running is None else running

    #: How a handler is run; `tracing` has another.
    _run = staticmethod(syscalls.run)

    def handle(self, connection: Connection, request: messages.Request, buffers: Sequence[UserBuffer]) -> None:
        """One request of one client, and the buffers among its arguments. Whatever happens to it is its answer."""
        process = connection.process
        try:
            if process is not None and isinstance(request, messages.Call):  # first: it is the common one
                self._call(connection, process, request, buffers)
            elif isinstance(request, messages.Ask):
                if request.what == "shutdown" and not connection.control:
                    raise AccessDenied(why="only a control connection may end the kernel")
                self._reply(connection, request.id, (self._ask(connection, request), [], []))
            elif process is None:
                raise AccessDenied(why="a control connection is no process: it has no memory and makes no calls")
            elif isinstance(request, messages.Map):
                number = request.id
                services.map_memory(self._kernel, process, request, lambda got: self._reply(connection, number, got))
            elif isinstance(request, messages.Unmap):
                self._reply(connection, request.id, services.unmap(self._kernel, process, request))
            elif isinstance(request, messages.More):
                self._reply(connection, request.id, services.more(process, request))
            elif isinstance(request, messages.Move):
                self._reply(connection, request.id, services.move(process, request))
            elif isinstance(request, messages.Share):
                token = self._kernel.handles.share(process, request, self._kernel.limits.handles)
                self._reply(connection, request.id, (token, [], []))
            elif isinstance(request, messages.Attach):
                self._reply(connection, request.id, services.attach(self._kernel, process, request))
            elif isinstance(request, messages.Revoke):
                self._kernel.handles.revoke(process, request.token)
                self._reply(connection, request.id, (None, [], []))
            elif isinstance(request, messages.Adopt):
                self._reply(connection, request.id, (self._kernel.estates.adopt(process, request), [], []))
            elif isinstance(request, messages.Forked):
                process.forked = True
            elif isinstance(request, messages.Leave):
                self._kernel.handles.leave(process)
                self._reply(connection, request.id, (None, [], []))
            elif isinstance(request, messages.Query):
                self._reply(connection, request.id, services.query(process, request))
        except Exception as error:  # one of ours, or a bug of ours: the caller is told either way
            if isinstance(request, messages.Call) and request.name in self._kernel.syscalls:
                self._kernel.syscalls[request.name].failed += 1  # before its handler began
            self._reply(connection, request.id, error)

    def _reply(self, connection: Connection, id: int, got: services.Answer | BaseException) -> None:
        if isinstance(got, BaseException):
            self.send(connection, id, syscalls.failed(id, got, "kernel"))
            return
        value, descriptors, closing = got
        try:
            self.send(connection, id, syscalls.done(id, value, len(descriptors)), descriptors)
        finally:
            channel.close_all(closing)

    def send(self, connection: Connection, id: int, message: bytes, descriptors: Sequence[int] = ()) -> None:
        """Sends the answer to request `id`, whatever becomes of its client."""
        if connection.closed or not id:  # request 0 wants no answer
            return
        if not descriptors and connection.send_short(message):
            return
        try:
            try:
                connection.send(message, descriptors, id)
            except KernelError as error:  # longer than a message may be
                connection.send(syscalls.failed(id, error))
        except OSError as error:  # it is gone, or there are no descriptors for copies
            self._kernel.clients.expel(connection, f"its answers cannot be sent: {error.strerror}")
            return
        self._kernel.clients.rearm(connection)

    def _ask(self, connection: Connection, request: messages.Ask) -> Any:
        what, tracing = request.what, self._kernel.tracing
        if what == "stats":
            return dump.stats(self._kernel)
        if what == "books":
            return dump.books(self._kernel)
        if what == "shutdown":
            self._kernel.stop(wait=False)
            return None
        if what == "trace-read":
            return tracing.read(connection)
        if what == "trace-start":
            return tracing.start(connection, request.number)
        if what == "trace-stop":
            return tracing.stop(connection)
        raise UnknownSyscall(what, why="the kernel has no such service")

    def _call(
        self, connection: Connection, process: UserProcess, request: messages.Call, buffers: Sequence[UserBuffer]
    ) -> None:
        kernel = self._kernel
        syscall = kernel.syscalls.get(request.name)
        if syscall is None:
            known = ", ".join(sorted(kernel.syscalls)) or "none"
            raise UnknownSyscall(
                request.name, why=f"the kernel at {self._kernel.path} has no syscall {request.name!r} (it has: {known})"
            )
        syscall.calls += 1
        for buffer in buffers:
            buffer.resolve(process, kernel.memory)
        call = Call(process, syscall.name, kernel)
        if syscall.blocking:
            self._call_on_worker(connection, process, syscall, call, request, buffers)
            return
        process.calls += 1
        self.current = call
        answer = self._run(syscall, call, request.id, request.args, buffers)
        self.current = None
        process.calls -= 1
        for buffer in buffers:
            buffer.end(pinned=False)
        self.send(connection, request.id, answer)

    def _call_on_worker(
        self,
        connection: Connection,
        process: UserProcess,
        syscall: Syscall,
        call: Call,
        request: messages.Call,
        buffers: Sequence[UserBuffer],
    ) -> None:
        limit = self._kernel.limits.calls
        if process.calls >= limit:
            why = f"process {process.pid} has {limit} calls that have not ended, the kernel's limit; wait for some"
            raise LimitReached("calls", limit, why=why)
        for buffer in buffers:
            buffer.pin()
        process.calls += 1
        running = Running(self._kernel, connection, process, request.id, syscall.name, buffers)
        self.running.add(running)

        def ended(answer: bytes | BaseException) -> None:
            process.calls -= 1
            self.running.discard(running)
            for buffer in buffers:
                buffer.end(pinned=True)
            running.answer(answer)

        def end(answer: bytes) -> None:
            ended(answer)
            process.share.ended()

        def work() -> None:
            running.began = time.monotonic()
            answer = self._kernel.dispatch._run(syscall, call, request.id, request.args, buffers)
            self._kernel.post(lambda: end(answer))

        process.share.submit(work, ended)


class Running:
    """A call at work on a worker thread, or waiting for one. It is answered once."""

    def __init__(
        self,
        kernel: Kernel,
        connection: Connection,
        process: UserProcess,
        id: int,
        name: str,
        buffers: Sequence[UserBuffer],
    ) -> None:
        #: What it works on, pinned.
        self.buffers = buffers
        self._kernel = kernel
        self._connection = connection
        #: Of the request.
        self.id = id
        self.process = process
        self.name = name
        #: When its handler began, in seconds of the monotonic clock; None while it waits for its turn.
        self.began: float | None = None
        #: Whether it was told of in the log.
        self.told = False
        self.answered = False

    def answer(self, answer: bytes | BaseException) -> None:
        """Sends its answer, or the error that takes its place. Again: nothing."""
        if not self.answered:
            self.answered = True
            if isinstance(answer, BaseException):
                answer = syscalls.failed(self.id, answer, self.name)
            self._kernel.dispatch.send(self._connection, self.id, answer)
