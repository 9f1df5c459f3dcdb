"""What is lent: the plan of a range, and the window made of it, where nobody sees or changes a byte beside it."""

from __future__ import annotations

import ctypes
import gc
import os
import random
from collections.abc import Callable, Iterator

import pytest
from canaries import AT, between_canaries
from conftest import PAGE, in_threads, land_maps, scaled
from hypothesis import given, settings
from hypothesis import strategies as st

import realmap
from realmap.errors import AccessDenied, KernelPanic, MemoryFault, VirtualMemoryExhaustion
from realmap.memory import (
    LENT_LAND,
    FrameAllocator,
    KernelMemory,
    LentLand,
    LentMapping,
    Mapping,
    ProcessMemory,
    SharedFrames,
)
from realmap.memory.cross_process import mirror_parts
from realmap.memory.lending import SCRATCH_PAGES, plan
from realmap.pages import HUGE_SIZE
from realmap.rights import MappingAccessRights, MemoryType, k_r, k_rw, k_w, u_rw

FULL = 200_000
#: The fixture `make_mapping`.
Make = Callable[..., Mapping]


@pytest.fixture
def land() -> Iterator[LentLand]:
    """All of LentLand, in this process."""
    made = LentLand()
    yield made
    made._scratch = None  # pytest holds it for longer than its test


def lend(
    mapping: Mapping, offset: int, length: int, land: KernelMemory, rights: MappingAccessRights = k_rw
) -> LentMapping:
    made = mirror_parts([(mapping, offset, length)], kernel=land, rights=rights)
    assert isinstance(made, LentMapping)
    return made


def frames_of(mapping: Mapping) -> SharedFrames:
    assert isinstance(mapping.frames, SharedFrames)
    return mapping.frames


def filled(mapping: Mapping, seed: int = 1) -> bytearray:
    """Its frames full of random bytes; those bytes."""
    content = bytearray(random.Random(seed).randbytes(frames_of(mapping).length))
    frames_of(mapping).write(0, memoryview(content), 0)
    return content


def bytes_of(mapping: Mapping) -> bytes:
    return frames_of(mapping).read(0, frames_of(mapping).length, 0)


def pages_of(window: LentMapping) -> bytes:
    """The whole pages of a window, also what it does not export: what a server can see."""
    return ctypes.string_at(window._base, window._span)


# ---- the plan -------------------------------------------------------------------------------


@given(st.integers(0, 6 * PAGE), st.integers(1, 6 * PAGE))
def test_a_plan_covers_the_range_once_in_order_and_lends_whole_pages_alone(offset: int, length: int) -> None:
    stretches = plan(offset, length)
    at = offset
    for stretch in stretches:
        assert stretch.offset == at
        at += stretch.length
        if stretch.lent:
            assert stretch.offset % PAGE == stretch.length % PAGE == 0
        else:
            assert stretch.offset // PAGE == (at - 1) // PAGE, "an edge lies within one page"
            assert stretch.length < PAGE, "a page that is covered is lent"
    assert at == offset + length
    assert [stretch.lent for stretch in stretches] in (
        [True], [False], [False, True], [True, False], [False, True, False], [False, False],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("offset", "length", "shown"),
    [
        (0, PAGE, "l"),
        (1, PAGE - 1, "c"),
        (0, PAGE - 1, "c"),
        (7, 9, "c"),
        (PAGE - 1, 2, "cc"),
        (PAGE - 1, PAGE + 1, "cl"),
        (PAGE - 1, PAGE + 2, "clc"),
        (PAGE, PAGE + 1, "lc"),
    ],
)
def test_the_plan_at_its_boundaries(offset: int, length: int, shown: str) -> None:
    assert "".join("l" if stretch.lent else "c" for stretch in plan(offset, length)) == shown


# ---- the window -----------------------------------------------------------------------------


def test_no_byte_beside_the_range_is_seen_and_none_is_changed(make_mapping: Make, land: LentLand) -> None:
    mapping = make_mapping(5 * PAGE, 2 * PAGE)
    model = filled(mapping)
    start, length = PAGE + 100, 3 * PAGE
    with lend(mapping, start, length, land) as window:
        assert (window.address % PAGE, len(window)) == (100, length)
        assert LENT_LAND.holds(window.address, length)
        assert pages_of(window) == bytes(100) + model[start : start + length] + bytes(PAGE - 100)
        ctypes.memset(window._base, 0xAA, window._span)  # also what it does not export
    model[start : start + length] = b"\xaa" * length
    assert bytes_of(mapping) == model
    with lend(mapping, 4 * PAGE + 5, 7, land) as window:  # by the scratch page that was written all over
        assert pages_of(window) == bytes(5) + model[4 * PAGE + 5 : 4 * PAGE + 12] + bytes(PAGE - 12)


