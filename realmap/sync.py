"""Locks and the like that processes share: the faces of `threading` and `queue`, in the bytes of any Buffer.

    Lock(buffer, offset=0)                 one holder at a time, of all threads of all processes
    Event(buffer, offset=0)                threads wait until it is set
    Counter(buffer, offset=0)              a 64-bit integer, changed in one step

Each takes 64 bytes of a buffer, at a multiple of 64, which are zero before: whoever comes first makes it, and who opens
the same bytes later has the same one. They work wherever the buffer is: in this process, in a forked child, after
a pickle (they travel as their buffer does), by `me.share` and `attach`. There is nothing to close.

Any of the processes may die at any moment. Who dies with a `Lock` leaves it to the next, and that it was so: `OwnerDied`.

>>> import realmap
>>> from realmap.sync import Counter, Lock
>>> with realmap.boot() as kernel, kernel.connect() as me:
...     page = me.map(4096)
...     lock, hits = Lock(page), Counter(page, 64)
...     with lock:
...         hits.add(2)
2

Every method raises BufferError where its buffer is unmapped, and MemoryFault where somebody has truncated its segment.
Waits look for a moment, then sleep without the GIL; signal handlers run meanwhile, and end a wait by raising. A timeout
is in seconds, or None: no end. ValueError, TypeError: it is negative, or no number.
"""

from __future__ import annotations

from typing import Any, Self, SupportsIndex

from realmap import _core
from realmap.errors import AccessDenied, InvalidAddress, InvalidSize
from realmap.pages import usize
from realmap.user.buffer import Buffer

__all__ = ["Counter", "Event", "Lock"]

#: Bytes that each takes, and what it lies at a multiple of.
SIZE = 64


def _checked(buffer: Buffer, offset: SupportsIndex) -> int:
    """The offset, where something may lie in that buffer. Errors as those of the classes below."""
    if not isinstance(buffer, Buffer):
        raise TypeError(f"this lies in a Buffer, not in {buffer!r}")
    start = usize(offset, "offset")
    buffer.check()
    if start % SIZE or buffer.address % SIZE:
        raise InvalidAddress(buffer.address + start, why=f"it lies at a multiple of {SIZE}, of a buffer that does so, too")
    if start + SIZE > len(buffer):
        raise InvalidSize(SIZE, why=f"offset {start} + {SIZE} bytes is beyond a buffer of {len(buffer)} bytes")
    if not buffer.writable:
        raise AccessDenied(why=f"{buffer!r} is read-only: who only waits writes as well")
    return start


class _InBuffer(_core.Shared):
    """What is opened in 64 bytes of a buffer, and pickles as these.

    InvalidAddress: the offset is no multiple of 64, the buffer does not lie at one, or is unmapped. InvalidSize: it
    reaches beyond the buffer. AccessDenied: the buffer is read-only. InvalidMemState: something else is there already.
    MemoryFault: bytes of the buffer are gone. TypeError: no buffer, or no integer.
    """

    __slots__ = ()

    def __new__(cls, buffer: Buffer, offset: SupportsIndex = 0) -> Self:
        return cls._open(buffer, _checked(buffer, offset), 0)

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

    Released without `recovered()` it is of no use any more: InvalidMemState to all, from then on.

    The thread that has acquired it releases it, by the same object. A forked child does not hold what its parent
    does. A buffer is not unmapped under a lock that is held (BufferError). Who forgets an object that holds its lock
    leaves it held until the thread ends. Opened as `_InBuffer` says.
    """

    __slots__ = ()


class Event(_InBuffer, _core.SharedEvent):
    """As `threading.Event`: `is_set()`, `set()`, `clear()`, `wait(timeout=None)`, whose answer is whether it was set.

    Opened as `Lock` is, with the same errors.
    """

    __slots__ = ()


class Counter(_InBuffer, _core.SharedCounter):
    """An integer from -2**63 to 2**63 - 1, at first 0, that processes change in one step. Opened as `Lock` is.

    `value`; `add(number)`: its value afterwards (OverflowError: it has 64 bits); `compare_exchange(old, new)`: whether
    it was `old`, and is `new` now.
    """

    __slots__ = ()
