"""The stock of a process: what is kept of what it has unmapped, for how long, and who has it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from books_nouns import Words
from conftest import PAGE

from realmap.errors import InvalidAddress, InvalidSize
from realmap.memory import CrossProcessMapping, FrameAllocator, KernelMemory, Mapping, ProcessMemory
from realmap.memory.stock import PLACES
from realmap.rights import MemoryType, u_rw


class Owner:
    """A process with a stock of ten pages, and what it says."""

    def __init__(self) -> None:
        self.frames = FrameAllocator(reserved=1 << 20)
        self.memory = ProcessMemory(allocator=FrameAllocator(parent=self.frames), owner="of a test", stock=10 * PAGE)
        self.words = Words()
        self.memory.stock.join(self.words)

    def map(self, pages: int = 1) -> Mapping:
        mapping = self.memory.enter_anywhere(
            frames := self.memory.allocator.allocate(pages * PAGE), pages * PAGE, MemoryType.HEAP, u_rw
        )
        frames.recycles = True
        return mapping

    def park(self, mapping: Mapping, place: int) -> bool:
        stock = self.memory.stock
        stock.require(place)
        keeps = stock.enter(place, self.memory.unmap(mapping.address, mapping.length))
        stock.say(place)
        return keeps

    @property
    def sums(self) -> tuple[int, int]:
        return self.memory.stock.count, self.memory.stock.bytes

    @property
    def sizes(self) -> list[int]:
        """Of what is parked: pages, 0 for what is not kept."""
        return [each.length // PAGE if each.frames else 0 for each in self.memory.stock.windows()]


@pytest.fixture
def owner() -> Iterator[Owner]:
    made = Owner()
    yield made
    made.memory.release_all()
    assert (made.frames.used, made.frames.segments) == (0, 0)


def test_it_is_nowhere_while_it_is_parked(owner: Owner) -> None:
    mapping = owner.map(3)
    address, frames = mapping.address, mapping.frames
    assert owner.park(mapping, 5)
    assert (owner.words.state[5], owner.sums) == ("kept", (1, 3 * PAGE))
    assert (mapping.released, len(owner.memory), owner.memory.mapping_at(address)) == (True, 0, None)
    assert owner.memory.query_memory(address).type == MemoryType.UNMAPPED
    with pytest.raises(InvalidAddress):
        owner.memory.parts(address, 1)
    assert frames is not None
    assert frames.holders() == [f"stock {address:#x} of a test"]  # type: ignore[union-attr]
    assert owner.frames.used == 3 * PAGE  # it is charged as before


def test_it_is_there_again_for_whoever_looks(owner: Owner) -> None:
    mapping = owner.map(2)
    told: list[tuple[int, bool]] = []
    owner.memory.told = lambda each, comes: told.append((each.address, comes))
    owner.park(mapping, 0)
    owner.words.change(0, "kept", "used")
    again = owner.memory.mapping_at(mapping.address + PAGE)
    assert again is not None
    assert again is not mapping  # which is dead for good
    assert (again.address, again.length, again.type, again.rights) == (mapping.address, 2 * PAGE, mapping.type, u_rw)
    assert (again.frames, again.serial) == (mapping.frames, mapping.serial)
    assert (owner.sums, owner.words.state[0], len(owner.memory)) == ((0, 0), "free", 1)
    assert told == [(mapping.address, False), (mapping.address, True)]


def test_its_place_is_nobody_elses(owner: Owner) -> None:
    mapping = owner.map(2)
    owner.park(mapping, 0)
    memory = owner.memory
    assert not memory.is_vacant(mapping.address + PAGE, PAGE)
    with pytest.raises(InvalidAddress, match="parked"):
        memory.guard(mapping.address - PAGE if mapping.address > memory.start else mapping.address, 2 * PAGE)
    memory._space.cursor = memory.start
    assert memory.find_available_space(PAGE) == mapping.address + 2 * PAGE
    memory.stock.give_up()
    memory._space.cursor = memory.start
    assert memory.find_available_space(PAGE) == mapping.address + 2 * PAGE  # until it is unmapped there
    owner.words.state[0] = "free"
    memory._space.cursor = memory.start
    assert memory.find_available_space(PAGE) == mapping.address


def test_those_parked_first_give_way(owner: Owner) -> None:
    for place, pages in enumerate((4, 3, 2)):
        owner.park(owner.map(pages), place)
    owner.park(owner.map(5), 3)
    assert (owner.sizes, owner.sums) == ([0, 3, 2, 5], (3, 10 * PAGE))
    assert owner.words.state[:4] == ["gone", "kept", "kept", "kept"]
    assert not owner.park(owner.map(11), 4)
    assert (owner.sizes, owner.words.state[4]) == ([0, 3, 2, 5, 0], "gone")


def test_what_is_used_again_is_not_given_up(owner: Owner) -> None:
    used, parked = owner.map(), owner.map()
    segment = os.fstat(used.frames._fd).st_ino  # type: ignore[union-attr]
    owner.park(used, 0)
    owner.park(parked, 1)
    owner.words.change(0, "kept", "used")
    assert owner.memory.stock.give_up()
    assert owner.words.state[:2] == ["used", "gone"]
    assert owner.frames.used == PAGE
    found = owner.memory.mapping_at(used.address)
    assert found is not None
    status = os.fstat(found.frames._fd)  # type: ignore[union-attr]
    assert (status.st_ino, status.st_size) == (segment, PAGE)
    assert not owner.memory.stock.give_up()


def test_its_pages_are_free_at_once(owner: Owner) -> None:
    mapping = owner.map(4)
    fd = os.dup(mapping.frames._fd)  # type: ignore[union-attr]
    owner.park(mapping, 0)
    assert os.fstat(fd).st_size == 4 * PAGE
    owner.memory.stock.give_up()
    assert (os.fstat(fd).st_size, owner.frames.used) == (0, 0)
    os.close(fd)


def test_what_anybody_else_holds_is_not_kept(owner: Owner, kernel_memory: KernelMemory) -> None:
    mirrored, pinned, shared = owner.map(), owner.map(), owner.map()
    mirror = CrossProcessMapping.mirror_mapping(mirrored, 0, PAGE, kernel=kernel_memory)
    pinned.pin()
    other = ProcessMemory(allocator=owner.frames)
    other.map_partial_shared_mapping(
        shared.frames,
        other.start,
        0,
        PAGE,
        MemoryType.HEAP,
        u_rw,  # type: ignore[arg-type]
    )
    other.release_all()
    assert [owner.park(each, place) for place, each in enumerate((mirrored, pinned, shared))] == [False] * 3
    assert owner.words.state[:3] == ["gone"] * 3
    assert owner.frames.used == 2 * PAGE
    mirror.drop()
    pinned.unpin()
    assert owner.frames.used == 0


def test_a_kept_mirror_goes_with_it(owner: Owner) -> None:
    land = KernelMemory(lazy_unmap=1 << 20)
    mapping = owner.map()
    CrossProcessMapping.mirror_mapping(mapping, 0, PAGE, kernel=land).drop()
    assert len(land.kept_windows()) == 1
    assert owner.park(mapping, 0)
    assert land.kept_windows() == []


def test_places(owner: Owner) -> None:
    owner.park(owner.map(), 2)
    for wrong in (2, PLACES, 1 << 40):
        with pytest.raises(InvalidSize):
            owner.memory.stock.require(wrong)
    owner.memory.stock.give_up()
    with pytest.raises(InvalidSize):
        owner.memory.stock.require(2)  # it is not unmapped yet
    owner.words.state[2] = "free"
    owner.memory.stock.require(2)
    alone = ProcessMemory(allocator=owner.frames, stock=PAGE)
    with pytest.raises(InvalidSize):
        alone.stock.require(0)  # nobody could be told


def test_descriptors_are_left_for_others() -> None:
    frames = FrameAllocator(reserved=2 * (os.open("/dev/null", os.O_RDONLY) + 1))
    owner = Owner()
    owner.memory = ProcessMemory(allocator=FrameAllocator(parent=frames), stock=10 * PAGE)
    owner.memory.stock.join(owner.words)
    os.close(frames._reserved // 2 - 1)
    first, second = owner.map(), owner.map()
    assert [owner.park(first, 0), owner.park(second, 1)] == [True, False]
    owner.memory.release_all()
    assert frames.segments == 0


def test_all_of_it_goes(owner: Owner) -> None:
    for place in range(3):
        owner.park(owner.map(), place)
    owner.words.change(1, "kept", "used")
    owner.memory.empty_stock()
    assert (owner.sums, owner.sizes, len(owner.memory)) == ((0, 0), [], 1)
