"""A handler's buffer where it works for another user process: of what that was granted, by what it lends."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
from conftest import PAGE

from realmap.errors import AccessDenied, InvalidAddress, LimitReached, MemoryFault
from realmap.memory import LentLand, LentMapping, Mapping
from realmap.memory.grants import Grants
from realmap.rights import MemoryType, k_r, u_r, u_rw
from realmap.serving.user_buffer import UserBuffer, end, pin

PAGES = 5
Make = Callable[..., UserBuffer]


class Lender:
    """A caller with one mapping, and what a server has of it."""

    def __init__(self, mapping: Mapping) -> None:
        self.mapping = mapping
        self.land = LentLand(lazy_unmap=1 << 20)
        self.granted = Grants()
        self.enter(mapping.address, 1)
        mapping.frames.write(0, memoryview(os.urandom(mapping.length)), 0)  # type: ignore[union-attr]

    def enter(self, address: int, serial: int, rights: int = u_rw) -> None:
        segments = self.mapping.frames.segments  # type: ignore[union-attr]
        pieces = [(0, segment.length) for segment in segments]
        fds = [segment.open_anew(writable=rights == u_rw) for segment in segments]
        self.granted.enter(address, self.mapping.length, MemoryType.HEAP, rights, pieces, fds, serial)

    def buffer(self, offset: int, length: int, most: int | None = None) -> UserBuffer:
        caller = SimpleNamespace(memory=self.granted, is_here=False)
        return UserBuffer(caller, self.land, None, self.mapping.address + offset, length, most)  # type: ignore[arg-type]

    def bytes(self, offset: int, length: int) -> bytes:
        return self.mapping.frames.read(offset, length, 0)  # type: ignore[union-attr]


@pytest.fixture
def lender(make_mapping: Callable[..., Mapping]) -> Iterator[Lender]:
    made = Lender(make_mapping(PAGES * PAGE, 2 * PAGE))
    yield made
    made.granted.clear()
    made.land._clear_kept()


def test_all_ways_to_reach_it_are_those_of_any_buffer(lender: Lender) -> None:
    buffer = lender.buffer(100, 2 * PAGE)
    assert buffer.copy_in() == lender.bytes(100, 2 * PAGE)
    buffer.copy_out(b"out", 5)
    assert lender.bytes(105, 3) == b"out"
    with buffer.mirror() as window:
        assert isinstance(window, LentMapping)
        assert bytes(window) == lender.bytes(100, 2 * PAGE)
    with buffer.array("uint8") as values:
        values[:] = 7
    del values
    assert lender.bytes(100, 2 * PAGE) == b"\7" * 2 * PAGE
    with buffer.access(k_r, 3, PAGE) as window:
        assert isinstance(window, LentMapping)
    with lender.buffer(PAGE, PAGE).mirror(populate=True) as window:
        assert bytes(window) == lender.bytes(PAGE, PAGE)


def test_it_may_be_no_more_than_the_caller_itself_may(lender: Lender) -> None:
    lender.enter(lender.mapping.end, 2, u_r)
    buffer = lender.buffer(PAGES * PAGE - 5, 10)
    with buffer.mirror(k_r) as window:
        assert bytes(window) == lender.bytes(PAGES * PAGE - 5, 5) + lender.bytes(0, 5)
    with pytest.raises(AccessDenied):
        buffer.mirror()
    with pytest.raises(InvalidAddress):
        lender.buffer(2 * PAGES * PAGE - 1, 2)
    with pytest.raises(LimitReached):
        lender.buffer(PAGES * PAGE - 5, 10, most=1)


def test_what_was_not_dropped_is_copied_back_before_the_answer(lender: Lender) -> None:
    buffer, other = lender.buffer(100, PAGE), lender.buffer(300, PAGE)
    window, beside = buffer.mirror(), other.mirror()
    window[0:2] = beside[0:2] = b"hi"
    lender.land.settle([buffer])
    assert lender.bytes(100, 2) == b"hi" != lender.bytes(300, 2)
    window[2:3] = b"!"
    os.ftruncate(lender.mapping.frames.segments[0].fd, 0)  # type: ignore[union-attr]
    with pytest.raises(MemoryFault) as caught:
        lender.land.settle([buffer, other])
    assert caught.value.address in (lender.mapping.address + 102, lender.mapping.address + 300)
    for each in (window, beside):
        with pytest.raises(MemoryFault):
            each.drop()
    lender.land.settle([])


def test_bytes_that_are_gone_end_the_call_in_a_fault_also_where_its_window_was_collected(lender: Lender) -> None:
    buffer = lender.buffer(100, 50)
    window = buffer.mirror()
    window[0:2] = b"hi"
    os.ftruncate(lender.mapping.frames.segments[0].fd, 0)  # type: ignore[union-attr]
    del window
    with pytest.raises(MemoryFault) as caught:
        lender.land.settle([buffer])
    assert caught.value.address == lender.mapping.address + 100


def test_a_call_keeps_what_leaves_while_it_works(lender: Lender) -> None:
    buffer = lender.buffer(100, PAGE)
    pin(buffer)
    lender.granted.leave(1)
    with buffer.mirror() as window:
        assert bytes(window) == buffer.copy_in() == lender.bytes(100, PAGE)
    end(buffer, pinned=True)
    assert lender.granted.allocator.segments == 0
