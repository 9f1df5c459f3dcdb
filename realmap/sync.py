"""Locks, queues and the like that processes share: the faces of `threading` and `queue`, in the bytes of any Buffer.

    Lock(buffer, offset=0)                    one holder at a time, of all threads of all processes
    Condition(buffer, offset=0, lock=None)    waiting for something that a lock guards: its own, or another one
    Event(buffer, offset=0)                   waiting until it is set
    Semaphore(buffer, offset=0, value=1)      so many at a time
    Barrier(buffer, offset=0, parties=N)      waiting until so many have come
    Counter(buffer, offset=0)                 a 64-bit integer, changed in one step
    Queue(me, slots=N, size=BYTES)            messages, from many to many, in memory of its own

Each but the queue takes 64 bytes of a buffer, at a multiple of 64, which are zero before: whoever comes first makes
it, and who opens the same bytes later has the same one. They work wherever the buffer is: in this process, in a
forked child, after a pickle (they travel as their buffer does), by `share` and `attach`. There is nothing to close.

Any of the processes may die at any moment. Who dies with a lock leaves it to the next, who learns of it: `OwnerDied`.
Who dies waiting loses nothing for others; who dies in a queue loses the message that he was at. What the dead had
taken of a Semaphore, or that they had come to a Barrier, nobody knows: it stays so. All of them trust each other: who
writes over these bytes may crash those who share them.

>>> import realmap
>>> from realmap.sync import Counter, Lock
>>> with realmap.boot() as kernel, kernel.connect() as me:
...     page = me.map(4096)
...     lock, hits = Lock(page), Counter(page, 64)
...     with lock:
...         hits.add(2)
2

Opening one raises InvalidAddress: the offset is no multiple of 64, the buffer lies at none, or is unmapped.
InvalidSize: it reaches beyond the buffer. AccessDenied: the buffer is read-only. InvalidMemState: something else is
there already. MemoryFault: bytes of the buffer are gone. TypeError: no buffer, or no integer.

Every method raises BufferError where its buffer is unmapped, and MemoryFault where somebody has truncated its segment.
Waits look for a moment, then sleep without the GIL; signal handlers run meanwhile, and end a wait by raising. A timeout
is in seconds, or None: no end. ValueError, TypeError: it is negative, or no number; but to acquire, -1 is as None.
"""

from __future__ import annotations

import queue
import struct
import time
from collections.abc import Callable
from typing import Any, Self, SupportsIndex, TypeVar

from realmap import _core
from realmap.errors import AccessDenied, InvalidAddress, InvalidHandle, InvalidSize
from realmap.pages import usize
from realmap.rights import rights_of
from realmap.user import travel
from realmap.user.buffer import Buffer
from realmap.user.handle import Handle
from realmap.user.process import Process

__all__ = ["Barrier", "Condition", "Counter", "Event", "Lock", "Queue", "Semaphore"]

#: Bytes that each takes, and what it lies at a multiple of.
SIZE = 64
#: How a handle lies in a slot of a queue: its token, length, rights.
_HANDLE = struct.Struct("=16sQI")
T = TypeVar("T")


