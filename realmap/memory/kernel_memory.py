"""`KernelMemory`: KernelLand of this process. The only one that maps anything for the kernel.

The books of mirrors have to be cheap (a whole mirror costs about 4 µs), so the common case is the C
core's (`Land`, `Mirror`): a mirror that comes and goes takes its space from the current hole by moving
a cursor, and the ordered tree here learns of it when that hole is used up, which is when it is needed.

    Mirror._open ──▶ mirror, in the current hole, or by a kept window
        └─ neither: `place` ──▶ the tree finds another hole
                      ├─ EEXIST: an obstacle is noted, and another place tried
                      ├─ nothing fits: kept windows go, obstacles are forgotten and tried once more,
                      │  then VirtualMemoryExhaustion
                      └─ too many maps: kept windows go, then VirtualMemoryExhaustion

Kept windows (`lazy_unmap`): a dropped mirror stays mapped for its next use, within a budget of bytes.

    mirror dropped ──▶ kept ──▶ the same range wanted again: the mirror's, without a system call
                        ├─ the budget is exceeded: the one that was kept longest goes
                        ├─ its mapping is released, or its frames go: it goes with them
                        └─ no space: all of them go; too many maps: the ones kept longest

A kept window is no reference: it never keeps frames alive. It serves one mirror at a time (it is taken out while one
uses it), and is found by frames, range and rights; a larger one serves a smaller range inside it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, SupportsIndex, TypeVar

from realmap._core import Land, Lock, Mirror
from realmap.errors import InvalidAddress, InvalidSize, KernelError, VirtualMemoryExhaustion
from realmap.host import forks, procfs, translate
from realmap.memory.bookkeeping import Space
from realmap.memory.lands import GUARD, KERNEL_LAND, require_address_space
from realmap.pages import HUGE_SIZE, PAGE_MASK, PAGE_SIZE, demand, usize

M = TypeVar("M", bound=Mirror)
R = TypeVar("R")


class AddressState(NamedTuple):
    """What is at an address of KernelLand: `mirror`, or None in a hole; [start, end) is its range in whole pages."""

    start: int
    end: int
    mirror: Mirror | None


class KeptWindow(NamedTuple):
    """A mapping that no mirror uses: `span` bytes at `base` that show the frames `serial` from byte `start` on."""

    base: int
    span: int
    serial: int
    start: int
    prot: int


class KeptCounts(NamedTuple):
    """How often a mirror was served by a kept window (`hits`) or not, how many went, and what is kept now."""

    hits: int
    misses: int
    evictions: int
    windows: int
    bytes: int


class KernelMemory(Land):
    """A range of KernelLand in this process: finds space in it, maps frames there, and knows what is where."""

    #: What it is a part of.
    whole = KERNEL_LAND
    #: What the parts of a buffer are mirrored by in it; None: `CrossProcessMapping`.
    mirror_type: ClassVar[Any] = None

    def __init__(
        self,
        start: SupportsIndex | None = None,
        length: SupportsIndex | None = None,
        *,
        lazy_unmap: SupportsIndex = 0,
    ) -> None:
        """`start` and `length` in bytes, whole pages inside of KernelLand; by default those of all of it. `lazy_unmap`:
        bytes of dropped mirrors that are kept mapped for their next use.

        InvalidAddress, InvalidSize: they are not, or lazy_unmap is negative. VirtualMemoryExhaustion: the
        machine's address space is too small for the lands.
        """
        require_address_space()
        whole = self.whole
        self.land = whole.part(whole.start if start is None else start, whole.length if length is None else length)
        self.start, self.length = self.land.start, self.land.length
        #: What was copied to and from users without mapping: times, bytes.
        self.copies_in = self.bytes_in = self.copies_out = self.bytes_out = 0
        #: Of the tree, and of whoever maps by it. (realmap/host/signals.py has the rule.)
        self._lock = Lock()
        #: The tree, while nobody is at work on it; see `_ask`.
        self._at_rest: dict[str, tuple[int, Space[int]]] = {}
        # A sixteenth of what Linux allows is left for all else: zeros in place of what was truncated, heaps, threads.
        limit = procfs.map_limit()
        self._prepare(self.start, self.land.end, usize(lazy_unmap, "lazy_unmap"), limit - limit // 16)
        forks.lose_in_child(self)

    # ---- space ------------------------------------------------------------------------------

    def find_virtual_space(self, length: SupportsIndex) -> int:
        """An address where `length` bytes (whole pages) are free. The next search starts behind it; nothing is taken.

        InvalidSize: no whole pages, or zero. VirtualMemoryExhaustion: no hole is that long.
        """
        size = usize(length, "length")
        if not size or size & PAGE_MASK:
            raise InvalidSize(size, why="space is found in whole pages, at least one")
        with self._lock:
            try:
                return self._find(size, 0)
            except VirtualMemoryExhaustion:
                if not self._ask(Space.drop_obstacles):
                    raise
                return self._find(size, 0)

    def _find(self, span: int, residue: int) -> int:
        """A place for `span` bytes (whole pages); with 2 MiB or more, congruent to `residue` modulo 2 MiB.

        VirtualMemoryExhaustion: nothing fits (obstacles that were noted are passed over). Under the lock.
        """
        modulus = HUGE_SIZE if span >= HUGE_SIZE else 1
        while True:
            address = self._reserve(span, residue)
            if address is not None:
                return address
            seen = self._cursor

            def search(space: Space[int], seen: int = seen) -> tuple[int, int] | None:
                space.cursor = seen
                found = space.find(span, residue & (modulus - 1), modulus)
                return None if found is None else (found, space.hole_end(found))

            hole = self._ask(search)
            if hole is None:
                raise VirtualMemoryExhaustion(
                    span,
                    why=f"no hole of {span} bytes in the {self.length} of {self.land.name} ({self.live} mirrors live)",
                )
            if self._move(seen, hole[0] + span + GUARD, hole[1]):  # else a signal handler has taken space meanwhile
                return hole[0]

    def _ask(self, question: Callable[[Space[int]], R]) -> R:
        """What `question` says of the tree, once that is up to date.

        The tree is out of reach while somebody is at work on it. So a signal handler that comes right then, and needs
        it, finds none, and makes one anew of what the core knows (without obstacles: it will run into them); and where
        an exception ends the work, the next one does. Who finds that somebody has had a later edition of the news asks
        once more.
        """
        with self._lock:
            while True:
                edition, space = self._at_rest.pop("tree", (0, None))
                edition, gone, taken = self._news(edition)
                if space is None or gone is None:
                    space, gone = Space(self.start, self.land.end, gap=GUARD), []
                for start in gone:
                    space.tree.remove(start)
                for start, end in sorted(taken):
                    space.tree.add(start, end, start)
                for anchor in self._anchors():  # pages that keep page tables in place (_core/space.c)
                    space.note_obstacle(anchor, anchor + PAGE_SIZE)
                answer = question(space)
                if self._edition == edition:
                    self._at_rest["tree"] = edition, space
                    return answer

    # ---- mapping ----------------------------------------------------------------------------

    def place(self, make: Callable[[int], M], span: int, residue: int, prot: int, maps: int) -> M:
        """Maps `span` bytes by `make(address)`, in so many maps, where there is space: the long way, after the short
        one failed.

        VirtualMemoryExhaustion: no space, or too near to Linux's limit of mappings; AccessDenied: the frames do
        not allow `prot`. Nothing stays mapped or reserved then.
        """
        once_more = True
        while True:
            with self._lock:  # until it is mapped: nobody else may find that place
                if not self._make_room(maps):
                    raise VirtualMemoryExhaustion(
                        span,
                        why=f"mirrors take {self._maps} maps of the {self._most} that {self.land.name} may have, and "
                        f"this one wants {maps}: drop some first, or raise Linux's limit (sysctl vm.max_map_count)",
                    )
                try:
                    address = self._find(span, residue)
                except VirtualMemoryExhaustion:
                    if self._clear_kept():
                        continue
                    if not (once_more and self._ask(Space.drop_obstacles)):
                        raise
                    once_more = False
                    continue
                try:
                    return make(address)
                except OSError as error:
                    if error.errno == errno.ENOMEM and self._clear_kept():
                        continue
                    if error.errno != errno.EEXIST or isinstance(error, KernelError):
                        raise translate.window_error(error, address, span, prot) from None
                    self._note(address, span)

    def _note(self, address: int, span: int) -> None:
        start, end = procfs.obstacle(address, span)

        def note(space: Space[int]) -> None:
            if start < end and space.tree.overlap(start, end) is None:
                space.note_obstacle(start, end)
            else:  # gone by now, not to be seen, or a mirror that another thread or a signal handler has just mapped
                space.note_obstacle(address, address + span)

        self._ask(note)
        at = self._cursor
        self._move(at, at, at)  # the hole is not what it was: search anew

    def unmap_no_dealloc(self, address: SupportsIndex, length: SupportsIndex) -> None:
        """Drops the mirror whose pages are [address, address + length). Its frames live on under their refcount.

        Panics outside of KernelLand. InvalidAddress: no mirror's pages start there. InvalidSize:
        they have another length. BufferError: a view of it lives.
        """
        start, size = self._inside(address, length)
        mirror = self._mirror_at(start)
        if mirror is None:
            raise InvalidAddress(start, why="no mirror starts there")
        if size != mirror._span:
            raise InvalidSize(size, why=f"the mirror there has {mirror._span} bytes of pages")
        drop: Callable[[], None] = mirror.drop  # type: ignore[attr-defined]
        drop()

    # ---- what is where ----------------------------------------------------------------------

    def _inside(self, address: SupportsIndex, length: SupportsIndex) -> tuple[int, int]:
        start, size = usize(address, "address"), usize(length, "length")
        demand(self.land.holds(start, size), f"[{start:#x}, {start + size:#x}) is not in {self.land}")
        return start, size

    def mapping_state(self, address: SupportsIndex) -> AddressState:
        """What is at `address`. Panics outside of KernelLand."""
        at, _ = self._inside(address, 1)

        def look(space: Space[int]) -> tuple[int, int, bool]:
            start = space.tree.at(at)
            if start is None:
                return *space.tree.hole(at), False
            after = space.tree.following(at + 1)
            return start, after[0] if after else self.land.end, True

        start, end, taken = self._ask(look)
        mirror = self._mirror_at(start) if taken else None
        # Without a mirror it is a hole, a kept window, or mapped this very moment.
        return AddressState(start, end if mirror is None else start + mirror._span, mirror)

    def mirrors(self) -> list[Mirror]:
        """Every live mirror, in order of address."""
        return sorted(self._mirrors(), key=lambda mirror: mirror._base)

    def kept_windows(self) -> list[KeptWindow]:
        """Every kept window, the one kept longest first: none, where `lazy_unmap` is 0."""
        return [KeptWindow(*window) for window in self._kept()]

    def kept_counts(self) -> KeptCounts:
        return KeptCounts(self._hits, self._misses, self._evictions, len(self._kept()), self._kept_bytes)

    def dump_kernelland_state(self) -> str:
        """KernelLand as text, a line for each range: holes and mirrors, addresses and bytes."""
        lines, at = [], self.start
        for mirror in self.mirrors():
            if mirror._base > at:
                lines.append(f"[{at:#x}, {mirror._base:#x})  hole, {mirror._base - at} bytes")
            at = mirror._base + mirror._span
            lines.append(f"[{mirror._base:#x}, {at:#x})  {mirror!r}")
        if at < self.land.end:
            lines.append(f"[{at:#x}, {self.land.end:#x})  hole, {self.land.end - at} bytes")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} [{self.start:#x}, {self.land.end:#x}), {self.live} mirrors>"

    def _after_fork_in_child(self) -> None:
        """In a forked child: the child has no part in what the kernel had mapped."""
        self._lose()
        self.__init__(self.start, self.length, lazy_unmap=self._budget)  # type: ignore[misc]
