"""`ProcessMemory`: the books of one process's UserLand. It maps nothing itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import SupportsIndex

from realmap.errors import (
    AccessDenied,
    InvalidAddress,
    InvalidMemState,
    InvalidSize,
    LimitReached,
    VirtualMemoryExhaustion,
)
from realmap.memory.bookkeeping import Bookkeeping, Space
from realmap.memory.cross_process import CrossProcessMapping, Part, mirror_parts
from realmap.memory.frames import FrameAllocator, OwnedFrames, SharedFrames, whole_pages
from realmap.memory.kernel_memory import KernelMemory
from realmap.memory.lands import HEAP_SHARE, OWN_LAND, USER_LAND
from realmap.memory.mapping import Frames, Lasting, Mapping
from realmap.memory.stock import Name, Parked, Stock
from realmap.pages import HUGE_SIZE, address_of, align_down, page_range, usize
from realmap.rights import MappingAccessRights, MemoryState, MemoryType, k_rw, rights_of, type_of, u_rw

_ALLOCATE = object()
NO_RIGHTS = MappingAccessRights(0)


#: How often a process may use a window, and park it, while that is to be given up.
RETIRING = 1000


def walk(
    mapping_at: Callable[[int], Mapping | None], address: int, length: SupportsIndex, most: int | None
) -> list[Part]:
    """`ProcessMemory.parts`, of whatever says which mapping an address falls in."""
    at, size = address, usize(length, "length")
    if not size:
        raise InvalidSize(0, why="a buffer of no bytes")
    if at + size > 1 << 64:
        raise InvalidSize(size, why=f"address ({at:#x}) + length overflows 64 bits")
    found: list[Part] = []
    while size:
        mapping = mapping_at(at)
        if mapping is None:
            raise InvalidAddress(
                at, why="nothing is mapped there" if not found else "the buffer runs into a hole there"
            )
        if len(found) == most:
            raise LimitReached("buffers", most, why=f"the buffers of a call may lie in {most} mappings each")
        offset = at - mapping.address
        inside = min(size, mapping.length - offset)
        found.append((mapping, offset, inside))
        at, size = at + inside, size - inside
    return found


class ProcessMemory:
    """An ordered tree of mappings; holes are not stored. Not safe for threads by itself.

    A mapping in the books is never split and never overlaps another. Addresses and lengths in bytes.
    """

    def __init__(
        self,
        start: SupportsIndex = USER_LAND.start,
        length: SupportsIndex = USER_LAND.length,
        *,
        allocator: FrameAllocator | None = None,
        owner: str = "",
        stock: int = 0,
    ) -> None:
        """Books for [start, start + length), whole pages inside of UserLand; its upper quarter is the heap's,
        as far as LentLand does not begin there.

        `allocator` gives the frames that are not passed in; `owner` names the process in words. `stock`: bytes of
        parked windows that are kept.
        InvalidAddress, InvalidSize: the range is no part of UserLand.
        """
        self.land = USER_LAND.part(start, length)
        self.start, self.length = self.land.start, self.land.length
        self.owner = owner
        self.allocator = allocator if allocator is not None else FrameAllocator()
        self.heap_start = align_down(self.land.end - self.length // HEAP_SHARE)
        #: What its process has parked, which has no place for anything else.
        self.stock = Stock(stock, self.allocator._reserved // 2)
        self._space: Space[Mapping] = Space(self.start, self.land.end, search_below=self.heap_start)
        self._space.besides = self.stock.overlap
        self._heap: Mapping | None = None
        #: told(mapping, comes): told of every mapping that comes or goes; None while nobody listens.
        self.told: Callable[[Mapping, bool], None] | None = None
        #: named(window, frames, name): told of each name that its process has given to what it had parked.
        self.named: Callable[[Parked, SharedFrames, Name], None] | None = None

    def __len__(self) -> int:
        return len(self._tree())

    def __iter__(self) -> Iterator[Mapping]:
        return iter(self._tree())

    # ---- making mappings --------------------------------------------------------------------

    def create_regular_mapping(
        self,
        address: SupportsIndex,
        length: SupportsIndex,
        type: MemoryType,
        rights: MappingAccessRights,
        *,
        frames: Frames | object = _ALLOCATE,
    ) -> Mapping:
        """Enters a mapping of `length` bytes at `address`, from the first byte of `frames` on.

        Without `frames` it gets frames of its own, as its type wants them. InvalidAddress: unaligned,
        outside of UserLand, or it overlaps anything, also a mapping that covers it from below.
        InvalidSize, WrongMappingFramesForType, InvalidRights: as `Mapping`. PhysicalMemoryExhaustion:
        there are no frames.
        """
        start, size = self._vacant(address, length)
        kind = type_of(type)
        if frames is _ALLOCATE:
            rights_of(rights)  # before anything is taken
            if kind.is_counted:
                frames = self.allocator.allocate(size)
            else:
                frames = OwnedFrames(size) if kind.has_frames else None
        return self._enter(start, frames, 0, size, kind, rights)

    def map_partial_shared_mapping(
        self,
        frames: SharedFrames,
        address: SupportsIndex,
        phys_offset: SupportsIndex,
        length: SupportsIndex,
        type: MemoryType,
        rights: MappingAccessRights,
    ) -> Mapping:
        """Enters a window onto frames that others may share: `length` bytes from `phys_offset` of them on.

        Errors as `create_regular_mapping`; InvalidAddress: phys_offset lies beyond the frames.
        """
        start, size = self._vacant(address, length)
        return self._enter(start, frames, phys_offset, size, type, rights)

    def guard(self, address: SupportsIndex, length: SupportsIndex, type: MemoryType = MemoryType.RESERVED) -> Mapping:
        """Keeps a range free of mappings: a mapping without frames and without rights.

        Errors as `create_regular_mapping`; WrongMappingFramesForType: a type that has frames.
        """
        start, size = self._vacant(address, length)
        return self._enter(start, None, 0, size, type, NO_RIGHTS)

    def enter_anywhere(
        self,
        frames: Frames,
        length: int,
        type: MemoryType,
        rights: MappingAccessRights,
        alignment: int = 1,
        offset: int = 0,
    ) -> Mapping:
        """Enters a mapping of `length` bytes of `frames`, from `offset` on, where there is space.

        Errors as `find_available_space` and `Mapping`.
        """
        return self._enter(self.find_available_space(length, alignment), frames, offset, length, type, rights)

    def _tree(self) -> Bookkeeping[Mapping]:
        """The mappings by address, with what its process uses again of its stock."""
        if self.stock.count and (seen := self.stock.see()):
            self._see(seen)
        return self._space.tree

    def look_for(self, name: str) -> None:
        """Has `named` told of what its process calls so."""
        if self.stock.count and (seen := self.stock.see(name.encode(errors="replace"))):
            self._see(seen)

    def _see(self, seen: int) -> None:
        for parked, frames, is_mapped, name in self.stock.take(seen):
            if is_mapped:
                kind, rights = parked.type, parked.rights
                mapping = self._enter(parked.address, frames, parked.offset, parked.length, kind, rights)
                mapping.serial, mapping.handle = parked.serial, parked.handle
            if name is not None and self.named is not None:
                self.named(parked, frames, name)
            frames.let_go(parked)
            frames.recycles = parked.handle is None  # as before: nobody else has had them

    def retire(self, handle: Lasting) -> None:
        """What was attached by a handle, and is parked, is not used again; what is used already is a mapping."""
        for place in self.stock.places_of(handle):
            for tries in range(RETIRING):
                self._tree()
                if self.stock.retire(place, force=tries == RETIRING - 1):
                    break

    def empty_stock(self) -> None:
        """Its process has unmapped what it had parked; what it uses again it has."""
        self.stock.withdraw()  # first: what it has taken again by then stays taken
        self._tree()
        self.stock.clear()

    def _vacant(self, address: SupportsIndex, length: SupportsIndex) -> tuple[int, int]:
        start, size = page_range(address, length)
        if not self.land.holds(start, size):
            raise InvalidAddress(start, why=f"{size} bytes there do not lie in UserLand")
        if not self.is_vacant(start, size):
            other = self._tree().overlap(start, start + size)
            raise InvalidAddress(start, why=f"overlaps {other!r}" if other else "its process has parked a window there")
        return start, size

    def _enter(
        self,
        address: int,
        frames: Frames | object,
        offset: SupportsIndex,
        length: int,
        type: MemoryType,
        rights: MappingAccessRights,
    ) -> Mapping:
        if isinstance(frames, SharedFrames) and frames.refcount:  # it is not the first to have them
            frames.recycles = False
        mapping = Mapping(address, frames, offset, length, type, rights, owner=self.owner)  # type: ignore[arg-type]
        self._space.tree.add(address, mapping.end, mapping)
        if self.told is not None:
            self.told(mapping, True)
        return mapping

    def _remove(self, mapping: Mapping) -> None:
        self._space.tree.remove(mapping.address)
        if self.told is not None:
            self.told(mapping, False)

    def unmap(self, address: SupportsIndex, length: SupportsIndex) -> Mapping:
        """Takes the mapping [address, address + length) out of the books, and returns it: its release is the caller's.

        InvalidAddress: no mapping starts there. InvalidSize: it has another length; mappings are never split.
        """
        start, size = address_of(address), usize(length, "length")
        mapping = self.starting_at(start)
        if mapping.length != size:
            raise InvalidSize(size, why=f"the mapping there has {mapping.length} bytes, and is never split")
        self._remove(mapping)
        if mapping is self._heap:
            self._heap = None
        return mapping

    def move(self, mapping: Mapping, taken: tuple[int, int]) -> Mapping:
        """Moves a mapping whose place turned out to be `taken` (start, end) by somebody else in its process.

        VirtualMemoryExhaustion: there is no other place; the mapping is out of the books then, and released.
        """
        self._remove(mapping)
        # Where nothing is in the way any more by the time its process looked, its own place is avoided.
        in_the_way = max(taken[0], mapping.address) < min(taken[1], mapping.end)
        self._space.note_obstacle(*(taken if in_the_way else (mapping.address, mapping.end)))
        try:
            frames = mapping.frames
            huge, recycles = (frames.huge, frames.recycles) if isinstance(frames, SharedFrames) else (0, False)
            address = self.find_available_space(mapping.length, HUGE_SIZE if huge else 1)
            moved = self._enter(address, frames, mapping.phys_offset, mapping.length, mapping.type, mapping.rights)
            moved.serial, moved.handle = mapping.serial, mapping.handle
            if isinstance(frames, SharedFrames):
                frames.recycles = recycles  # they are whose they were
            return moved
        finally:
            mapping.release()

    def resize_heap(self, size: SupportsIndex) -> int:
        """Sets the size of the heap, in bytes (whole pages); its address, which never changes. It only grows: a brk.

        0 on a heap that is not there yet just tells the address. InvalidSize: unaligned, or smaller
        than it is. VirtualMemoryExhaustion: beyond the heap's part of UserLand, or into another
        mapping. PhysicalMemoryExhaustion: no frames; the heap stays as it was.
        """
        old = self._heap
        before = old.length if old is not None else 0
        new = usize(size, "size")
        if new == before:
            return self.heap_start
        new = whole_pages(new, "size")
        if new < before:
            raise InvalidSize(new, why=f"the heap has {before} bytes, and only grows")
        other = self._tree().overlap(self.heap_start + before, self.heap_start + new)
        if new > min(self.land.end, OWN_LAND.end) - self.heap_start or other is not None:
            raise VirtualMemoryExhaustion(
                new, why=f"{other!r} is in the way" if other is not None else "the heap's part of UserLand is smaller"
            )
        if old is None:
            frames = self.allocator.allocate(new)
        else:
            assert isinstance(old.frames, SharedFrames)
            frames = old.frames
            frames.append(*self.allocator.make_segments(new - before, new - before))
            self._remove(old)
        # The longer mapping takes its reference before the shorter one gives its own up.
        self._heap = self._enter(self.heap_start, frames, 0, new, MemoryType.HEAP, u_rw)
        if old is not None:
            old.release()
        return self.heap_start

    # ---- asking -----------------------------------------------------------------------------

    def find_available_space(self, length: SupportsIndex, alignment: int = 1) -> int:
        """An address where `length` bytes (whole pages) are free; searched from where the last search ended.

        `alignment`: the address is a multiple of it (a power of two; a whole page in any case).
        InvalidSize: no whole pages. VirtualMemoryExhaustion: no hole is that long.
        """
        size = whole_pages(length, "length")
        found = self._space.find(size, 0, alignment)
        if found is None and self._space.drop_obstacles():
            found = self._space.find(size, 0, alignment)
        if found is None:
            raise VirtualMemoryExhaustion(size, why=f"no hole of {size} bytes in UserLand ({len(self)} mappings)")
        return found

    def is_vacant(self, start: int, length: int) -> bool:
        """Whether neither a mapping nor a parked window has a byte of [start, start + length)."""
        end = start + length
        return self._tree().overlap(start, end) is None and self.stock.overlap(start, end) is None

    def mapping_at(self, address: int) -> Mapping | None:
        return (self._tree() if self.stock.count else self._space.tree).at(address)

    def starting_at(self, address: int) -> Mapping:
        """The mapping that starts there. InvalidAddress: none does."""
        mapping = self._tree().at(address)
        if mapping is None or mapping.address != address:
            raise InvalidAddress(address, why="no mapping starts there")
        return mapping

    def query_memory(self, address: SupportsIndex) -> Mapping:
        """The mapping that `address` falls in; in a hole, the whole hole as a mapping of type UNMAPPED.

        InvalidAddress: outside of UserLand.
        """
        at, tree = self._inside(address), self._tree()
        mapping = tree.at(at)
        if mapping is not None:
            return mapping
        start, end = tree.hole(at)
        return Mapping(start, None, 0, end - start, MemoryType.UNMAPPED, NO_RIGHTS, owner=self.owner)

    def check_range(
        self,
        address: SupportsIndex,
        length: SupportsIndex,
        *,
        state_mask: int = 0,
        state_expected: int = 0,
        rights_mask: int = 0,
        rights_expected: int = 0,
    ) -> tuple[MemoryState, MappingAccessRights]:
        """Checks that every byte of the range has one state and the same rights, and those expected; both of them.

        Expected means: `state & state_mask == state_expected`, and the same of the rights. InvalidSize:
        zero, or it overflows. InvalidAddress: outside of UserLand. InvalidMemState: the mapping at its
        address differs from the first one, or from the state expected. AccessDenied: from the rights.
        """
        start, size = self._inside(address), usize(length, "length")
        if not size or not self.land.holds(start, size):
            raise InvalidSize(size, why="a range to check has at least one byte, and lies in UserLand")
        first = self.query_memory(start)
        at = first
        while True:
            if at.state != first.state or at.rights != first.rights:
                raise InvalidMemState(at.address, at.type, why=f"not as the range begins ({first.type} {first.rights})")
            if at.state & state_mask != state_expected:
                raise InvalidMemState(max(at.address, start), at.type, why="not in the state expected")
            if at.rights & rights_mask != rights_expected:
                raise AccessDenied(MappingAccessRights(rights_expected), at.rights, max(at.address, start))
            if at.end >= start + size:
                return first.state, first.rights
            at = self.query_memory(at.end)

    def _inside(self, address: SupportsIndex) -> int:
        at = address_of(address)
        if not self.land.holds(at):
            raise InvalidAddress(at, why=f"outside of UserLand [{self.land.start:#x}, {self.land.end:#x})")
        return at

    def parts(self, address: SupportsIndex, length: SupportsIndex, most: int | None = None) -> list[Part]:
        """The mappings that [address, address + length) goes through: (mapping, offset in it, length) each, in bytes.

        InvalidAddress: outside of UserLand, nothing is mapped at `address`, or the range runs into a
        hole (its first byte is named). InvalidSize: zero, negative, or it overflows. LimitReached: more than `most`.
        """
        return walk(self.mapping_at, self._inside(address), length, most)

    def mirror_mapping(
        self,
        address: SupportsIndex,
        length: SupportsIndex,
        *,
        kernel: KernelMemory,
        rights: MappingAccessRights = k_rw,
    ) -> CrossProcessMapping:
        """Mirrors `length` bytes at `address`, on through the mappings that follow without a gap.

        Errors as `parts` and `CrossProcessMapping.mirror_mapping`; InvalidMemState names the mapping
        whose frames are not Shared.
        """
        if address.__class__ is int and length.__class__ is int:
            mapping = self.mapping_at(address)
            if mapping is not None and 0 < length <= mapping.length - (offset := address - mapping.address):
                # In one mapping: the common case.
                return mirror_parts([(mapping, offset, length)], kernel=kernel, rights=rights)
        return mirror_parts(self.parts(address, length), kernel=kernel, rights=rights)

    def release_all(self) -> None:
        """Takes every mapping out of the books and releases it: the process has ended."""
        self.stock.clear()
        for mapping in list(self):
            self._remove(mapping)
            mapping.release()
        self._heap = None

    def __repr__(self) -> str:
        return f"<ProcessMemory of {self.owner or 'nobody'}: {len(self)} mappings>"