class _InBuffer(_core.Shared):
    """What is opened in 64 bytes of a buffer, and pickles as these."""

    __slots__ = ()

    @classmethod
    def _at(cls, buffer: Buffer, offset: SupportsIndex, number: int = 0) -> Self:
        if not isinstance(buffer, Buffer):
            raise TypeError(f"this lies in a Buffer, as me.map(4096) makes one, not in {buffer!r}")
        start = usize(offset, "offset")
        buffer.check()
        if start % SIZE or buffer.address % SIZE:
            why = f"it lies at a multiple of {SIZE}, of a buffer that does so, too"
            raise InvalidAddress(buffer.address + start, why=why)
        if start + SIZE > len(buffer):
            raise InvalidSize(SIZE, why=f"offset {start} + {SIZE} bytes is beyond a buffer of {len(buffer)} bytes")
        if not buffer.writable:
            raise AccessDenied(why=f"{buffer!r} is read-only, and who waits writes there, too")
        return cls._open(buffer, start, number)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.buffer, self.offset)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {self.buffer.address + self.offset:#x}>"


class Lock(_InBuffer, _core.SharedLock):
    """A lock: one thread of all processes holds it at a time. `with lock:`, or `acquire` and `release`.

    A robust mutex of the C library. Who dies with it (a process, or a thread that ends) leaves it to the next, whose
    `acquire` raises OwnerDied **and holds it**: what the lock guards may be half done. It mends that, then says
    `recovered()`, then releases as ever:

        try:
            lock.acquire()
        except OwnerDied:
            mend()
            lock.recovered()
        try: …
        finally: lock.release()

    `with lock:` raises it likewise, before its block, which is then not run, and the lock is held. Released
    without `recovered()` it is of no use any more: InvalidMemState to all, from then on.

    The thread that has acquired it releases it, by the same object. A forked child does not hold what its parent
    does. A buffer is not unmapped under a lock that is held (BufferError). An object that is forgotten while it holds
    its lock leaves it held until the thread ends, and the buffer mapped; one whose thread has ended with it leaves the
    buffer mapped until it is acquired again. Of a thread that dies Linux sees to 2,048 locks (ROBUST_LIST_LIMIT).
    """

    __slots__ = ()

    def __new__(cls, buffer: Buffer, offset: SupportsIndex = 0) -> Self:
        return cls._at(buffer, offset)


class Condition(_InBuffer, _core.SharedCondition):
    """As `threading.Condition`: who has the lock waits until somebody else, who has it then, notifies.

    `lock`: a Lock that guards what is waited for, the same one for all who open these bytes; by default one of its own,
    in the same 64 bytes. `acquire`, `release` and `recovered` are that lock's. A wait may end without a notification
    where a process has died: look again for what was waited for, as `wait_for` does.
    """

    __slots__ = ()

    def __new__(cls, buffer: Buffer, offset: SupportsIndex = 0, lock: Lock | None = None) -> Self:
        self = cls._at(buffer, offset)
        if lock is not None:
            self._use(lock)
        return self

    def wait_for(self, predicate: Callable[[], T], timeout: float | None = None) -> T:
        """Waits until `predicate()` is true, which is asked with the lock held; its last answer. Errors as `wait`."""
        end = None if timeout is None else time.monotonic() + timeout
        found = predicate()
        while not found and self.wait(None if end is None else max(0.0, end - time.monotonic())):
            found = predicate()
        return found or predicate()

    def notify_all(self) -> None:
        """Wakes all who wait. Errors as `notify`."""
        self.notify(2**31 - 1)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.buffer, self.offset, self._lock)


class Event(_InBuffer, _core.SharedEvent):
    """As `threading.Event`: `is_set()`, `set()`, `clear()`, `wait(timeout=None)`: whether it was set."""

    __slots__ = ()

    def __new__(cls, buffer: Buffer, offset: SupportsIndex = 0) -> Self:
        return cls._at(buffer, offset)


class Semaphore(_InBuffer, _core.SharedSemaphore):
    """As `threading.Semaphore`: `acquire(blocking=True, timeout=None)`, `release(n=1)`, `with semaphore:`.

    `value`: how many may acquire it at first, where this makes it (ValueError: none that a semaphore has). Robust it is
    not: what a process had acquired that died stays acquired.
    """

    __slots__ = ()

    def __new__(cls, buffer: Buffer, offset: SupportsIndex = 0, value: SupportsIndex = 1) -> Self:
        number = usize(value, "value")
        if number >= 2**31:
            raise ValueError(f"a semaphore holds 2147483647 at most, not {number}")
        return cls._at(buffer, offset, number)


