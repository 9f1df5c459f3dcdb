"""`ProcessMemory`: the books of one process's UserLand."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import PAGE, land_maps
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from realmap.errors import (
    AccessDenied,
    InvalidAddress,
    InvalidMemState,
    InvalidRights,
    InvalidSize,
    PhysicalMemoryExhaustion,
    VirtualMemoryExhaustion,
    WrongMappingFramesForType,
)
from realmap.memory import USER_LAND, FrameAllocator, KernelMemory, MemoryType, OwnedFrames, ProcessMemory
from realmap.rights import MemoryState, k_r, u_r, u_rw

AT = USER_LAND.start
HEAP = MemoryType.HEAP


@pytest.fixture
def memory() -> Iterator[ProcessMemory]:
    memory = ProcessMemory(length=64 * PAGE, allocator=FrameAllocator(64 * PAGE), owner="of a test")
    yield memory
    memory.release_all()
    assert memory.allocator.used == 0


def test_regular_mappings_get_frames_of_their_type(memory: ProcessMemory) -> None:
    heap = memory.create_regular_mapping(AT, 2 * PAGE, HEAP, u_rw)
    normal = memory.create_regular_mapping(AT + 2 * PAGE, PAGE, MemoryType.NORMAL, u_rw)
    reserved = memory.create_regular_mapping(AT + 4 * PAGE, PAGE, MemoryType.RESERVED, u_rw)
    assert heap.frames.refcount == 1  # type: ignore[union-attr]
    assert isinstance(normal.frames, OwnedFrames)
    assert reserved.frames is None
    assert list(memory) == [heap, normal, reserved]
    assert "of a test" in heap.frames.holders()[0]  # type: ignore[union-attr]
    with pytest.raises(WrongMappingFramesForType):
        memory.create_regular_mapping(AT + 8 * PAGE, PAGE, HEAP, u_rw, frames=None)


@pytest.mark.parametrize(("first", "pages"), [(3, 1), (4, 2), (2, 2), (2, 4), (0, 64), (3, 2), (4, 1)])
def test_overlapping_anything_is_refused(memory: ProcessMemory, first: int, pages: int) -> None:
    memory.create_regular_mapping(AT + 3 * PAGE, 2 * PAGE, HEAP, u_rw)
    before = memory.allocator.used
    with pytest.raises(InvalidAddress, match="overlaps") as caught:
        memory.create_regular_mapping(AT + first * PAGE, pages * PAGE, HEAP, u_rw)
    assert caught.value.address == AT + first * PAGE
    assert (memory.allocator.used, len(memory)) == (before, 1)


def test_a_mapping_that_covers_from_below_is_seen(memory: ProcessMemory) -> None:
    memory.create_regular_mapping(AT, 10 * PAGE, HEAP, u_rw)
    with pytest.raises(InvalidAddress):
        memory.guard(AT + 5 * PAGE, PAGE)
    memory.guard(AT + 10 * PAGE, PAGE)


@pytest.mark.parametrize(
    ("address", "length", "error"),
    [
        (AT + 1, PAGE, InvalidAddress),
        (AT, PAGE + 1, InvalidSize),
        (AT, 0, InvalidSize),
        (AT - PAGE, PAGE, InvalidAddress),
        (AT + 64 * PAGE, PAGE, InvalidAddress),
        (AT + 63 * PAGE, 2 * PAGE, InvalidAddress),
        (-PAGE, PAGE, InvalidAddress),
        (AT, -PAGE, InvalidSize),
        ((1 << 64) - PAGE, 2 * PAGE, InvalidAddress),
        ("x", PAGE, TypeError),
        (AT, 4096.0, TypeError),
    ],
)
def test_ranges_that_cannot_be_mapped(memory: ProcessMemory, address: Any, length: Any, error: type[Exception]) -> None:
    for make in (
        lambda: memory.create_regular_mapping(address, length, HEAP, u_rw),
        lambda: memory.guard(address, length),
        lambda: memory.map_partial_shared_mapping(FrameAllocator().allocate(PAGE), address, 0, length, HEAP, u_rw),
    ):
        with pytest.raises(error):
            make()
    assert (len(memory), memory.allocator.used) == (0, 0)


def test_nothing_is_taken_for_rights_that_are_none(memory: ProcessMemory) -> None:
    with pytest.raises(InvalidRights):
        memory.create_regular_mapping(AT, PAGE, HEAP, 99)  # type: ignore[arg-type]
    assert memory.allocator.used == 0


def test_partial_shared_mappings_share_frames(memory: ProcessMemory) -> None:
    frames = memory.allocator.allocate(4 * PAGE, PAGE)
    one = memory.map_partial_shared_mapping(frames, AT, PAGE, 2 * PAGE, HEAP, u_rw)
    two = memory.map_partial_shared_mapping(frames, AT + 8 * PAGE, 3 * PAGE, PAGE, MemoryType.SHARED_MEMORY, u_r)
    assert (frames.refcount, one.phys_offset, two.phys_offset) == (2, PAGE, 3 * PAGE)
    with pytest.raises(InvalidSize):
        memory.map_partial_shared_mapping(frames, AT + 16 * PAGE, 3 * PAGE, 2 * PAGE, HEAP, u_rw)
    with pytest.raises(InvalidAddress):
        memory.map_partial_shared_mapping(frames, AT + 16 * PAGE, 5 * PAGE, PAGE, HEAP, u_rw)
    with pytest.raises(InvalidAddress):
        memory.map_partial_shared_mapping(frames, AT + 16 * PAGE, 1, PAGE, HEAP, u_rw)
    memory.unmap(AT, 2 * PAGE).release()
    assert frames.refcount == 1


def test_unmap_never_splits(memory: ProcessMemory) -> None:
    mapping = memory.create_regular_mapping(AT, 4 * PAGE, HEAP, u_rw)
    for address in (AT + PAGE, AT + 4 * PAGE, AT - PAGE):
        with pytest.raises(InvalidAddress):
            memory.unmap(address, PAGE)
    for length in (PAGE, 3 * PAGE, 5 * PAGE, 0):
        with pytest.raises(InvalidSize):
            memory.unmap(AT, length)
    assert memory.unmap(AT, 4 * PAGE) is mapping
    assert not mapping.released, "its release is the caller's"
    mapping.release()
    with pytest.raises(InvalidAddress):
        memory.unmap(AT, 4 * PAGE)


def test_query_answers_with_the_mapping_or_the_hole(memory: ProcessMemory) -> None:
    mapping = memory.create_regular_mapping(AT + 2 * PAGE, PAGE, HEAP, u_rw)
    assert memory.query_memory(AT + 3 * PAGE - 1) is mapping
    below, above = memory.query_memory(AT + 5), memory.query_memory(AT + 3 * PAGE)
    assert (below.address, below.length, below.type) == (AT, 2 * PAGE, MemoryType.UNMAPPED)
    assert (above.address, above.end) == (AT + 3 * PAGE, AT + 64 * PAGE)
    for outside in (AT - 1, AT + 64 * PAGE, 0):
        with pytest.raises(InvalidAddress, match="UserLand"):
            memory.query_memory(outside)


def test_find_available_space(memory: ProcessMemory) -> None:
    assert memory.find_available_space(PAGE) == AT
    memory.guard(AT + PAGE, PAGE)
    assert memory.find_available_space(2 * PAGE) == AT + 2 * PAGE
    assert memory.find_available_space(46 * PAGE) == AT + 2 * PAGE, "from the bottom again, up to the heap"
    for bad in (0, 1, -PAGE):
        with pytest.raises(InvalidSize):
            memory.find_available_space(bad)
    with pytest.raises(VirtualMemoryExhaustion) as caught:
        memory.find_available_space(47 * PAGE)
    assert caught.value.size == 47 * PAGE


def test_the_heap_only_grows_and_keeps_its_bytes(memory: ProcessMemory, kernel_memory: KernelMemory) -> None:
    start = memory.resize_heap(0)
    assert len(memory) == 0
    assert memory.resize_heap(2 * PAGE) == start
    with memory.mirror_mapping(start + 5, 3, kernel=kernel_memory) as mirror:
        mirror[:] = b"abc"
        assert memory.resize_heap(5 * PAGE) == start
        assert bytes(mirror) == b"abc"
    (heap,) = memory
    assert (heap.length, heap.frames.refcount, len(heap.frames.segments)) == (5 * PAGE, 1, 2)  # type: ignore[union-attr]
    with memory.mirror_mapping(start + 5, 3 * PAGE, kernel=kernel_memory) as mirror:
        assert mirror[:3] == b"abc"
    for bad in (PAGE, 0, 4 * PAGE, 5 * PAGE + 1):
        with pytest.raises(InvalidSize):
            memory.resize_heap(bad)
    with pytest.raises(VirtualMemoryExhaustion):
        memory.resize_heap(17 * PAGE)
    memory.guard(start + 8 * PAGE, PAGE)
    with pytest.raises(VirtualMemoryExhaustion, match="in the way"):
        memory.resize_heap(9 * PAGE)
    rest = memory.allocator.allocate(59 * PAGE)
    with pytest.raises(PhysicalMemoryExhaustion, match=f"limit of {64 * PAGE} bytes"):
        memory.resize_heap(6 * PAGE)
    del rest
    assert memory.query_memory(start) is heap
    memory.unmap(start, 5 * PAGE).release()
    assert memory.resize_heap(PAGE) == start


def test_check_range(memory: ProcessMemory) -> None:
    memory.create_regular_mapping(AT, 2 * PAGE, HEAP, u_rw)
    memory.create_regular_mapping(AT + 2 * PAGE, PAGE, HEAP, u_rw)
    memory.create_regular_mapping(AT + 3 * PAGE, PAGE, HEAP, u_r)
    memory.create_regular_mapping(AT + 4 * PAGE, PAGE, MemoryType.STACK, u_r)
    counted = int(MemoryState.REFERENCE_COUNTED)
    assert memory.check_range(AT + 7, 3 * PAGE - 7) == (HEAP.state, u_rw)
    assert memory.check_range(AT, 1, state_mask=counted, state_expected=counted, rights_mask=3, rights_expected=3)
    assert memory.check_range(AT + 5 * PAGE, PAGE) == (MemoryType.UNMAPPED.state, 0)
    with pytest.raises(InvalidMemState) as caught:  # other rights
        memory.check_range(AT, 3 * PAGE + 1)
    assert caught.value.address == AT + 3 * PAGE
    with pytest.raises(InvalidMemState):  # another type
        memory.check_range(AT + 3 * PAGE, PAGE + 1)
    with pytest.raises(InvalidMemState, match="expected"):
        memory.check_range(AT + 5 * PAGE, 1, state_mask=counted, state_expected=counted)
    with pytest.raises(AccessDenied) as denied:
        memory.check_range(AT + 3 * PAGE + 5, 1, rights_mask=2, rights_expected=2)
    assert denied.value.address == AT + 3 * PAGE + 5
    for length in (0, 64 * PAGE + 1, 1 << 64):
        with pytest.raises(InvalidSize):
            memory.check_range(AT, length)
    with pytest.raises(InvalidAddress):
        memory.check_range(AT - 1, 1)


def test_line_13_the_mapping_an_address_falls_in(memory: ProcessMemory, kernel_memory: KernelMemory) -> None:
    memory.create_regular_mapping(AT + PAGE, 2 * PAGE, HEAP, u_rw)
    with memory.mirror_mapping(AT + 2 * PAGE - 1, 2, kernel=kernel_memory) as mirror:
        assert (mirror.offset, mirror.address % PAGE) == (PAGE - 1, PAGE - 1)
    for address in (AT, AT + PAGE - 1, AT + 3 * PAGE):
        with pytest.raises(InvalidAddress) as caught:
            memory.mirror_mapping(address, 1, kernel=kernel_memory)
        assert caught.value.address == address
    for outside in (AT - 1, AT + 64 * PAGE, 0, 1 << 63):
        with pytest.raises(InvalidAddress, match="UserLand"):
            memory.mirror_mapping(outside, 1, kernel=kernel_memory)
    for length, error in [(0, InvalidSize), (-1, InvalidSize), (1 << 64, InvalidSize), (1.5, TypeError)]:
        with pytest.raises(error):
            memory.mirror_mapping(AT + PAGE, length, kernel=kernel_memory)


def test_line_13_on_through_mappings_without_a_gap(memory: ProcessMemory, kernel_memory: KernelMemory) -> None:
    one = memory.create_regular_mapping(AT, PAGE, HEAP, u_rw)
    two = memory.create_regular_mapping(
        AT + PAGE, 3 * PAGE, MemoryType.STACK, u_rw, frames=memory.allocator.allocate(4 * PAGE, 2 * PAGE)
    )
    three = memory.create_regular_mapping(AT + 4 * PAGE, PAGE, HEAP, u_rw)
    with memory.mirror_mapping(AT + PAGE - 3, 3 * PAGE + 6, kernel=kernel_memory) as mirror:
        assert mirror.mappings == (one, two, three)
        assert mirror.mapping is one
        mirror[:] = bytes(range(256)) * 48 + bytes(6)
        assert [part.frames.refcount for part in mirror.mappings] == [2, 2, 2]  # type: ignore[union-attr]
        assert next((entry.length, entry.inode == 0) for entry in land_maps()) == (PAGE, False)
    assert [part.frames.refcount for part in (one, two, three)] == [1, 1, 1]  # type: ignore[union-attr]
    assert one.frames.read(PAGE - 3, 3, 0) == bytes([0, 1, 2])  # type: ignore[union-attr]
    assert one.frames.read(0, PAGE - 3, 0) == bytes(PAGE - 3)  # type: ignore[union-attr]
    assert three.frames.read(3, PAGE - 3, 0) == bytes(PAGE - 3)  # type: ignore[union-attr]


def test_line_13_running_into_a_hole_names_its_first_byte(memory: ProcessMemory, kernel_memory: KernelMemory) -> None:
    memory.create_regular_mapping(AT, PAGE, HEAP, u_rw)
    memory.create_regular_mapping(AT + PAGE, PAGE, HEAP, u_rw)
    memory.create_regular_mapping(AT + 3 * PAGE, PAGE, HEAP, u_rw)
    with pytest.raises(InvalidAddress, match="hole") as caught:
        memory.mirror_mapping(AT + 5, 3 * PAGE, kernel=kernel_memory)
    assert caught.value.address == AT + 2 * PAGE
    assert land_maps() == []


def test_line_13_a_part_that_is_not_shared(memory: ProcessMemory, kernel_memory: KernelMemory) -> None:
    memory.create_regular_mapping(AT, PAGE, HEAP, u_rw)
    memory.guard(AT + PAGE, PAGE)
    with pytest.raises(InvalidMemState) as caught:
        memory.mirror_mapping(AT, PAGE + 1, kernel=kernel_memory)
    assert (caught.value.address, caught.value.type) == (AT + PAGE, MemoryType.RESERVED)
    assert (land_maps(), kernel_memory.live) == ([], 0)


def test_moving_away_from_nothing(memory: ProcessMemory) -> None:
    """Its own place is avoided, also where the nothing lies in it."""
    mapping = memory.create_regular_mapping(AT, 2 * PAGE, HEAP, u_rw)
    assert memory.move(mapping, (AT + PAGE, AT + PAGE)).address == AT + 2 * PAGE


def test_moving_away_from_an_obstacle(memory: ProcessMemory) -> None:
    mapping = memory.create_regular_mapping(AT, 2 * PAGE, HEAP, u_rw)
    moved = memory.move(mapping, (AT + PAGE, AT + 5 * PAGE))
    assert moved.address == AT + 5 * PAGE
    assert (mapping.released, moved.frames.refcount) == (True, 1)  # type: ignore[union-attr]
    assert memory.find_available_space(41 * PAGE) == AT + 7 * PAGE
    again = memory.move(moved, (0, 1 << 63))
    assert again.address == AT, "with obstacles everywhere, they are tried once more"
    memory.guard(AT + 2 * PAGE, 46 * PAGE)
    memory.unmap(AT, 2 * PAGE).release()
    last = memory.create_regular_mapping(AT + 50 * PAGE, 2 * PAGE, HEAP, u_rw)
    memory.guard(AT, PAGE)
    with pytest.raises(VirtualMemoryExhaustion):
        memory.move(last, (0, 0))
    assert (last.released, len(memory)) == (True, 2)


def test_a_mapping_takes_no_more_than_a_kib_of_its_kernel(frames: FrameAllocator) -> None:
    memory, count = ProcessMemory(allocator=frames), 400
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for page in range(count):
            memory.create_regular_mapping(AT + page * PAGE, PAGE, HEAP, u_rw)
        took = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    memory.release_all()
    assert took <= count * 1024


def test_a_land_outside_of_userland() -> None:
    for start, length in [(0, PAGE), (USER_LAND.end, PAGE), (AT, USER_LAND.length + PAGE)]:
        with pytest.raises(InvalidAddress):
            ProcessMemory(start, length)


def test_everything_is_released_at_once(memory: ProcessMemory) -> None:
    for page in range(20):
        memory.create_regular_mapping(AT + page * PAGE, PAGE, HEAP, k_r)
    memory.release_all()
    assert (len(memory), memory.allocator.used, memory.allocator.segments) == (0, 0, 0)


class Books(RuleBasedStateMachine):
    """A page-by-page model: which mapping each page belongs to."""

    PAGES = 24

    def __init__(self) -> None:
        super().__init__()
        self.memory = ProcessMemory(length=self.PAGES * PAGE)
        self.model: list[int | None] = [None] * self.PAGES
        self.serial = 0

    @rule(first=st.integers(-1, 24), pages=st.integers(1, 6))
    def create(self, first: int, pages: int) -> None:
        inside = 0 <= first and first + pages <= self.PAGES
        free = inside and all(owner is None for owner in self.model[first : first + pages])
        if not free:
            try:
                self.memory.create_regular_mapping(AT + first * PAGE, pages * PAGE, HEAP, u_rw)
            except InvalidAddress:
                return
            raise AssertionError("it overlaps, or is outside")
        self.serial += 1
        self.memory.create_regular_mapping(AT + first * PAGE, pages * PAGE, HEAP, u_rw)
        self.model[first : first + pages] = [self.serial] * pages

    @rule(first=st.integers(0, 23), pages=st.integers(1, 6))
    def unmap(self, first: int, pages: int) -> None:
        owner = self.model[first]
        starts = owner is not None and (first == 0 or self.model[first - 1] != owner)
        try:
            self.memory.unmap(AT + first * PAGE, pages * PAGE).release()
        except InvalidAddress:
            assert not starts
        except InvalidSize:
            assert starts
            assert self.model.count(owner) != pages
        else:
            assert starts
            assert self.model.count(owner) == pages
            self.model = [None if page == owner else page for page in self.model]

    @rule(pages=st.integers(1, 20))
    def find(self, pages: int) -> None:
        try:
            address = self.memory.find_available_space(pages * PAGE)
        except VirtualMemoryExhaustion:
            limit = 18  # the heap has the upper quarter
            assert not any(
                self.model[at : at + pages] == [None] * pages for at in range(limit - pages + 1) if at + pages <= limit
            )
        else:
            first = (address - AT) // PAGE
            assert self.model[first : first + pages] == [None] * pages

    @invariant()
    def same(self) -> None:
        for page, owner in enumerate(self.model):
            found = self.memory.query_memory(AT + page * PAGE)
            same = [at for at, other in enumerate(self.model) if other == owner] if owner else []
            if owner:
                assert (found.address, found.length) == (AT + same[0] * PAGE, len(same) * PAGE)
            else:
                assert found.type is MemoryType.UNMAPPED


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
