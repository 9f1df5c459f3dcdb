"""Frames: segments under one refcount, and the allocator's limits."""

from __future__ import annotations

import gc
import os
import resource
import threading

import pytest
from conftest import PAGE, scaled
from hypothesis import given, settings
from hypothesis import strategies as st

from realmap.errors import InvalidHandle, InvalidSize, MemoryFault, PhysicalMemoryExhaustion
from realmap.memory import FrameAllocator, OwnedFrames


def test_fresh_frames_are_referred_to_by_nobody_and_go_when_collected(frames: FrameAllocator) -> None:
    fresh = frames.allocate(3 * PAGE)
    assert (fresh.refcount, fresh.length, frames.used, frames.segments) == (0, 3 * PAGE, 3 * PAGE, 1)
    del fresh
    gc.collect()
    assert (frames.used, frames.segments) == (0, 0)


def test_the_last_reference_closes_the_segments(frames: FrameAllocator) -> None:
    shared = frames.allocate(2 * PAGE, PAGE)
    one, two = object(), object()
    shared.hold(one, "mapping", 0x1000)
    shared.hold(two, "mirror", 0x2000)
    assert shared.holders() == ["mapping 0x1000", "mirror 0x2000"]
    descriptors = [segment.fd for segment in shared.segments]
    shared.let_go(one)
    shared.let_go(one)
    assert (shared.refcount, shared.freed) == (1, False)
    shared.let_go(two)
    assert (shared.refcount, shared.freed, frames.segments) == (0, True, 0)
    for fd in descriptors:
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(fd)
    with pytest.raises(InvalidHandle, match="gone"):
        shared.hold(one)


def test_who_holds_them_while_the_first_reference_is_noted_is_not_lost(frames: FrameAllocator) -> None:
    shared, first, late = frames.allocate(PAGE), object(), object()

    class Garbage:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            shared.hold(late, "late")

    thresholds = gc.get_threshold()
    gc.collect()  # and no dict is in stock any more: before 3.12 garbage is collected where one is made
    gc.disable()
    gc.set_threshold(1)
    try:
        Garbage()
        gc.enable()
        shared.hold(first)
    finally:
        gc.set_threshold(*thresholds)
        gc.enable()
    gc.collect()
    shared.let_go(first)
    assert (shared.refcount, shared.freed, shared.holders()) == (1, False, ["late"])
    shared.let_go(late)
    assert shared.freed


@settings(deadline=None, max_examples=40)
@given(pages=st.integers(1, 20), step=st.integers(1, 25), data=st.data())
def test_pieces_cover_the_range_in_order(pages: int, step: int, data: st.DataObject) -> None:
    shared = FrameAllocator().allocate(pages * PAGE, step * PAGE)
    assert sum(segment.length for segment in shared.segments) == shared.length == pages * PAGE
    assert len(shared.segments) == -(-pages // step)
    offset = data.draw(st.integers(0, shared.length - 1))
    length = data.draw(st.integers(1, shared.length - offset))
    found = shared.pieces(offset, length)
    at = offset
    for fd, inside, size in found:
        segment = shared.segments[at // (step * PAGE)]
        assert (fd, inside) == (segment.fd, at % (step * PAGE))
        at += size
    assert at == offset + length


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_copies_are_those_of_a_bytearray(data: st.DataObject) -> None:
    shared = FrameAllocator().allocate(5 * PAGE, 2 * PAGE)
    model = bytearray(5 * PAGE)
    for _ in range(5):
        offset = data.draw(st.integers(0, 5 * PAGE))
        length = data.draw(st.integers(0, 5 * PAGE - offset))
        content = os.urandom(length)
        shared.write(offset, memoryview(content), 0)
        model[offset : offset + length] = content
        start = data.draw(st.integers(0, 5 * PAGE - 1))
        assert shared.read(start, 5 * PAGE - start, 0) == model[start:]


def test_a_truncated_segment_is_a_fault_and_names_the_byte(frames: FrameAllocator) -> None:
    shared = frames.allocate(4 * PAGE, 2 * PAGE)
    os.ftruncate(shared.segments[1].fd, PAGE)
    assert shared.read(0, 3 * PAGE, 0) == bytes(3 * PAGE)
    with pytest.raises(MemoryFault) as caught:
        shared.read(PAGE, 3 * PAGE, 0x7000)
    assert caught.value.address == 0x7000 + 2 * PAGE
    with pytest.raises(MemoryFault):
        shared.write(3 * PAGE, memoryview(b"x"), 0x7000)
    assert os.fstat(shared.segments[1].fd).st_size == PAGE, "a copy does not grow it again"


@pytest.mark.parametrize(
    ("length", "fragment"),
    [(0, None), (1, None), (PAGE + 1, None), (-PAGE, None), (PAGE, 0), (PAGE, 100), (PAGE, -PAGE)],
)
def test_frames_are_whole_pages(frames: FrameAllocator, length: int, fragment: int | None) -> None:
    with pytest.raises(InvalidSize):
        frames.allocate(length, fragment)
    assert frames.used == 0


def test_a_named_segment_is_one_segment(frames: FrameAllocator) -> None:
    with pytest.raises(InvalidSize, match="named"):
        frames.allocate(2 * PAGE, PAGE, name="x")


def test_no_integers(frames: FrameAllocator) -> None:
    for length in (1.5 * PAGE, "4096", None):
        with pytest.raises(TypeError):
            frames.allocate(length)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        OwnedFrames("1")  # type: ignore[arg-type]
    with pytest.raises(InvalidSize):
        OwnedFrames(PAGE - 1)


def test_limits_are_to_the_byte_and_nested() -> None:
    kernel = FrameAllocator(4 * PAGE)
    process = FrameAllocator(3 * PAGE, parent=kernel)
    mine = process.allocate(3 * PAGE)
    with pytest.raises(PhysicalMemoryExhaustion, match=str(3 * PAGE)):
        process.allocate(PAGE)
    other = FrameAllocator(3 * PAGE, parent=kernel)
    theirs = other.allocate(PAGE)
    with pytest.raises(PhysicalMemoryExhaustion, match=str(4 * PAGE)):
        other.allocate(PAGE)
    assert (kernel.used, process.used, other.used) == (4 * PAGE, 3 * PAGE, PAGE)
    del mine
    gc.collect()
    assert (kernel.used, process.used) == (PAGE, 0)
    del theirs
    gc.collect()
    assert kernel.used == other.used == 0


def test_a_failure_half_way_gives_everything_back() -> None:
    allocator = FrameAllocator()
    free = os.dup(0)
    os.close(free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 3, hard))
    try:
        with pytest.raises(PhysicalMemoryExhaustion, match="no descriptors"):
            allocator.allocate(5 * PAGE, PAGE)
        assert (allocator.used, allocator.segments) == (0, 0)
        assert allocator.allocate(3 * PAGE, PAGE).length == 3 * PAGE  # no descriptor was kept
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_than_a_file_can_have(frames: FrameAllocator) -> None:
    for commit in (True, False):
        with pytest.raises(PhysicalMemoryExhaustion, match="/dev/shm"):
            frames.allocate(1 << 63, commit=commit)


def test_references_from_many_threads(frames: FrameAllocator) -> None:
    shared = frames.allocate(PAGE)
    keeper = object()
    shared.hold(keeper)

    def work() -> None:
        for _ in range(scaled(5000) if scaled(100) < 100 else 5000):
            holder = object()
            shared.hold(holder)
            shared.let_go(holder)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shared.refcount == 1
    shared.let_go(keeper)
    assert shared.freed