def test_whole_pages_are_the_callers_own_at_once_and_edges_when_it_is_dropped(
    make_mapping: Make, land: LentLand
) -> None:
    mapping = make_mapping(3 * PAGE)
    filled(mapping)
    with lend(mapping, 10, 2 * PAGE, land) as window:
        window[0:3] = b"abc"
        window[PAGE : PAGE + 3] = b"def"
        assert bytes_of(mapping)[10:13] != b"abc"
        assert bytes_of(mapping)[PAGE + 10 : PAGE + 13] == b"def"
    assert bytes_of(mapping)[10:13] == b"abc"


@pytest.mark.parametrize("rights", [k_w, k_rw])
def test_of_an_edge_only_what_was_changed_is_copied_back(
    rights: MappingAccessRights, make_mapping: Make, land: LentLand
) -> None:
    mapping = make_mapping(PAGE)
    model = filled(mapping)
    first, second = lend(mapping, 10, 500, land, rights), lend(mapping, 10, 500, land, rights)
    changed = bytes(255 - byte for byte in model[30:40])
    ctypes.memmove(first.address + 20, changed, 10)
    ctypes.memmove(second.address + 100, changed, 10)
    frames_of(mapping).write(400, memoryview(b"meanwhile"), 0)
    first.drop()
    second.drop()
    model[30:40] = model[110:120] = changed
    model[400:409] = b"meanwhile"
    assert bytes_of(mapping) == model


def test_a_window_that_is_only_read_changes_nothing(make_mapping: Make, land: LentLand) -> None:
    mapping = make_mapping(2 * PAGE)
    model = filled(mapping)
    with lend(mapping, 3, PAGE, land, k_r) as window, pytest.raises(AccessDenied):
        window[0:1] = b"x"
    assert bytes_of(mapping) == model
    with pytest.raises(AccessDenied):
        lend(mapping, 3, PAGE, land, realmap.u_rw)


def test_a_range_over_several_mappings_is_one_window(land: LentLand) -> None:
    memory = ProcessMemory()
    first = memory.create_regular_mapping(AT, 2 * PAGE, MemoryType.HEAP, u_rw)
    second = memory.create_regular_mapping(AT + 2 * PAGE, 3 * PAGE, MemoryType.HEAP, u_rw)
    model = filled(first, 1) + filled(second, 2)
    start, length = PAGE - 7, 3 * PAGE + 50
    with memory.mirror_mapping(AT + start, length, kernel=land) as window:
        assert isinstance(window, LentMapping)
        assert window.mappings == (first, second)
        assert bytes(window) == model[start : start + length]
        window[:] = bytes(length)
    model[start : start + length] = bytes(length)
    assert bytes_of(first) + bytes_of(second) == model
    with pytest.raises(KernelPanic):
        mirror_parts([(first, 0, 5), (second, 0, 5)], kernel=land)
    memory.release_all()


def test_whole_pages_are_kept_under_lazy_unmap_and_edges_never(make_mapping: Make) -> None:
    land, mapping = LentLand(lazy_unmap=1 << 20), make_mapping(4 * PAGE)
    lend(mapping, PAGE, 2 * PAGE, land).drop()
    assert land.kept.counts().bytes == 2 * PAGE
    with lend(mapping, PAGE, 2 * PAGE, land) as window:
        assert type(window) is LentMapping
    assert land.kept.counts().hits == 1
    lend(mapping, PAGE + 1, 2 * PAGE, land).drop()
    lend(mapping, PAGE, 2 * PAGE - 1, land).drop()
    assert land.kept.counts().bytes == 2 * PAGE
    land._scratch = None


