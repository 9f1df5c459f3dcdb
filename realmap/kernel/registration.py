"""`Registration`: handlers that come and go while the kernel runs, from its own program and from its booter."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from typing import Any

from realmap.errors import AccessDenied, KernelError, PhysicalMemoryExhaustion, UnknownSyscall
from realmap.host import liveness
from realmap.kernel.books import Books
from realmap.kernel.connection import Connection
from realmap.kernel.services import Answer, Begun, Reply
from realmap.kernel.view import AskBooks
from realmap.serving.loop import Loop
from realmap.serving.registry import Syscall, registry
from realmap.serving.user_buffer import UserBuffer
from realmap.serving.workers import Workers


class Registration:
    """Changes which handlers there are. From any thread: the change itself is made where the books are."""

    def __init__(self, books: Books, ask: AskBooks, loop: Loop, workers: Workers) -> None:
        self._books = books
        self._ask = ask
        self._loop = loop
        self._workers = workers
        #: The pid of who may register handlers from elsewhere: the kernel's booter. 0: nobody.
        self.owner = 0

    def add(self, handlers: Iterable[Callable[..., Any]], replace: bool) -> None:
        """As `Kernel.register`."""
        found = registry(handlers, UserBuffer)
        self._ask(lambda: self._add(found, replace))

    def remove(self, name: str) -> None:
        """As `Kernel.unregister`."""
        self._ask(lambda: self._remove(name))

    def _add(self, found: dict[str, Syscall], replace: bool) -> None:
        known = self._books.syscalls
        for name, syscall in found.items():
            before = known.get(name)
            if before is not None:
                if not replace:
                    raise KernelError(why=f"the kernel has a syscall {name!r} already: unregister it, or replace=True")
                syscall.calls, syscall.failed, syscall.late = before.calls, before.failed, before.late
            elif self._books.ports.is_served(name):
                raise KernelError(why=f"a process serves {name!r} already: register it by another name")
        self._books.syscalls = known | found  # who is at it, a snapshot say, goes on with what there was

    def _remove(self, name: str) -> None:
        if name not in self._books.syscalls:
            raise UnknownSyscall(name, why=f"the kernel has no syscall {name!r}")
        self._books.syscalls = {key: value for key, value in self._books.syscalls.items() if key != name}

    # ---- for the booter ---------------------------------------------------------------------

    def register(self, connection: Connection, data: bytes) -> Begun:
        """What it sent, pickled, may import for long: on a worker. AccessDenied: somebody else asks."""
        self._require_owner(connection)

        def begin(reply: Reply) -> None:
            def work() -> None:
                got: Answer | KernelError = (None, [])
                try:
                    handlers, replace = pickle.loads(data)
                    self.add(handlers, replace)
                except KernelError as error:
                    got = error
                except BaseException as error:  # SystemExit of an import, too: it would be the worker's end
                    got = KernelError(why=f"what was sent cannot be read there: {type(error).__name__}: {error}")
                self._loop.post(lambda: reply(got))

            try:
                self._workers.submit(work)
            except RuntimeError as error:
                reply(PhysicalMemoryExhaustion(why=f"no thread to read the handlers on: {error}"))

        return Begun(begin)

    def unregister(self, connection: Connection, name: bytes) -> None:
        """AccessDenied: somebody else asks. UnknownSyscall: there is none."""
        self._require_owner(connection)
        self._remove(name.decode())

    def _require_owner(self, connection: Connection) -> None:
        if not connection.control or not self.owner or liveness.credentials(connection.sock)[0] != self.owner:
            raise AccessDenied(why="only who booted the kernel changes its handlers")
