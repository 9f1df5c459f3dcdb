"""What is done with a request: which service or handler answers it, and how the answer goes back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from realmap.errors import AccessDenied, KernelError, UnknownSyscall
from realmap.kernel import books, services, syscalls
from realmap.kernel.connection import Connection
from realmap.kernel.process_table import UserProcess
from realmap.kernel.syscalls import Call, Syscall
from realmap.kernel.user_buffer import UserBuffer
from realmap.wire import channel, messages

if TYPE_CHECKING:
    from realmap.kernel.server import Kernel


class Dispatch:
    """Answers requests for a kernel. Only on the kernel's thread."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def handle(self, connection: Connection, request: messages.Request, buffers: Sequence[UserBuffer]) -> None:
        """One request of one client, and the buffers among its arguments. Whatever happens to it is its answer."""
        process = connection.process
        try:
            if process is not None and isinstance(request, messages.Call):  # first: it is the common one
                self._call(connection, process, request, buffers)
            elif isinstance(request, messages.Ask):
                self._reply(connection, request.id, (self._ask(request.what), [], []))
            elif process is None:
                raise AccessDenied(why="a control connection is no process: it has no memory and makes no calls")
            elif isinstance(request, messages.Map):
                number = request.id
                services.map_memory(self._kernel, process, request, lambda got: self._reply(connection, number, got))
            elif isinstance(request, messages.Unmap):
                self._reply(connection, request.id, services.unmap(process, request))
            elif isinstance(request, messages.More):
                self._reply(connection, request.id, services.more(process, request))
            elif isinstance(request, messages.Move):
                self._reply(connection, request.id, services.move(process, request))
            elif isinstance(request, messages.Query):
                self._reply(connection, request.id, services.query(process, request))
        except Exception as error:  # one of ours, or a bug of ours: the caller is told either way
            self._reply(connection, request.id, error)

    def _reply(self, connection: Connection, id: int, got: services.Answer | BaseException) -> None:
        if isinstance(got, BaseException):
            self._send(connection, id, syscalls.failed(id, got, "kernel"))
            return
        value, descriptors, closing = got
        try:
            self._send(connection, id, syscalls.done(id, value, len(descriptors)), descriptors)
        finally:
            channel.close_all(closing)

    def _send(self, connection: Connection, id: int, message: bytes, descriptors: Sequence[int] = ()) -> None:
        if connection.closed or not id:  # request 0 wants no answer
            return
        if not descriptors and connection.send_short(message):
            return
        try:
            connection.send(message, descriptors, id)
        except KernelError as error:  # longer than a message may be
            connection.send(syscalls.failed(id, error))
        except OSError as error:
            self._kernel.expel(connection, f"no descriptors are left for its answers: {error.strerror}")
            return
        self._kernel.rearm(connection)

    def _ask(self, what: str) -> Any:
        if what == "stats":
            return books.stats(self._kernel)
        if what == "books":
            return books.books(self._kernel)
        if what == "shutdown":
            self._kernel.stop(wait=False)
            return None
        raise UnknownSyscall(what, why="the kernel has no such service")

    def _call(
        self, connection: Connection, process: UserProcess, request: messages.Call, buffers: Sequence[UserBuffer]
    ) -> None:
        kernel = self._kernel
        syscall = kernel.syscalls.get(request.name)
        if syscall is None:
            known = ", ".join(sorted(kernel.syscalls)) or "none"
            raise UnknownSyscall(request.name, why=f"the kernel has no syscall {request.name!r} (it has: {known})")
        kernel.calls += 1
        for buffer in buffers:
            buffer.resolve(process, kernel.memory)
        call = Call(process, syscall.name, kernel)
        if syscall.blocking:
            self._call_on_worker(connection, process, syscall, call, request, buffers)
            return
        process.calls += 1
        answer = syscalls.run(syscall, call, request.id, request.args, buffers)
        process.calls -= 1
        for buffer in buffers:
            buffer.end(pinned=False)
        self._send(connection, request.id, answer)

    def _call_on_worker(
        self,
        connection: Connection,
        process: UserProcess,
        syscall: Syscall,
        call: Call,
        request: messages.Call,
        buffers: Sequence[UserBuffer],
    ) -> None:
        for buffer in buffers:
            buffer.pin()
        process.calls += 1

        def ended(answer: bytes) -> None:
            process.calls -= 1
            for buffer in buffers:
                buffer.end(pinned=True)
            self._send(connection, request.id, answer)

        def work() -> None:
            answer = syscalls.run(syscall, call, request.id, request.args, buffers)
            self._kernel.post(lambda: ended(answer))

        try:
            self._kernel.workers.submit(work)
        except RuntimeError as error:
            ended(syscalls.failed(request.id, error, syscall.name))
