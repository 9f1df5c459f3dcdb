"""`KernelMemory`: KernelLand of this process. The only one that maps anything for the kernel.

The books of mirrors have to be cheap (a whole mirror costs about 4 µs), so a mirror that comes and
goes only touches two dicts: space is taken from the current hole by moving a cursor. The ordered
tree learns of the changes in one go when that hole is used up, which is when it is needed.

    reserve ──▶ map (Linux) ──▶ adopt ──▶ … use … ──▶ unmap (Linux) ──▶ forget
       │            └─ EEXIST: an obstacle is noted, and another place tried
       └─ nothing fits: obstacles are forgotten and tried once more, then VirtualMemoryExhaustion

`reserve`, `adopt`, `forget` may be called from any thread; `forget` also from a destructor.
"""

from __future__ import annotations

import errno
import weakref
from collections import deque
from collections.abc import Callable
from threading import Lock
from typing import NamedTuple, SupportsIndex, TypeVar

from realmap._host import Window, unmap_all
from realmap.errors import InvalidAddress, InvalidSize, KernelError, VirtualMemoryExhaustion
from realmap.host import forks, procfs, translate
from realmap.memory.bookkeeping import Space
from realmap.memory.kept import KeptWindows
from realmap.memory.lands import GUARD, KERNEL_LAND, require_address_space
from realmap.pages import HUGE_SIZE, PAGE_MASK, demand, usize

W = TypeVar("W", bound=Window)


class AddressState(NamedTuple):
    """What is at an address of KernelLand: `mirror`, or None in a hole; [start, end) is its range in whole pages."""

    start: int
    end: int
    mirror: Window | None


