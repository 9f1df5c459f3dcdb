"""What may be used where a signal handler, or a destructor, can run: that is, everywhere.

Python runs the handler of a signal on the main thread, between any two steps of what that is at. It may call any
public method of ours, also the one that it came in the middle of, or raise. So this holds for all of realmap:

* **A lock is the core's Lock**, an RLock taken by `with`: its own thread never waits for itself, and an exception never
  leaves it taken. (From Python 3.14 on a handler can come between the taking of a plain RLock and the `with` block; on
  every version, between an `acquire` and the `try` behind it.) No `threading.Lock`; nor what has one inside and may be
  called twice on one thread: `Event`, `Semaphore`, `Condition(Lock())`, `Popen.wait`. Here is `Flag` instead; `Child`
  waits by itself.
* **What a lock guards is whole wherever a handler can come**, for it may come through the same lock: each change is
  one call of C (`dict.setdefault`, `list.append`, the core's own), or is made on something that nobody else can reach
  until it is whole, and compared before it takes effect (`KernelMemory._ask`). What has to be undone is tied to an
  object whose end undoes it (`Charge`), so that it makes no difference where an exception comes. An `except OSError`
  asks whose error it is (`pass_on`; those of `host/translate.py` do).
* **A destructor takes no lock.** It makes one call of C, or appends to a deque for whoever comes next.
* **Nobody waits for a process, a thread or the network while holding one.** Where two make the same thing at once,
  `dict.setdefault` says who was first, and the other gives his up. The exceptions: who needs the kernel of this process
  tree waits for the thread that is just booting it (`ambient`), or connecting to it (`user/travel`).

Books that say "not safe for threads by itself" (`ProcessMemory`, `Bookkeeping`) are not safe for handlers either: they
are the kernel's thread's alone. tests/system/test_locks.py calls everything from a handler in the middle of everything.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import signal
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from types import CodeType
from typing import Any, Generic, TypeVar

from realmap.host import files

T = TypeVar("T")


def pass_on(error: Exception) -> None:
    """Raises it once more where a signal handler raised it: then it is not Linux's answer to what we asked.

    Python runs handlers within our own calls, so an `except OSError` of ours sees their exceptions as well. What
    tells them apart: a handler is among the functions that the exception came through.
    """
    handlers = {_code_of(signal.getsignal(number)) for number in signal.valid_signals()} - {None}
    at = error.__traceback__ if handlers else None
    while at is not None:
        if at.tb_frame.f_code in handlers:
            raise error
        at = at.tb_next


def _code_of(handler: Any) -> CodeType | None:
    while isinstance(handler, functools.partial):
        handler = handler.func
    if not hasattr(handler, "__code__"):  # a method has its function's
        handler = type(handler).__call__ if callable(handler) else None
    return getattr(handler, "__code__", None)


class Flag:
    """As `threading.Event`, but a handler may set it or wait for it while its own thread is doing either."""

    def __init__(self) -> None:
        self._is_set = False
        self._bell: SimpleQueue[None] = SimpleQueue()  # which is re-entrant

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        """Sets it, for good, and wakes all who wait."""
        self._is_set = True
        self._bell.put(None)

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until it is set, at most `timeout` seconds; whether it is."""
        if not self._is_set:
            try:
                self._bell.get(timeout=timeout)
            except Empty:
                pass
            finally:
                if self._is_set:
                    self._bell.put(None)  # for the next who waits
        return self._is_set


class Attention:
    """The main thread waits, and whatever signal comes, its handler runs at once: Python runs handlers there alone, but
    Linux may hand the signal to any other thread. Made and used on the main thread, but for `call`.
    """

    def __init__(self) -> None:
        """OSError: no descriptors for it."""
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    @contextlib.contextmanager
    def paid(self) -> Iterator[Callable[[], None]]:
        """No signal is blocked meanwhile, whatever the program had inherited; the guard's SIGBUS is not afterwards
        either. What it gives waits for the next one, or for `call`.
        """
        fd = self._writer.fileno()
        with contextlib.ExitStack() as undo:
            undo.callback(files.shut, self._writer)
            undo.callback(files.shut, self._reader)
            undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(fd, warn_on_full_buffer=False))
            before = signal.pthread_sigmask(signal.SIG_BLOCK, ()) - {signal.SIGBUS}
            undo.callback(signal.pthread_sigmask, signal.SIG_SETMASK, before)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            poll = select.poll()
            poll.register(self._reader, select.POLLIN)

            def wait() -> None:
                poll.poll()
                with contextlib.suppress(OSError):  # nothing is there; or a handler has closed it
                    self._reader.recv(4096)

            yield wait

    def after_fork_in_child(self) -> None:
        signal.set_wakeup_fd(-1)
        files.shut(self._reader)
        files.shut(self._writer)

    def call(self) -> None:
        """Ends a wait. From any thread; where nobody waits any more: nothing."""
        with contextlib.suppress(OSError):  # where it is full, it is readable
            self._writer.send(b"\0")


def on(job: Callable[[], object], *numbers: int) -> None:
    """Has `job` run at these signals, in this process; a fork has again what there was before. On the main thread."""
    before = {number: signal.signal(number, lambda *_: job()) for number in numbers}
    kept = threading.local()

    def block() -> None:  # Python forgets what comes while it forks
        kept.mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, kept.mask)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        unblock()

    os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=restore)


@contextlib.contextmanager
def handled(handler: Callable[[int, Any], object], *numbers: int) -> Iterator[None]:
    """Has `handler` run at these signals meanwhile, and afterwards what there was before. On the main thread."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old if old is not None else signal.SIG_DFL)


class Living(Generic[T]):
    """What somebody else refers to. Unlike a WeakSet, it may change while it is looked through."""

    def __init__(self) -> None:
        self._things: weakref.WeakKeyDictionary[T, None] = weakref.WeakKeyDictionary()

    def add(self, thing: T) -> None:
        self._things[thing] = None

    def discard(self, thing: T) -> None:
        with contextlib.suppress(KeyError):
            del self._things[thing]

    def all(self) -> list[T]:
        """The things that live at this moment."""
        return [thing for ref in self._things.keyrefs() if (thing := ref()) is not None]
