"""`Loop`: waits, and calls what it was handed. It knows nobody.

epoll ─┬─ descriptors        each with a function of its own (`watch`)
       └─ an eventfd         another thread left word (`post`), or it is to end
rings ─── the next message   without a system call while both sides are awake (`run`)
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from realmap._core import Lock, Ring, SpinBudget, fall_asleep, spin, wake_up
from realmap.host import files
from realmap.kernel.logs import log

Handler = Callable[[int], None]
#: While the rings are busy, the descriptors are looked at this often, in nanoseconds.
LOOK = 200_000


class Loop:
    """One thread runs it. What is watched is called on that thread; `post` and `end` are for any."""

    def __init__(self) -> None:
        self._posted: deque[Callable[[], None]] = deque()
        self._handlers: dict[int, Handler] = {}
        self._wake = -1
        self._wake_lock = Lock()
        #: Whether it is to end, or has.
        self.ending = False
        #: The thread that runs it.
        self.thread = 0

    @property
    def is_open(self) -> bool:
        """Whether it can be run, and jobs wait for that."""
        return self._wake >= 0

    def open(self) -> None:
        """Gets it ready. OSError: no descriptors, or no memory; nothing is left then."""
        with contextlib.ExitStack() as undo:
            wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            undo.callback(files.close, wake)
            self._epoll = select.epoll()
            undo.callback(files.shut, self._epoll)
            self.watch(wake, self._on_wake)
            self._wake = wake
            undo.pop_all()

    def close(self) -> None:
        """From here on, jobs run where they are posted; those that wait, here. Again: nothing."""
        if not self.is_open:
            return
        files.shut(self._epoll)
        with self._wake_lock:
            wake, self._wake = self._wake, -1
            files.close(wake)
        self._run_posted()

    def after_fork_in_child(self) -> None:
        """It is the parent's alone."""
        self.ending = True
        files.shut(self._epoll)
        files.close(self._wake)
        self._wake = -1

    def end(self) -> None:
        """Has `run` return, soon. From any thread."""
        self.ending = True
        self._ring_bell()

    def post(self, job: Callable[[], None]) -> None:
        """Has `job` run on its thread, soon; here and now where it is not open. From any thread."""
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
        """Has `handler(fd)` called on its thread when something is to be had from `fd`.

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

    @contextlib.contextmanager
    def open_to_signals(self) -> Iterator[None]:
        """On the main thread, whatever it had inherited, no signal is blocked meanwhile, and one that comes right
        before it sleeps wakes it all the same. Another thread leaves signals to the program, but for SIGBUS,
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

    def run(self, rings: list[Ring], take: Callable[[int], None], patience_in_us: float) -> None:
        """Until `end`: `take(index)` where a ring has a message, and looks at the descriptors now and then.

        `rings` may change meanwhile. `patience_in_us`: how long it looks for the next message before it sleeps.
        OSError: Linux fails a call without which it cannot go on.
        """
        budget = SpinBudget(int(patience_in_us * 1000), os.cpu_count() or 1)
        turn = looked = asleep = 0
        paid = False  # whether spinning has, since the last look
        patience = budget.now(time.monotonic_ns())
        while not self.ending:
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
                take(found)
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

    def attend(self, timeout: float) -> None:
        """Looks at the descriptors alone, for at most so many seconds. OSError: as `run`."""
        self._attend(self._epoll.poll(timeout))

    def _attend(self, events: list[tuple[int, int]]) -> None:
        for fd, _ in events:
            # Looked up anew: an earlier event of this turn may have closed it.
            handler = self._handlers.get(fd)
            try:
                if handler is not None:
                    handler(fd)
            except Exception:  # a bug of ours ends nothing
                log.exception("the kernel failed at something")

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


def _drain(sock: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError):
        sock.recv(4096)
