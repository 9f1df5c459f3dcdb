"""What a server holds of a caller's memory: mappings by descriptors, until they leave and nobody uses them."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from conftest import PAGE, in_threads

from realmap.errors import InvalidAddress, InvalidSize, KernelError, PhysicalMemoryExhaustion
from realmap.memory import USER_LAND, FrameAllocator, LentLand, Mapping
from realmap.memory.cross_process import mirror_parts
from realmap.memory.grants import Grants
from realmap.rights import MemoryType, u_r, u_rw

AT = USER_LAND.start
HEAP = MemoryType.HEAP


def descriptors(mapping: Mapping, count: int | None = None) -> list[int]:
    """As the kernel sends them: each with an open file description of its own."""
    return [segment.open_anew(writable=True) for segment in mapping.frames.segments[:count]]  # type: ignore[union-attr]


def test_what_is_granted_is_found_and_shows_the_callers_bytes(make_mapping: Callable[..., Mapping]) -> None:
    mapping = make_mapping(4 * PAGE, 2 * PAGE, PAGE, PAGE)  # a window onto the middle of three segments
    mapping.frames.write(0, memoryview(os.urandom(6 * PAGE)), 0)  # type: ignore[union-attr]
    granted, land = Grants("process 7"), LentLand()
    pieces = [(PAGE, PAGE), (0, 2 * PAGE), (0, PAGE)]
    entered = granted.enter(mapping.address, 4 * PAGE, HEAP, u_rw, pieces, descriptors(mapping), 11)
    assert granted.mapping_at(mapping.address - 1) is granted.mapping_at(mapping.end) is None
    assert granted.mapping_at(mapping.end - 1) is granted.mapping_at(mapping.address) is entered
    assert (entered.serial, entered.owner, len(granted)) == (11, "process 7", 1)
    theirs = [(segment.device, segment.inode) for segment in mapping.frames.segments]  # type: ignore[union-attr]
    assert [(each.device, each.inode) for each in entered.frames.segments] == theirs  # type: ignore[union-attr]
    parts = granted.parts(mapping.address + 5, 3 * PAGE)
    assert parts == [(entered, 5, 3 * PAGE)]
    window = mirror_parts(parts, kernel=land)
    assert bytes(window) == mapping.frames.read(PAGE + 5, 3 * PAGE, 0)  # type: ignore[union-attr]
    window[0:1] = window[-1:] = b"\0"
    granted.leave(11)
    assert len(granted) == 0
    assert granted.allocator.segments == 3, "a window of it lives"
    window.drop()
    assert granted.allocator.segments == 0
    assert mapping.frames.read(PAGE + 5, 1, 0) == b"\0"  # type: ignore[union-attr]
    granted.leave(11)


def test_a_range_goes_on_through_what_follows_and_a_hole_is_named(make_mapping: Callable[..., Mapping]) -> None:
    mapping, granted = make_mapping(2 * PAGE), Grants()
    for serial, at in ((2, AT + 2 * PAGE), (1, AT), (3, AT + 5 * PAGE)):
        granted.enter(at, 2 * PAGE, HEAP, u_r, [(0, 2 * PAGE)], descriptors(mapping), serial)
    assert [(part[0].serial, *part[1:]) for part in granted.parts(AT + 9, 3 * PAGE)] == [
        (1, 9, 2 * PAGE - 9),
        (2, 0, PAGE + 9),
    ]
    with pytest.raises(InvalidAddress) as caught:
        granted.parts(AT + 9, 5 * PAGE)
    assert caught.value.address == AT + 4 * PAGE
    granted.clear()
    with pytest.raises(InvalidAddress):
        granted.parts(AT, 1)
    assert granted.allocator.used == 0


def test_what_cannot_be_entered_leaves_no_descriptor_open(make_mapping: Callable[..., Mapping]) -> None:
    mapping = make_mapping(2 * PAGE, PAGE)
    granted = Grants(allocator=FrameAllocator(limit=5 * PAGE))
    granted.enter(AT + PAGE, 2 * PAGE, HEAP, u_r, [(0, PAGE), (0, PAGE)], descriptors(mapping), 1)
    one, two = [(0, PAGE)], [(0, PAGE), (0, PAGE)]
    free = AT + 3 * PAGE
    wrong: list[tuple[int, int, list[tuple[int, int]], int, type[KernelError]]] = [
        (AT, 2 * PAGE, two, 2, InvalidAddress),  # overlaps
        (AT + 2 * PAGE, PAGE, one, 1, InvalidAddress),  # overlaps one that begins below
        (AT - PAGE, 2 * PAGE, two, 2, InvalidAddress),  # not in UserLand
        (free, 2 * PAGE, one, 1, InvalidSize),
        (free, 2 * PAGE, two, 1, InvalidSize),
        (free, PAGE, one, 2, InvalidSize),
        (free, 0, [], 0, InvalidSize),
        (free + 1, PAGE, one, 1, InvalidAddress),
        (free, 2 * PAGE, [(0, PAGE), (PAGE, PAGE)], 2, InvalidAddress),
        (free, 9 * PAGE, [(0, 9 * PAGE)], 1, PhysicalMemoryExhaustion),
    ]
    before = len(os.listdir("/proc/self/fd"))
    for address, length, pieces, count, error in wrong:
        with pytest.raises(error) as caught:
            granted.enter(address, length, HEAP, u_r, pieces, descriptors(mapping, count), 2)
        assert (len(granted), granted.allocator.segments) == (1, 2)
        assert len(os.listdir("/proc/self/fd")) == before, "also while its error is kept"
    del caught
    with pytest.raises(OSError, match="Bad file descriptor"):
        granted.enter(free, PAGE, HEAP, u_r, one, [1 << 20], 2)
    granted.clear()


def test_threads_enter_look_and_leave_at_once(make_mapping: Callable[..., Mapping]) -> None:
    mapping, granted = make_mapping(PAGE), Grants()

    def work(number: int) -> None:
        for serial in range(number, 400, 4):
            at = AT + serial * PAGE
            entered = granted.enter(at, PAGE, HEAP, u_r, [(0, PAGE)], descriptors(mapping), serial)
            assert granted.mapping_at(at + 7) is entered
            if serial % 3:
                granted.leave(serial)
                assert granted.mapping_at(at) is None

    in_threads(4, work)
    assert len(granted) == len([serial for serial in range(400) if not serial % 3])
    granted.clear()
    assert granted.allocator.segments == 0


def test_a_forked_child_holds_none_of_the_descriptors(make_mapping: Callable[..., Mapping]) -> None:
    mapping, granted = make_mapping(PAGE), Grants()
    mine = descriptors(mapping)
    granted.enter(AT, PAGE, HEAP, u_rw, [(0, PAGE)], list(mine), 1)
    window = mirror_parts(granted.parts(AT, PAGE), kernel=LentLand())  # which holds them, too
    child = os.fork()
    if not child:
        os._exit(len(granted) + os.path.exists(f"/proc/self/fd/{mine[0]}"))
    assert os.waitpid(child, 0)[1] == 0
    assert (len(granted), window.alive) == (1, True)
    granted.clear()
    window.drop()
