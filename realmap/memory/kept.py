"""Kept windows (`lazy_unmap`): a dropped mirror stays mapped for its next use, within a budget of bytes.

    mirror dropped ──▶ kept ──▶ the same range wanted again: the mirror's, without a system call
                        ├─ the budget is exceeded: the one that was kept longest goes
                        ├─ its mapping is released, or its frames go: it goes with them
                        └─ no space, or no more mappings: all of them go

A kept window is no reference: it never keeps frames alive. It serves one mirror at a time (it is
taken out while one uses it), and is found by frames, range and rights; a larger one serves a
smaller range inside it.
"""

from __future__ import annotations

import contextlib
from collections import deque
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple, SupportsIndex

from realmap._host import Window
from realmap.pages import usize

if TYPE_CHECKING:
    from realmap.memory.cross_process import CrossProcessMapping
    from realmap.memory.frames import SharedFrames
    from realmap.memory.kernel_memory import KernelMemory

#: (serial of the frames, offset in them of the first page, bytes of pages, PROT_ bits)
Key = tuple[int, int, int, int]


class KeptWindow(Window):
    """A mapping that no mirror uses at the moment."""

    __slots__ = ()


class KeptCounts(NamedTuple):
    """How often a mirror was served by a kept window (`hits`) or not, how many went, and what is kept now."""

    hits: int
    misses: int
    evictions: int
    windows: int
    bytes: int


class KeptWindows:
    """The kept windows of one `KernelMemory`, the one kept longest first.

    Mirrors are dropped, and frames go, in destructors too, which may run while this very thread
    holds the lock: nothing there waits for it. A mirror that cannot be kept at once is unmapped, and
    frames that go at such a moment are noted for whoever holds the lock.
    """

    def __init__(self, budget: SupportsIndex, kernel: KernelMemory) -> None:
        """`budget` in bytes of pages; 0 keeps nothing. InvalidSize: negative. TypeError: no integer."""
        self.budget = usize(budget, "lazy_unmap")
        self._kernel = kernel
        self._lock = Lock()
        self._windows: dict[Key, KeptWindow] = {}
        self._of: dict[int, set[Key]] = {}
        self._gone: deque[int] = deque()
        self._bytes = self._hits = self._misses = self._evictions = 0

    def take(self, frames: SharedFrames, start: int, span: int, prot: int) -> tuple[KeptWindow, int] | None:
        """A window that shows [start, start + span) of `frames` with these rights, and where it starts; or None.

        It is the caller's from now on.
        """
        key = (frames.serial, start, span, prot)
        with self._lock:
            if self._gone:
                self._take_note()
            found = key if key in self._windows else self._larger(key)
            if found is None:
                self._misses += 1
                taken = None
            else:
                self._hits += 1
                taken = self._remove(found), found[1]
        if self._gone:
            self._settle()
        return taken

    def _larger(self, key: Key) -> Key | None:
        serial, start, span, prot = key
        for other in self._of.get(serial, ()):
            if other[3] == prot and other[1] <= start and start + span <= other[1] + other[2]:
                return other
        return None

    def keep(self, mirror: CrossProcessMapping, frames: SharedFrames) -> bool:
        """Keeps the window of a mirror that is being dropped, which is dead then. False: it must be unmapped.

        BufferError: a view of it lives.
        """
        span = mirror._span
        mapping = mirror.mapping
        if span > self.budget or mapping.released or not mirror.alive or not self._lock.acquire(blocking=False):
            return False
        try:
            start = mapping.phys_offset + mirror.offset - (mirror.address - mirror._base)
            key = (frames.serial, start, span, mirror._prot)
            if key in self._windows:  # two mirrors of one range: one window is enough
                return False
            window = KeptWindow._take_over(mirror, 0, span)
            self._kernel.disown(window._base)
            frames.keepers.add(self)
            self._windows[key] = window
            self._of.setdefault(frames.serial, set()).add(key)
            self._bytes += span
            while self._bytes > self.budget:
                self._evict(next(iter(self._windows)))
        finally:
            self._lock.release()
            self._settle()
        return True

    def forget(self, serial: int) -> None:
        """Unmaps every window of these frames. From anywhere: at the latest before the next one is taken."""
        self._gone.append(serial)
        self._settle()

    def clear(self) -> bool:
        """Unmaps all of them; whether there were any."""
        with self._lock:
            had = bool(self._windows)
            for key in list(self._windows):
                self._evict(key)
        self._settle()
        return had

    def counts(self) -> KeptCounts:
        """What has happened so far, and what is kept now."""
        return KeptCounts(self._hits, self._misses, self._evictions, len(self._windows), self._bytes)

    def windows(self) -> list[tuple[Key, KeptWindow]]:
        """What is kept now, the one kept longest first."""
        return list(self._windows.items())

    def _settle(self) -> None:
        while self._gone and self._lock.acquire(blocking=False):
            try:
                self._take_note()
            finally:
                self._lock.release()

    def _take_note(self) -> None:
        while self._gone:
            for key in list(self._of.get(self._gone.popleft(), ())):
                self._evict(key)

    def _evict(self, key: Key) -> None:
        window = self._remove(key)
        self._evictions += 1
        base = window._base
        with contextlib.suppress(OSError):  # at the limit of mappings: its collection tries once more
            window._unmap()
        del window
        self._kernel.forget(base)

    def _remove(self, key: Key) -> KeptWindow:
        window = self._windows.pop(key)
        self._bytes -= key[2]
        keys = self._of[key[0]]
        keys.discard(key)
        if not keys:
            del self._of[key[0]]
        return window
