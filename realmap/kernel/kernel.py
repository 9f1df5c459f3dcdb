"""`Kernel`: puts the parts together. One thread has its loop; everything that changes the books happens on it.

That is never the program's own thread: it waits in `serve`, where it is free for signals.

loop ─┬─ listener            a client connects
      ├─ a client's socket   one message per turn each: nobody is starved by a talker
      │  and its ring        the same, without a system call while both sides are awake
      ├─ a process's pidfd   it died: reap
      ├─ the booter's pidfd, where there is one: end
      └─ what was posted     a worker's answer, or `stop` was called
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Self, SupportsIndex, TypeVar

from realmap.errors import AccessDenied, InvalidHandle, KernelDied, KernelError, PhysicalMemoryExhaustion
from realmap.host import forks, runtime
from realmap.host.signals import Attention, Flag
from realmap.host.translate import shortage
from realmap.kernel import dump
from realmap.kernel.admission import Admission
from realmap.kernel.books import Books
from realmap.kernel.clients import Clients
from realmap.kernel.connection import Connection
from realmap.kernel.dispatch import Away, Dispatch
from realmap.kernel.heirs import Heirs
from realmap.kernel.limits import Limits
from realmap.kernel.listener import Listener
from realmap.kernel.registration import Registration
from realmap.kernel.seats import Seats
from realmap.kernel.snapshots import Snapshots
from realmap.kernel.tracer import Tracer
from realmap.kernel.view import ProcessView
from realmap.kernel.watchdog import Watchdog
from realmap.memory.kernel_memory import KernelMemory
from realmap.memory.lands import KERNEL_LAND
from realmap.pages import usize
from realmap.serving.logs import log, urgent
from realmap.serving.loop import Loop
from realmap.serving.registry import registry
from realmap.serving.standby import Relay, Taken
from realmap.serving.syscalls import encode
from realmap.serving.user_buffer import UserBuffer
from realmap.serving.workers import Workers
from realmap.wire import messages
from realmap.wire.ring import SPIN, checked_spin
from realmap.wire.status import Page

T = TypeVar("T")
#: How long a kernel that ends waits for who traces it to take the last that it was told, in seconds.
LAST = 3.0
#: Where no thread was to be had to stand by, another try is made so much later, in seconds.
AGAIN = 1.0


class Kernel:
    """A kernel in this process: `serve()` until it is stopped, or `start()` and `stop()` beside the program.

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
        initializer: Callable[[], object] | None = None,
    ) -> None:
        """Checks the options, which are those of `boot`; nothing is opened before `start` or `serve`. `initializer` is
        called first by these, which raise what it raises.

        InvalidSize: a limit is negative, or kernel_land is no whole pages. InvalidAddress: it is
        larger than KernelLand. TypeError, ValueError: as `syscall` and `registry`.
        """
        if limits is not None and not isinstance(limits, Limits):
            raise TypeError(f"limits is a Limits, not {limits!r}")
        if initializer is not None and not callable(initializer):
            raise TypeError(f"the initializer is a function, not {initializer!r}")
        memory = KernelMemory(length=usize(kernel_land, "kernel_land"), lazy_unmap=lazy_unmap)
        self._initializer = initializer
        self.books = Books(registry(syscalls, UserBuffer), limits or Limits(), memory, memory_limit, process_limit)
        # What a handler sees: `RunningKernel`.
        self.memory = memory
        self.frames = self.books.frames
        self.handles = self.books.handles
        self.path = os.fspath(path) if path is not None else runtime.new_socket_path()
        self._spin = checked_spin(spin)
        self.page = Page()
        self.loop = Loop(self.page)
        self.workers = Workers()
        self.registration = Registration(self.books, partial(self._ask_books, brief=True), self.loop, self.workers)
        self.tracer = Tracer(self.books)
        self._heirs = Heirs(self.books, self.loop, self.workers)
        admission = Admission(self.books, self.workers)
        self.clients = Clients(self.books, self.loop, admission, self._heirs, spin=self._spin, gone=self._lose_client)
        self.relay: Relay[Away] = Relay(self._run)
        self._seats = Seats(self.books, self.loop, self._spin)
        self.dispatch = Dispatch(
            self.books, self.clients, self.loop, self._asks(), self, self.relay, self.page, self._seats
        )
        self.clients.handle = self.dispatch.handle
        self.snapshots = Snapshots(self.loop, self._picture)
        self.watchdog = Watchdog(self.books, self.loop, self.clients, self.dispatch)
        self.dispatch.busy = self.watchdog.wake
        self._listener: Listener | None = None
        #: Whether the process is the kernel's: its main thread serves. Then it is told of the end by `_attention`.
        self._is_alone = False
        self._attention: Attention | None = None
        self._ended = Flag()
        #: What ended it, other than `stop`.
        self._error: Exception | None = None

    # ---- life -------------------------------------------------------------------------------

    def _open(self) -> None:
        """Takes the socket path and listens on it. Nothing is left behind where that fails.

        KernelError: as `serve`.
        """
        if self._listener is not None or self.loop.ending:
            state = "runs already" if self.loop.is_open and not self.loop.ending else "was stopped"
            raise KernelError(why=f"the kernel at {self.path!r} {state}")
        if self._initializer is not None:
            self._initializer()
        try:
            self.loop.open()
            try:
                self._listener = Listener(self.path, self.loop, self._enter, self.clients.turn_away)
            except BaseException:
                self.loop.close()
                raise
        except OSError as error:
            raise shortage(error, f"cannot serve {self.path!r}") from None
        self._ended = Flag()
        self._listener.note(self.page.open())
        log.info("the kernel serves at %r", self.path)
        forks.lose_in_child(self)

    def serve(self, *, ready: Callable[[], None] | None = None, booter: int = -1) -> None:
        """Serves until `stop`, on threads of its own; this one waits. `ready` is called once clients can connect. On
        the main thread no signal is blocked meanwhile, and every handler of a signal runs at once; a program that waits
        for signals by sigwait wants `start`.

        `booter`: a pidfd; when its process ends, the kernel does. InvalidHandle: the path is taken, its
        name too long, not UTF-8, or no socket. AccessDenied: the path is not ours. PhysicalMemoryExhaustion: Linux has
        no descriptors, no memory or no thread for it. KernelError: Linux does not allow it, or fails a call without
        which no kernel goes on.
        """
        self._open()
        wait: Callable[[], object] = self._ended.wait
        with contextlib.ExitStack() as undo:
            try:
                with self._in_our_words():
                    if booter >= 0:
                        self.loop.watch(booter, lambda _: self.stop(wait=False))
                    if threading.current_thread() is threading.main_thread():
                        self._attention, self._is_alone = Attention(), True
                        wait = undo.enter_context(self._attention.paid())
            except BaseException:
                self._close()
                raise
            try:
                self._start()
                if ready is not None:
                    ready()  # its errors are its caller's
                with self._in_our_words():
                    while not self._ended.is_set():
                        wait()
            finally:
                self.stop()
        if self._error is not None:
            raise self._error

    @contextlib.contextmanager
    def _in_our_words(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise shortage(error, f"the kernel at {self.path!r} cannot go on") from None

    def start(self) -> Self:
        """Serves on threads of its own, and returns once clients can connect. Errors as `serve`."""
        self._open()
        self._start()
        return self

    def _start(self) -> None:
        try:
            self.relay.start()
        except BaseException as error:
            self._close()
            if isinstance(error, RuntimeError):
                raise PhysicalMemoryExhaustion(why=f"no thread for the kernel at {self.path!r}: {error}") from None
            raise

    def _run(self, taken: Taken[Away] | None) -> None:
        """On the thread that has the loop: runs it to its end. Lost: another one has it now."""
        before, self.loop.thread = self.loop.thread, threading.get_ident()
        # The guard's; all others are the program's affair.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGBUS})
        try:
            if taken is not None:
                self.dispatch.take_over(taken, before)
                del taken.work  # or this thread would keep it for as long as it has the loop
            self._have_standby()
            with self._in_our_words():
                self.loop.run(self.clients.rings, self.clients.take_from_ring, self._spin)
        except Exception as error:
            self._error = error
            urgent.error("the kernel ends: %s", error, exc_info=not isinstance(error, KernelError))
        self._close()

    def _have_standby(self) -> None:
        if not self.relay.stand_by():
            self.loop.after(AGAIN, self._have_standby)

    def stop(self, *, wait: bool = True, timeout: float = 10.0) -> None:
        """Ends the loop: every client is told, every mapping given back, the path given free.

        From any thread; again: nothing. A handler that is at work goes on; nobody waits for it.

        Waits at most `timeout` seconds for the end, on another thread than the loop's own. TimeoutError: it has not
        come by then.
        """
        self.loop.end()
        if wait and self._listener is not None and self.loop.thread != threading.get_ident():
            if not self._ended.wait(timeout):
                raise TimeoutError(f"the kernel at {self.path!r} did not end within {timeout} s")
            self.relay.join(timeout)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def ending(self) -> bool:
        """Whether it ends, or has."""
        return self.loop.ending

    def register(self, *handlers: Callable[..., Any], replace: bool = False) -> None:
        """Adds handlers; from now on they are called. From any thread; while it runs, or before.

        `replace`: in the place of those of the same names, whose calls that are at work go on to their end.
        KernelError: it has one of that name already (then none is added). TypeError, ValueError: as `registry`.
        """
        self.registration.add(handlers, replace)

    def unregister(self, name: str) -> None:
        """Takes a handler away; calls of it that are at work go on to their end. UnknownSyscall: there is none."""
        self.registration.remove(name)

    # ---- for handlers -----------------------------------------------------------------------

    def process(self, pid: int) -> ProcessView:
        """A connected process, by the books, with the face of `ForeignProcess`. From any thread.

        InvalidHandle: it is not connected.
        """
        if pid not in self._pids():
            raise InvalidHandle(pid, why=f"process {pid} is no user of this kernel; any other: ForeignProcess")
        return ProcessView(pid, self.books, self._ask_books)

    def processes(self) -> list[ProcessView]:
        """Everybody who is connected, in the order in which they came. From any thread."""
        return [ProcessView(pid, self.books, self._ask_books) for pid in self._pids()]

    def _pids(self) -> list[int]:
        return self._ask_books(lambda: list(dict.fromkeys(process.pid for process in self.books.processes)), brief=True)

    def _ask_books(self, question: Callable[[], T], *, brief: bool = False) -> T:
        """What it says, asked by who has the loop: this thread, or another one, for which it waits. `brief`: one step,
        so it is asked here, too, where a destructor on the loop's thread would wait for itself, or no loop is left.
        """

        def seems_mine() -> bool:
            return self.loop.thread == threading.get_ident()

        with self.relay.kept(seems_mine) as is_mine:
            if is_mine or (brief and (seems_mine() or not self.loop.is_open)):
                return question()
        return self.loop.ask(question)

    # ---- its clients and its end ------------------------------------------------------------

    def _unreaped(self) -> int:
        """How many have ended, or are being looked after, and are in the books."""
        poll = select.poll()
        for connection in self.clients.all():
            if connection.process is not None:
                poll.register(connection.pidfd, select.POLLIN)
                poll.register(connection.sock, 0)  # POLLHUP
        return len(poll.poll(0)) + self._heirs.searches

    def _enter(self, sock: socket.socket) -> None:
        self.clients.enter(sock)
        self.watchdog.wake()

    def _lose_client(self, connection: Connection) -> None:
        self.tracer.lose(connection)
        self.dispatch.lose(connection)
        if connection.process is not None:
            self._seats.leave(connection.process)
        self.watchdog.wake()  # it may have left handles that last for a time

    def _close(self) -> None:
        log.info("the kernel at %r ends", self.path)
        assert self._listener is not None
        with contextlib.ExitStack() as rest:  # from below; a handler may have closed what is ours: the others go on
            rest.callback(self._tell_of_end)
            rest.callback(self.page.close)
            rest.callback(self._listener.release)
            rest.callback(self.loop.close)
            rest.callback(self.workers.close)
            rest.callback(self._heirs.clear)
            rest.callback(self.handles.clear)
            rest.callback(self._drop_all)
            rest.callback(self._listener.close)
            rest.callback(self.relay.end)

    def _tell_of_end(self) -> None:
        self._ended.set()
        if self._attention is not None:
            self._attention.call()

    def _drop_all(self) -> None:
        bye = encode(messages.Bye(messages.error_of(KernelDied(self.path, why="the kernel was shut down"))))
        # Who traces is told of all others' end, and may take that.
        for connection in sorted(self.clients.all(), key=lambda each: each is self.tracer.listener):
            if connection is self.tracer.listener:
                self._last_words(connection)
            with contextlib.suppress(Exception):
                connection.send(bye)
            with contextlib.suppress(Exception):
                self.clients.drop(connection)

    def _last_words(self, listener: Connection) -> None:
        """Waits until who traces has taken what it was told, but not for ever."""
        end = time.monotonic() + LAST
        self.tracer.stop(listener)
        while self.tracer.listener is listener and (left := end - time.monotonic()) > 0:
            with contextlib.suppress(OSError):
                self.loop.attend(left)

    def _after_fork_in_child(self) -> None:
        """A fork of the kernel's process is no kernel: it keeps nobody's memory, socket or connection alive."""
        self.frames.after_fork_in_child()
        if self._listener is None or not self.loop.is_open:
            return
        mine = self.snapshots, self._heirs, self._seats, self.clients, self._listener, self.loop, self.relay
        for owner in (*mine, self._attention):
            with contextlib.suppress(Exception):  # each whatever state the fork has found another in
                if owner is not None:
                    owner.after_fork_in_child()
        self.page.close()
        self._ended.set()

    # ---- what can be asked of it ------------------------------------------------------------

    def _asks(self) -> dict[str, Callable[[Connection, Any], Any]]:
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
            "register": self.registration.register,
            "unregister": self.registration.unregister,
            "unreaped": lambda *_: self._unreaped(),
            "stats": lambda *_: dump.stats(self.books, self._around()),
            "books": lambda connection, _: self.snapshots.begin(connection),
            "shutdown": shutdown,
            "revoke-orphans": revoke,
            "trace-start": trace,
            "trace-read": lambda connection, _: self.tracer.read(connection),
            "trace-stop": lambda connection, _: self.tracer.stop(connection),
        }

    def _picture(self) -> dump.Picture:
        return dump.Picture(self.books, self._around())

    def _around(self) -> dump.Around:
        connections = self.clients.all()
        return dump.Around(
            path=self.path,
            alone=self._is_alone,
            controls=sum(connection.control for connection in connections),
            threads=self.workers.threads,
            running=self.dispatch.running,
            given_up=len(self.dispatch.given_up),
            outbox=[inode for connection in connections for inode in connection.waiting_inodes()],
        )