def test_of_huge_frames_no_page_beside_the_range_is_mapped(frames: FrameAllocator, land: LentLand) -> None:
    shared = frames.allocate(2 * HUGE_SIZE, huge=True)
    mapping = Mapping(AT, shared, 0, 2 * HUGE_SIZE, MemoryType.HEAP, u_rw)
    for offset, length in ((PAGE, PAGE), (0, HUGE_SIZE), (5, HUGE_SIZE + PAGE), (HUGE_SIZE - PAGE, PAGE + 9)):
        with lend(mapping, offset, length, land) as window:
            assert window._span == -(-(offset % PAGE + length) // PAGE) * PAGE
            if length >= HUGE_SIZE:
                assert (window.address - offset) % HUGE_SIZE == 0, "huge pages can serve it"
    mapping.release()


def test_while_a_view_lives_it_is_not_dropped_and_its_edges_stay(make_mapping: Make, land: LentLand) -> None:
    mapping = make_mapping(2 * PAGE)
    window = lend(mapping, 100, 200, land)
    view = memoryview(window)
    view[0:2] = b"hi"
    with pytest.raises(BufferError):
        window.drop()
    assert window[0:2] == b"hi"
    assert bytes_of(mapping)[100:102] == bytes(2)
    view[2:3] = b"!"
    view.release()
    window.drop()
    window.drop()
    assert bytes_of(mapping)[100:103] == b"hi!"


def test_collection_copies_back_too_in_a_cycle_with_a_view_as_well(make_mapping: Make, land: LentLand) -> None:
    mapping = make_mapping(2 * PAGE)
    window = lend(mapping, 100, 200, land)
    window[0:2] = b"hi"
    del window
    assert bytes_of(mapping)[100:102] == b"hi"
    cycle: list[object] = [lend(mapping, 100, 200, land)]
    cycle += [memoryview(cycle[0]), cycle]  # type: ignore[arg-type]
    cycle[1][0:2] = b"yo"  # type: ignore[index]
    del cycle
    gc.collect()
    assert bytes_of(mapping)[100:102] == b"yo"
    assert (land.live, land_maps()) == (0, [])


def test_a_truncated_segment_under_an_edge_is_a_fault_before_anything_is_mapped(
    make_mapping: Make, land: LentLand
) -> None:
    mapping = make_mapping(3 * PAGE)
    os.ftruncate(frames_of(mapping).segments[0].fd, PAGE)
    with pytest.raises(MemoryFault) as caught:
        lend(mapping, 10, 2 * PAGE, land)
    assert caught.value.address == mapping.address + 2 * PAGE
    assert (land.live, land_maps(), frames_of(mapping).refcount) == (0, [], 1)
    assert sorted(land._scratch.free) == list(range(SCRATCH_PAGES))  # type: ignore[union-attr]


def test_both_edges_are_copied_back_and_the_first_error_is_told(make_mapping: Make, land: LentLand) -> None:
    mapping = make_mapping(3 * PAGE)
    window = lend(mapping, 10, 2 * PAGE, land)
    window[0:2] = b"hi"
    window[2 * PAGE - 2 : 2 * PAGE] = b"yo"
    os.ftruncate(frames_of(mapping).segments[0].fd, PAGE)
    with pytest.raises(MemoryFault) as caught:
        window.drop()
    assert caught.value.address == mapping.address + 2 * PAGE + 8
    assert not window.alive
    assert os.pread(frames_of(mapping).segments[0].fd, 2, 10) == b"hi"
    assert sorted(land._scratch.free) == list(range(SCRATCH_PAGES))  # type: ignore[union-attr]


def test_what_a_collected_window_cannot_copy_back_its_call_is_told(make_mapping: Make, land: LentLand) -> None:
    class Call:
        faults: list[MemoryFault] = []  # noqa: RUF012

        def _note_fault(self, mirror: LentMapping, address: int) -> None:
            self.faults.append(mirror._memory_fault(address))

    mapping, call = make_mapping(2 * PAGE), Call()
    window = lend(mapping, 10, 20, land)
    window._tell(call)
    window[0:2] = b"hi"
    os.ftruncate(frames_of(mapping).segments[0].fd, 0)
    del window
    assert [fault.address for fault in call.faults] == [mapping.address + 10]


def test_without_space_or_a_scratch_page_nothing_is_left(make_mapping: Make) -> None:
    mapping = make_mapping(4 * PAGE)
    small, poor = LentLand(length=2 * PAGE), LentLand()
    with pytest.raises(VirtualMemoryExhaustion):
        lend(mapping, 1, 3 * PAGE, small)
    assert (frames_of(mapping).refcount, len(small._scratch.free)) == (1, SCRATCH_PAGES)
    poor._allocator = FrameAllocator(limit=0)
    with pytest.raises(realmap.PhysicalMemoryExhaustion):
        lend(mapping, 1, 3 * PAGE, poor)
    lend(mapping, 0, 3 * PAGE, poor).drop()  # no edge, no scratch page
    assert (frames_of(mapping).refcount, poor.live) == (1, 0)


def test_scratch_pages_are_as_many_as_windows_need_and_go_with_them(make_mapping: Make, land: LentLand) -> None:
    mapping = make_mapping(2 * PAGE)
    windows = [lend(mapping, 1, PAGE, land) for _ in range(SCRATCH_PAGES)]
    assert land._allocator.used == 2 * SCRATCH_PAGES * PAGE
    windows.clear()
    assert land._allocator.used == SCRATCH_PAGES * PAGE
    assert len(land._scratch.free) == SCRATCH_PAGES  # type: ignore[union-attr]
    assert bytes(SCRATCH_PAGES * PAGE) == land._scratch.frames.read(0, SCRATCH_PAGES * PAGE, 0)  # type: ignore[union-attr]


def test_a_forked_child_has_nothing_of_it_and_copies_nothing_back(make_mapping: Make, land: LentLand) -> None:
    mapping = make_mapping(2 * PAGE)
    window = lend(mapping, 100, PAGE, land)
    window[0:2] = b"hi"
    child = os.fork()
    if not child:
        held = land_maps()
        again = lend(mapping, 0, PAGE, land)  # the same land, empty, is of use to the child
        again.drop()
        window.drop()
        os._exit(0 if not held and not window.alive else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert bytes_of(mapping)[100:102] == bytes(2)
    window.drop()
    assert bytes_of(mapping)[100:102] == b"hi"


def test_threads_that_drop_one_window_at_once_do_not_take_the_page_of_another(
    make_mapping: Make, land: LentLand
) -> None:
    mapping = make_mapping(4 * PAGE)
    model = filled(mapping)
    for turn in range(50):
        windows = [lend(mapping, 10 + 100 * number, 90, land) for number in range(8)]
        for number, window in enumerate(windows):
            content = bytes([turn, number])
            window[5:7] = model[15 + 100 * number : 17 + 100 * number] = content
        in_threads(4, lambda _, windows=windows: [each.drop() for each in windows])  # type: ignore[misc]
        assert bytes_of(mapping) == model
    assert (land.live, sorted(land._scratch.free)) == (0, list(range(SCRATCH_PAGES)))  # type: ignore[union-attr]


# ---- against a model ------------------------------------------------------------------------


def run(seed: int, pages: int, fragment: int, split: int, turns: int) -> int:
    """Lends random ranges with random rights, writes through them, and compares all that either side can see."""
    rng = random.Random(seed)
    size = pages * PAGE
    land = LentLand()
    # Those beside a range are canaries, too.
    memory, frames, model = between_canaries(rng, pages, fragment, split)
    for _ in range(turns):
        offset = rng.randrange(size)
        length = min(size - offset, rng.choice((1, 2, rng.randrange(1, 64), PAGE, 3333, rng.randrange(1, size))))
        rights = rng.choice((k_r, k_w, k_rw))
        start = PAGE + offset
        with memory.mirror_mapping(AT + offset, length, kernel=land, rights=rights) as window:
            assert (window.address % PAGE, len(window)) == (offset % PAGE, length)
            lead = window.address - window._base
            around = bytes(lead), bytes(window._span - lead - length)
            if offset % PAGE == length % PAGE == 0:
                assert around == (b"", b"")
            assert pages_of(window) == around[0] + model[start : start + length] + around[1]  # type: ignore[arg-type]
            if rights & k_w:
                content = rng.randbytes(min(length, 40))
                at = rng.randrange(length - len(content) + 1)
                window[at : at + len(content)] = content
                model[start + at : start + at + len(content)] = content
                # Out of bounds, as no handler can by the window itself: into what was not lent.
                ctypes.memset(window._base, 0x55, lead)
                ctypes.memset(window.address + length, 0x55, len(around[1]))
    assert frames.read(0, frames.length, 0) == model
    memory.release_all()
    assert (frames.freed, land.live) == (True, 0)
    assert land._scratch is None or len(land._scratch.free) == SCRATCH_PAGES
    return turns


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 32), st.integers(1, 12), st.integers(1, 16), st.data())
def test_windows_show_what_a_bytearray_shows_and_zeros(
    seed: int, pages: int, fragment: int, data: st.DataObject
) -> None:
    run(seed, pages, fragment, data.draw(st.integers(0, pages)), 80)


@pytest.mark.slow
def test_windows_show_what_a_bytearray_shows_and_zeros_full_count() -> None:
    wanted, done, seed = scaled(FULL), 0, 0
    while done < wanted:
        rng = random.Random(seed)
        pages = rng.randrange(1, 17)
        done += run(seed, pages, rng.randrange(1, 20), rng.randrange(pages + 1), 200)
        seed += 1
    assert land_maps() == []
    print(f"{done} windows, 0 wrong bytes, 0 neighbours seen, 0 written")
