"""`Kernel`: puts the parts together. One thread has its loop; everything that changes the books happens on it.

loop ─┬─ listener            a client connects
      ├─ a client's socket   one message per turn each: nobody is starved by a talker
      │  and its ring        the same, without a system call while both sides are awake
      ├─ a process's pidfd   it died: reap
      ├─ the booter's pidfd, where there is one: end
      └─ what was posted     a worker left word, or `stop` was called
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self, SupportsIndex

import msgspec

from realmap.errors import (
    AccessDenied,
    KernelDied,
    KernelError,
    PhysicalMemoryExhaustion,
)
from realmap.host import files, forks, runtime
from realmap.host.signals import Flag
from realmap.host.translate import shortage
from realmap.kernel import dump
from realmap.kernel.admission import Admission
from realmap.kernel.books import Books
from realmap.kernel.clients import Clients
from realmap.kernel.connection import Connection
from realmap.kernel.dispatch import Dispatch
from realmap.kernel.heirs import Heirs
from realmap.kernel.limits import Limits
from realmap.kernel.listener import Listener
from realmap.kernel.logs import log
from realmap.kernel.loop import Loop
from realmap.kernel.registry import registry
from realmap.kernel.syscalls import encode
from realmap.kernel.tracer import Tracer
from realmap.kernel.watchdog import Watchdog
from realmap.kernel.workers import Workers
from realmap.memory.kernel_memory import KernelMemory
from realmap.memory.lands import KERNEL_LAND
from realmap.wire import messages
from realmap.wire.ring import SPIN, checked_spin

#: How long a kernel that ends waits for who traces it to take the last that it was told, in seconds.
LAST = 2.0


class Kernel:
    """A kernel in this process: `serve()` on this thread, or `start()` and `stop()` on one of its own.

    `boot()` runs one in a process of its own; here, a user that connects from the same process is
    case 1 (`UserBuffer.access` reaches its buffers directly). A context manager: `start` and `stop`.
    """

    def __init__(
        self,
        *,
        syscalls: Iterable[Callable[..., Any]] = (),
        memory_limit: SupportsIndex | None = None,
        process_limit: SupportsIndex | None = None,
        kernel_land: SupportsIndex = KERNEL_LAND.length,
        lazy_unmap: SupportsIndex = 0,
        path: str | os.PathLike[str] | None = None,
        spin: float = SPIN,
        limits: Limits | None = None,
    ) -> None:
        """Checks the options; nothing is opened before `start` or `serve`.

        `syscalls`: the handlers. `memory_limit`, `process_limit`: bytes of frames in all, and for
        each process. `lazy_unmap`: bytes of dropped mirrors that are kept mapped for their next use.
        `kernel_land`: bytes of KernelLand, whole pages. `path`: of its socket, by
        default one in the private directory of `realmap.host.runtime`. `spin`: microseconds that both
        sides look for the next message before they sleep; 0 sends everything by the socket. `limits`: what
        each process may have at a time.

        InvalidSize: a limit is negative, or kernel_land is no whole pages. InvalidAddress: it is
        larger than KernelLand. TypeError, ValueError: as `syscall` and `registry`.
        """
        if limits is not None and not isinstance(limits, Limits):
            raise TypeError(f"limits is a Limits, not {limits!r}")
        memory = KernelMemory(length=kernel_land, lazy_unmap=lazy_unmap)
        self.books = Books(registry(syscalls), limits or Limits(), memory, memory_limit, process_limit)
        # What a handler sees: `RunningKernel`.
        self.memory = memory
        self.frames = self.books.frames
        self.processes = self.books.processes
        self.handles = self.books.handles
        self.path = os.fspath(path) if path is not None else runtime.new_socket_path()
        self._spin = checked_spin(spin)
        self.loop = Loop()
        self.workers = Workers()
        self.tracer = Tracer(self.books)
        self._heirs = Heirs(self.books, self.loop, self.workers)
        admission = Admission(self.books, self.workers)
        self.clients = Clients(self.books, self.loop, admission, self._heirs, spin=self._spin, gone=self.tracer.lose)
        self.dispatch = Dispatch(self.books, self.clients, self._asks(), self)
        self.clients.handle = self.dispatch.handle
        self.watchdog = Watchdog(self.books, self.loop, self.clients, self.dispatch)
        self._listener: Listener | None = None
        self._thread: threading.Thread | None = None
        self._ended = Flag()

    # ---- life -------------------------------------------------------------------------------

    def _open(self) -> None:
        """Takes the socket path and listens on it. Nothing is left behind where that fails.

        KernelError: as `serve`.
        """
        if self._listener is not None or self.loop.ending:
            state = "was stopped" if self.loop.ending else "runs already"
            raise KernelError(why=f"the kernel at {self.path!r} {state}")
        try:
            self.loop.open()
            try:
                self._listener = Listener(self.path, self.loop, self.clients.enter)
            except BaseException:
                self.loop.close()
                raise
        except OSError as error:
            raise shortage(error, f"cannot serve {self.path!r}") from None
        self._ended = Flag()
        log.info("the kernel serves at %r", self.path)
        try:
            self.watchdog.start()
        except RuntimeError as error:
            self._close()
            raise PhysicalMemoryExhaustion(why=f"no thread for the kernel at {self.path!r}: {error}") from None
        forks.lose_in_child(self)

    def serve(self, *, ready: Callable[[], None] | None = None, booter: int = -1) -> None:
        """Serves on this thread until `stop`; `ready` is called once clients can connect. On the main thread no signal
        is blocked meanwhile; a program that waits for them by sigwait wants `start`.

        `booter`: a pidfd; when its process ends, the kernel does. InvalidHandle: the path is taken,
        too long, not UTF-8, or no socket. AccessDenied: the path is not ours. PhysicalMemoryExhaustion: Linux has no
        descriptors or no memory for it. KernelError: Linux does not allow it, or fails a call without which no
        kernel goes on.
        """
        self._open()
        self.loop.thread = threading.get_ident()
        with contextlib.ExitStack() as undo:
            undo.callback(self._close)
            with self._in_our_words():
                if booter >= 0:
                    self.loop.watch(booter, lambda _: self.stop(wait=False))
                undo.enter_context(self.loop.open_to_signals())
            if ready is not None:
                ready()  # its errors are its caller's
            with self._in_our_words():
                self._turns()

    @contextlib.contextmanager
    def _in_our_words(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise shortage(error, f"the kernel at {self.path!r} cannot go on") from None

    def start(self) -> Self:
        """Serves on a thread of its own, and returns once clients can connect. Errors as `serve`."""
        self._open()
        self._thread = threading.Thread(target=self._serve_on_thread, name="realmap-kernel", daemon=True)
        try:
            self._thread.start()
        except BaseException as error:
            self._thread = None
            self._close()
            if isinstance(error, RuntimeError):
                raise PhysicalMemoryExhaustion(why=f"no thread for the kernel at {self.path!r}: {error}") from None
            raise
        return self

    def _serve_on_thread(self) -> None:
        self.loop.thread = threading.get_ident()
        try:
            with self.loop.open_to_signals():
                self._turns()
        finally:
            self._close()

    def _turns(self) -> None:
        self.loop.run(self.clients.rings, self.clients.take_from_ring, self._spin)

    def stop(self, *, wait: bool = True, timeout: float = 10.0) -> None:
        """Ends the loop: every client is told, every mapping given back, the path given free.

        From any thread; again: nothing.

        Waits at most `timeout` seconds for it, from another thread than its own. TimeoutError: a
        handler did not return in that time.
        """
        self.loop.end()
        if wait and self._listener is not None and self.loop.thread != threading.get_ident():
            if not self._ended.wait(timeout):
                raise TimeoutError(f"the kernel's thread did not end within {timeout} s: a handler is still at work")
            if self._thread is not None:
                self._thread.join(timeout)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def post(self, job: Callable[[], None]) -> None:
        """Has `job` run on the kernel's thread, soon; here and now where that has ended. From any thread."""
        self.loop.post(job)

    def _close(self) -> None:
        log.info("the kernel at %r ends", self.path)
        assert self._listener is not None
        self.watchdog.stop()
        bye = encode(messages.Bye(messages.error_of(KernelDied(self.path, why="the kernel was shut down"))))
        self._listener.close()
        # Who traces is told of all others' end, and may take that.
        for connection in sorted(self.clients.all(), key=lambda each: each is self.tracer.listener):
            if connection is self.tracer.listener:
                self._last_words(connection)
            with contextlib.suppress(Exception):
                connection.send(bye)
            self.clients.drop(connection)
        self.handles.clear()
        self._heirs.clear()
        self.workers.close()
        self.loop.close()
        self._listener.release()
        self._ended.set()

    def _last_words(self, listener: Connection) -> None:
        """Waits until who traces has taken what it was told, but not for ever."""
        end = time.monotonic() + LAST
        self.tracer.stop(listener)
        while self.tracer.listener is listener and (left := end - time.monotonic()) > 0:
            with contextlib.suppress(OSError):
                self.loop.attend(left)

    def lose(self) -> None:
        """A fork of the kernel's process is no kernel: it keeps nobody's memory, socket or connection alive."""
        if self._listener is None or not self.loop.is_open:
            return
        for process in self.processes:
            for mapping in process.memory:
                for segment in getattr(mapping.frames, "segments", ()):
                    files.close(segment.fd)
                    segment.fd = -1
        for connection in self.clients.all():
            connection.after_fork_in_child()
        self._listener.after_fork_in_child()
        self.loop.after_fork_in_child()

    # ---- what can be asked of it ------------------------------------------------------------

    def _asks(self) -> dict[str, Callable[[Connection, int], Any]]:
        def shutdown(connection: Connection, _: int) -> None:
            if not connection.control:
                raise AccessDenied(why="only a control connection may end the kernel")
            self.stop(wait=False)

        def trace(connection: Connection, capacity: int) -> dict[str, Any]:
            told = self.tracer.start(connection, capacity, self.dispatch.running)
            return told | {"path": self.path, "thread": self.loop.thread}

        def revoke(connection: Connection, start: int) -> int:
            if not connection.control:
                raise AccessDenied(why="only a control connection may revoke what is nobody's")
            return self.handles.revoke_orphans(f"{start:08x}")

        return {
            "stats": lambda *_: dump.stats(self.books, self._around()),
            "books": lambda *_: self.dump_books(),
            "shutdown": shutdown,
            "revoke-orphans": revoke,
            "trace-start": trace,
            "trace-read": lambda connection, _: self.tracer.read(connection),
            "trace-stop": lambda connection, _: self.tracer.stop(connection),
        }

    def dump_books(self) -> msgspec.Raw:
        """The books as they are sent. Only on the kernel's thread."""
        return dump.dump(self.books, self._around())

    def _around(self) -> dump.Around:
        connections = self.clients.all()
        return dump.Around(
            path=self.path,
            alone=self._thread is None,  # it serves on the main thread
            controls=sum(connection.control for connection in connections),
            threads=self.workers.threads,
            running=self.dispatch.running,
            outbox=[inode for connection in connections for inode in connection.waiting_inodes()],
        )