class Barrier(_InBuffer, _core.SharedBarrier):
    """As `threading.Barrier`: `wait(timeout=None)`, `abort()`, `reset()`, `parties`, `n_waiting`, `broken`.

    `parties`: how many have to come, 1 to 32767, the same for all (else InvalidMemState; ValueError: no such number).
    Who gives up, by a timeout or an exception of a signal handler, breaks it for all: threading.BrokenBarrierError.
    """

    __slots__ = ()

    def __new__(cls, buffer: Buffer, offset: SupportsIndex = 0, parties: SupportsIndex = 0) -> Self:
        number = usize(parties, "parties")
        if not 0 < number < 2**15:
            raise ValueError(f"1 to 32767 come to a barrier, not {number}")
        return cls._at(buffer, offset, number)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.buffer, self.offset, self.parties)


class Counter(_InBuffer, _core.SharedCounter):
    """An integer from -2**63 to 2**63 - 1, at first 0, that processes change in one step.

    `value` (it is changed by `add` alone); `add(number)`: its value afterwards (OverflowError: it has 64 bits);
    `compare_exchange(old, new)`: whether it was `old`, and is `new` now.
    """

    __slots__ = ()

    def __new__(cls, buffer: Buffer, offset: SupportsIndex = 0) -> Self:
        return cls._at(buffer, offset)


class Queue(_core.SharedQueue):
    """Messages, first in, first out, from any number of processes to any number of them: bytes, or Buffers.

    It holds `slots` messages of at most `size` bytes, in memory that it maps from `me`. Others have it by a pickle,
    or a fork. `put(data, timeout=None)`, `get(timeout=None)`, `put_nowait(data)`, `get_nowait()`, `qsize()`;
    `queue.Full` and `queue.Empty`. What is put is copied, and comes out as bytes; but a Buffer comes out as a
    Buffer: the same memory, which outlives who put it as a pickled one does.

    A message is there or it is not: who dies while he puts one has put nothing, and keeps nobody; who dies after he
    took one has lost that, and no other.

    InvalidSize: no slots, no bytes, or more than 2**30 of either. Else as `Process.map`.
    """

    __slots__ = ()

    def __new__(cls, me: Process, *, slots: SupportsIndex, size: SupportsIndex) -> Self:
        if not isinstance(me, Process):
            raise TypeError(f"a queue lies in memory of a Process, which is not {me!r}")
        shape = usize(slots, "slots"), usize(size, "size")
        if not all(0 < number <= 2**30 for number in shape):
            raise InvalidSize(shape[1], why=f"a queue has 1 to 2**30 slots of 1 to 2**30 bytes, not {shape[0]}")
        return cls._open(me.map(cls._length(*shape)), *shape)

    def put_nowait(self, data: Any) -> None:
        """As `put`, but `queue.Full` at once where there is no room."""
        self.put(data, 0)

    def get_nowait(self) -> Any:
        """As `get`, but `queue.Empty` at once where nothing is there."""
        return self.get(0)

    def _put_buffer(self, buffer: Any, timeout: float | None) -> None:
        if not isinstance(buffer, Buffer):
            raise TypeError(f"bytes or a Buffer are put into a queue, not {buffer!r}")
        owner = buffer.process
        if owner.path != self.buffer.process.path:
            raise InvalidHandle(owner.path, why="the buffer is of another kernel than the queue")
        handle = owner.share(buffer, uses=1, keep=travel.TRANSIT)
        there = [False]
        try:
            told = _HANDLE.pack(bytes.fromhex(handle.token), handle.length, int(handle.rights))
            if not self._put_handle(told, timeout, there):
                raise queue.Full("no room in the queue")
        except BaseException:  # nobody will ever have it
            if not there[0]:
                owner.revoke(handle)
            raise

    def _attached(self, told: bytes) -> Buffer:
        token, length, rights = _HANDLE.unpack(told)
        me = self.buffer.process
        found: Buffer = me.attach(Handle(me.path, token.hex(), length, rights_of(rights)))
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self)._open, (self.buffer, self.slots, self.size)

    def __repr__(self) -> str:
        return f"<Queue of {self.slots} slots of {self.size} bytes at {self.buffer.address:#x}>"