class KernelMemory:
    """A range of KernelLand in this process: finds space in it, maps frames there, and knows what is where."""

    def __init__(
        self,
        start: SupportsIndex = KERNEL_LAND.start,
        length: SupportsIndex = KERNEL_LAND.length,
        *,
        lazy_unmap: SupportsIndex = 0,
    ) -> None:
        """`start` and `length` in bytes, whole pages inside of KernelLand; `lazy_unmap`: bytes of dropped
        mirrors that are kept mapped for their next use.

        InvalidAddress, InvalidSize: they are not, or lazy_unmap is negative. VirtualMemoryExhaustion: the
        machine's address space is too small for the lands.
        """
        require_address_space()
        self.land = KERNEL_LAND.part(start, length)
        self.start, self.length = self.land.start, self.land.length
        self._lock = Lock()
        self._space: Space[int] = Space(self.start, self.land.end, gap=GUARD)
        self._cursor, self._hole_end = self.start, self.land.end
        #: Reserved since the tree last learned of it: start -> end.
        self._fresh: dict[int, int] = {}
        #: Given back, but still in the tree.
        self._gone: deque[int] = deque()
        self._live: dict[int, weakref.ref[Window]] = {}
        #: None where nothing is kept.
        self.kept = KeptWindows(lazy_unmap, self) if usize(lazy_unmap, "lazy_unmap") else None
        forks.lose_in_child(self)

    # ---- space ------------------------------------------------------------------------------

    def find_virtual_space(self, length: SupportsIndex) -> int:
        """An address where `length` bytes (whole pages) are free. The next search starts behind it; nothing is taken.

        InvalidSize: no whole pages, or zero. VirtualMemoryExhaustion: no hole is that long.
        """
        size = usize(length, "length")
        if not size or size & PAGE_MASK:
            raise InvalidSize(size, why="space is found in whole pages, at least one")
        try:
            address = self.reserve(size)
        except VirtualMemoryExhaustion:
            if not self._space.drop_obstacles():
                raise
            address = self.reserve(size)
        self.forget(address)
        return address

    def reserve(self, span: int, residue: int = 0) -> int:
        """Takes `span` bytes (whole pages) of space; with 2 MiB or more, congruent to `residue` modulo 2 MiB.

        VirtualMemoryExhaustion: nothing fits (obstacles that were noted are passed over).
        """
        with self._lock:
            address = self._cursor
            if span >= HUGE_SIZE:
                address += (residue - address) & (HUGE_SIZE - 1)
            end = address + span
            if end > self._hole_end:
                address = self._search(span, residue)
                end = address + span
            self._cursor = end + GUARD
            self._fresh[address] = end
            return address

    def _search(self, span: int, residue: int) -> int:
        self._learn()
        self._space.cursor = self._cursor
        modulus = HUGE_SIZE if span >= HUGE_SIZE else 1
        address = self._space.find(span, residue & (modulus - 1), modulus)
        if address is None:
            raise VirtualMemoryExhaustion(
                span,
                why=f"no hole of {span} bytes in {self.length} bytes of KernelLand ({len(self._live)} mirrors live)",
            )
        self._hole_end = self._space.hole_end(address)
        return address

    def _learn(self) -> None:
        """Brings the tree up to date. What `forget` changes meanwhile, the next time."""
        while self._gone:
            self._space.tree.remove(self._gone.popleft())
        for start in list(self._fresh):
            end = self._fresh.pop(start, None)
            if end is not None:
                self._space.tree.add(start, end, start)

    def adopt(self, address: int, mirror: Window) -> None:
        """Enters what was mapped at a reserved address."""
        self._live[address] = weakref.ref(mirror)

    def forget(self, address: int) -> None:
        """Gives back what was reserved at `address`: it is not mapped, or no longer."""
        self._live.pop(address, None)
        if self._fresh.pop(address, None) is None:
            self._gone.append(address)

    def disown(self, address: int) -> None:
        """The window at `address` is no mirror for now; its place stays taken."""
        self._live.pop(address, None)

    def release(self, address: int, mirror: Window) -> None:
        """Gives back what `mirror` had at `address`. A second time, when it may be another's: nothing."""
        known = self._live.get(address)
        if known is not None and (known() is mirror or known() is None):
            self.forget(address)

    # ---- mapping ----------------------------------------------------------------------------

    def place(self, make: Callable[[int], W], span: int, residue: int, prot: int) -> W:
        """Maps `span` bytes by `make(address)` where there is space: the long way, after the short one failed.

        VirtualMemoryExhaustion: no space, or Linux's limit of mappings; AccessDenied: the frames do
        not allow `prot`. Nothing stays mapped or reserved then.
        """
        once_more = True
        while True:
            try:
                address = self.reserve(span, residue)
            except VirtualMemoryExhaustion:
                if self.kept is not None and self.kept.clear():
                    continue
                with self._lock:
                    if not (once_more and self._space.drop_obstacles()):
                        raise
                once_more = False
                continue
            try:
                made = make(address)
            except OSError as error:
                self.forget(address)
                if error.errno == errno.ENOMEM and self.kept is not None and self.kept.clear():
                    continue
                if error.errno != errno.EEXIST or isinstance(error, KernelError):
                    raise translate.window_error(error, address, span, prot) from None
                self._note(address, span)
            except BaseException:
                self.forget(address)
                raise
            else:
                self.adopt(address, made)
                return made

    def _note(self, address: int, span: int) -> None:
        start, end = procfs.obstacle(address, span)
        with self._lock:
            self._learn()
            if start < end and self._space.tree.overlap(start, end) is None:
                self._space.note_obstacle(start, end)
            else:  # gone by now, or it is a mirror that another thread has just mapped
                self._space.note_obstacle(address, address + span)
            self._hole_end = self._cursor  # the hole is not what it was: search anew

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
        demand(self.land.holds(start, size), f"[{start:#x}, {start + size:#x}) is not in KernelLand {self.land}")
        return start, size

    def _mirror_at(self, start: int) -> Window | None:
        known = self._live.get(start)
        return known() if known is not None else None

    def mapping_state(self, address: SupportsIndex) -> AddressState:
        """What is at `address`. Panics outside of KernelLand."""
        at, _ = self._inside(address, 1)
        with self._lock:
            self._learn()
            start = self._space.tree.at(at)
            if start is None:
                return AddressState(*self._space.tree.hole(at), None)
            after = self._space.tree.following(at + 1)
        mirror = self._mirror_at(start)
        # Without a mirror it is reserved this very moment, and not mapped yet.
        end = start + mirror._span if mirror is not None else after[0] if after else self.land.end
        return AddressState(start, end, mirror)

    def mirrors(self) -> list[Window]:
        """Every live mirror, in order of address."""
        found = (self._mirror_at(start) for start in sorted(self._live))
        return [mirror for mirror in found if mirror is not None]

    @property
    def live(self) -> int:
        """How many mirrors live."""
        return len(self._live)

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
        return f"<KernelMemory [{self.start:#x}, {self.land.end:#x}), {self.live} mirrors>"

    def lose(self) -> None:
        """In a forked child: the child has no part in what the kernel had mapped."""
        unmap_all(self.start, self.length)
        budget = self.kept.budget if self.kept is not None else 0
        self.__init__(self.start, self.length, lazy_unmap=budget)  # type: ignore[misc]
