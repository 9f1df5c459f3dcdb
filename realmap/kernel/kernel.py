"""`Kernel`: the loop. One thread, one epoll; everything that changes the books happens on it.

epoll ─┬─ listening socket   a client connects
       ├─ a client's socket  one message per turn each: nobody is starved by a talker
       │  and its ring       the same, without a system call while both sides are awake
       ├─ a process's pidfd  it died: reap
       ├─ the booter's pidfd, where there is one: end
       └─ an eventfd         a worker left word (`post`), or `stop` was called
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self, SupportsIndex

from realmap._core import Ring, SpinBudget, fall_asleep, spin, wake_up
from realmap.errors import (
    KernelDied,
    KernelError,
    PhysicalMemoryExhaustion,
)
from realmap.host import files, forks, runtime
from realmap.host.signals import Flag
from realmap.host.translate import shortage
from realmap.kernel import syscalls
from realmap.kernel.admission import Admission
from realmap.kernel.clients import Clients
from realmap.kernel.connection import Connection
from realmap.kernel.dispatch import Dispatch
from realmap.kernel.handles import Handles
from realmap.kernel.inheritance import Inheritance
from realmap.kernel.limits import Limits
from realmap.kernel.logs import log
from realmap.kernel.processes import ProcessTable
from realmap.kernel.syscalls import registry
from realmap.kernel.tracer import Tracer
from realmap.kernel.watchdog import Watchdog
from realmap.kernel.workers import Workers
from realmap.memory.frames import FrameAllocator
from realmap.memory.kernel_memory import KernelMemory
from realmap.memory.lands import KERNEL_LAND
from realmap.wire import messages
from realmap.wire.ring import SPIN, checked_spin

Handler = Callable[[int], None]
#: While the rings are busy, the descriptors are looked at this often, in nanoseconds.
LOOK = 200_000
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
        self.syscalls = registry(syscalls)
        if limits is not None and not isinstance(limits, Limits):
            raise TypeError(f"limits is a Limits, not {limits!r}")
        self.limits = limits or Limits()
        self.frames = FrameAllocator(memory_limit)
        #: Bytes of frames for each process; None: as many as there are.
        self.process_limit = FrameAllocator(process_limit).limit
        self.clients = Clients(self, Admission(self))
        self.memory = KernelMemory(length=kernel_land, lazy_unmap=lazy_unmap)
        self.path = os.fspath(path) if path is not None else runtime.new_socket_path()
        self.spin = checked_spin(spin)
        self.processes = ProcessTable()
        self.handles = Handles()
        self.estates = Inheritance(self)
        self.workers = Workers()
        self.dispatch = Dispatch(self)
        self.tracing = Tracer(self)
        self._watch = Watchdog(self)
        self._posted: deque[Callable[[], None]] = deque()
        self._handlers: dict[int, Handler] = {}
        self._thread: threading.Thread | None = None
        self._lock: runtime.SocketLock | None = None
        self._wake = -1
        self._wake_lock = threading.RLock()
        self._stopping = False
        self._ended = Flag()
        #: The thread that serves.
        self.serving = 0

    # ---- life -------------------------------------------------------------------------------

    def _open(self) -> None:
        """Takes the socket path and listens on it. Nothing is left behind where that fails.

        KernelError: as `serve`.
        """
        if self._lock is not None or self._stopping:
            raise KernelError(why=f"the kernel at {self.path!r} {'was stopped' if self._stopping else 'runs already'}")
        try:
            self._take_path()
        except OSError as error:
            raise shortage(error, f"cannot serve {self.path!r}") from None
        self._ended = Flag()
        log.info("the kernel serves at %r", self.path)
        try:
            self._watch.start()
        except RuntimeError as error:
            self._close()
            raise PhysicalMemoryExhaustion(why=f"no thread for the kernel at {self.path!r}: {error}") from None
        forks.lose_in_child(self)

    def _take_path(self) -> None:
        lock = runtime.SocketLock(self.path)
        with contextlib.ExitStack() as undo:
            undo.callback(lock.release)
            runtime.sweep()
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(files.shut, self._listener)
            self._listener.setblocking(False)
            self._listener.bind(self.path)
            os.chmod(self.path, 0o600)
            self._listener.listen(128)
            # Given up for a moment where no descriptor is left, to turn a client away.
            self._spare = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
            undo.callback(files.close, self._spare)
            wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            undo.callback(files.close, wake)
            self._epoll = select.epoll()
            undo.callback(files.shut, self._epoll)
            self.watch(self._listener.fileno(), self._accept)
            self.watch(wake, self._on_wake)
            self._wake, self._lock = wake, lock
            undo.pop_all()

    def serve(self, *, ready: Callable[[], None] | None = None, booter: int = -1) -> None:
        """Serves on this thread until `stop`; `ready` is called once clients can connect. On the main thread no signal
        is blocked meanwhile; a program that waits for them by sigwait wants `start`.

        `booter`: a pidfd; when its process ends, the kernel does. InvalidHandle: the path is taken,
        too long, not UTF-8, or no socket. AccessDenied: the path is not ours. PhysicalMemoryExhaustion: Linux has no
        descriptors or no memory for it. KernelError: Linux does not allow it, or fails a call without which no
        kernel goes on.
        """
        self._open()
        self.serving = threading.get_ident()
        with contextlib.ExitStack() as undo:
            undo.callback(self._close)
            with self._in_our_words():
                if booter >= 0:
                    self.watch(booter, lambda _: self.stop(wait=False))
                undo.enter_context(self._open_to_signals())
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
        self._thread = threading.Thread(target=self._loop, name="realmap-kernel", daemon=True)
        try:
            self._thread.start()
        except BaseException as error:
            self._thread = None
            self._close()
            if isinstance(error, RuntimeError):
                raise PhysicalMemoryExhaustion(why=f"no thread for the kernel at {self.path!r}: {error}") from None
            raise
        return self

    @contextlib.contextmanager
    def _open_to_signals(self) -> Iterator[None]:
        """On the main thread, whatever it had inherited, no signal is blocked meanwhile, and one that comes right
        before the kernel sleeps wakes it all the same. Another thread leaves signals to the program, but for SIGBUS,
        which is the guard's, here and in the threads that are started from here.
        """
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGBUS})
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        reader, writer = socket.socketpair()
        with contextlib.ExitStack() as undo:
            undo.callback(files.shut, reader)
            undo.callback(files.shut, writer)
            reader.setblocking(False)
            writer.setblocking(False)
            self.watch(reader.fileno(), lambda _: _drain(reader))
            before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
            undo.callback(signal.set_wakeup_fd, before)
            undo.callback(signal.pthread_sigmask, signal.SIG_SETMASK, signal.pthread_sigmask(signal.SIG_BLOCK, ()))
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            yield

    def stop(self, *, wait: bool = True, timeout: float = 10.0) -> None:
        """Ends the loop: every client is told, every mapping given back, the path given free.

        From any thread; again: nothing.

        Waits at most `timeout` seconds for it, from another thread than its own. TimeoutError: a
        handler did not return in that time.
        """
        self._stopping = True
        self._ring_bell()
        if wait and self._lock is not None and self.serving != threading.get_ident():
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
        with self._wake_lock:
            if self._wake >= 0:
                self._posted.append(job)
                self._ring_bell()
                return
        job()

    def _ring_bell(self) -> None:
        with self._wake_lock, contextlib.suppress(OSError):  # where its counter is full, it has rung already
            while self._wake >= 0:
                with contextlib.suppress(InterruptedError):  # unlike os.write, this is not tried again by itself
                    os.eventfd_write(self._wake, 1)
                    return

    def watch(self, fd: int, handler: Handler, events: int = select.EPOLLIN) -> None:
        """Has `handler(fd)` called on the kernel's thread when something is to be had from `fd`.

        OSError: Linux has no memory for it, or the limit of what is watched is reached.
        """
        self._epoll.register(fd, events)
        self._handlers[fd] = handler

    def rewatch(self, fd: int, events: int) -> None:
        """Watches it for other events. OSError: as `watch`."""
        self._epoll.modify(fd, events)

    def unwatch(self, fd: int) -> None:
        """Ends that. Again: nothing."""
        if self._handlers.pop(fd, None) is not None:
            with contextlib.suppress(OSError):  # whoever is being dropped is dropped to the end
                self._epoll.unregister(fd)

    def _loop(self) -> None:
        self.serving = threading.get_ident()
        try:
            with self._open_to_signals():
                self._turns()
        finally:
            self._close()

    def _turns(self) -> None:
        """Takes calls from the rings while there are any, and looks at the descriptors now and then."""
        rings, budget = self.clients.rings, SpinBudget(int(self.spin * 1000), os.cpu_count() or 1)
        turn = looked = asleep = 0
        paid = False  # whether spinning has, since the last look
        patience = budget.now(time.monotonic_ns())
        while not self._stopping:
            if not rings:
                self._attend(self._epoll.poll())
                continue
            # From the one behind the last one on: nobody is starved by a talker.
            found = spin(rings, turn, patience)
            now = time.monotonic_ns()
            if found >= 0:
                if asleep:
                    budget.slept(now - asleep)
                    asleep = 0
                else:
                    paid = True
                turn = found + 1
                self.clients.take_from_ring(found)
                if now - looked > LOOK:
                    looked = now
                    self._attend(self._epoll.poll(0))
                    if paid:
                        budget.spun(found, now)
                        paid = False
                    patience = budget.now(now)
            else:
                if patience:
                    budget.spun(found, now)
                asleep = looked = now
                self._sleep(rings)
                patience = budget.now(time.monotonic_ns())

    def _sleep(self, rings: list[Ring]) -> None:
        if fall_asleep(rings):
            try:
                events = self._epoll.poll()
            finally:
                wake_up(rings)
            self._attend(events)

    def _attend(self, events: list[tuple[int, int]]) -> None:
        for fd, _ in events:
            # Looked up anew: an earlier event of this turn may have closed it.
            handler = self._handlers.get(fd)
            try:
                if handler is not None:
                    handler(fd)
            except Exception:  # a bug of ours ends one client at worst, never the kernel
                log.exception("the kernel failed at something")
                connection = self.clients.find(fd)
                if connection is not None:
                    self.clients.drop(connection)

    def _close(self) -> None:
        log.info("the kernel at %r ends", self.path)
        self._watch.stop()
        bye = syscalls.encode(messages.Bye(messages.error_of(KernelDied(self.path, why="the kernel was shut down"))))
        self.unwatch(self._listener.fileno())
        files.shut(self._listener)
        # Who traces is told of all others' end, and may take that.
        for connection in sorted(self.clients.all(), key=lambda each: each is self.tracing.listener):
            if connection is self.tracing.listener:
                self._last_words(connection)
            with contextlib.suppress(Exception):
                connection.send(bye)
            self.clients.drop(connection)
        files.shut(self._epoll)
        self.handles.clear()
        self.estates.clear()
        self.workers.close()
        with self._wake_lock:  # from here on, jobs run where they are posted
            wake, self._wake = self._wake, -1
            files.close(wake)
        self._run_posted()
        if self._spare >= 0:
            files.close(self._spare)
        if self._lock is not None:
            self._lock.release()
        self._ended.set()

    def _last_words(self, listener: Connection) -> None:
        """Waits until who traces has taken what it was told, but not for ever."""
        end = time.monotonic() + LAST
        self.tracing.stop(listener)
        while self.tracing.listener is listener and (left := end - time.monotonic()) > 0:
            with contextlib.suppress(OSError):
                self._attend(self._epoll.poll(left))

    def lose(self) -> None:
        """A fork of the kernel's process is no kernel: it keeps nobody's memory, socket or connection alive."""
        if self._wake < 0:
            return
        self._stopping = True
        for process in self.processes:
            for mapping in process.memory:
                segments = getattr(mapping.frames, "segments", ())
                for segment in segments:
                    files.close(segment.fd)
                    segment.fd = -1
            files.close(process.pidfd)
        for connection in self.clients.all():
            files.shut(connection.sock)
        files.shut(self._listener)
        files.shut(self._epoll)
        files.close(self._wake)
        self._wake = -1

    def _on_wake(self, _: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        self._run_posted()

    def _run_posted(self) -> None:
        for _ in range(len(self._posted)):
            try:
                self._posted.popleft()()
            except Exception:
                log.exception("the kernel failed at something")

    def _accept(self, _: int) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # else the listener would be ready for ever
                if self._spare >= 0:
                    files.close(self._spare)
                with contextlib.suppress(OSError):
                    self._listener.accept()[0].close()
                self._spare = -1
                with contextlib.suppress(OSError):  # a worker was quicker: then without one
                    self._spare = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
            return
        self.clients.enter(sock)

    @property
    def needs_watching(self) -> bool:
        """Whether a blocking handler is at work, a handle has its time, or somebody has not said who it is."""
        return bool(self.dispatch.running or self.clients.has_strangers or self.handles.timed)

    @property
    def is_alone(self) -> bool:
        """Whether this process is the kernel's: it serves on the main thread."""
        return self._thread is None


def _drain(sock: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError):
        sock.recv(4096)
