"""What is lent: the plan of a range, and the window made of it, where nobody sees or changes a byte beside it."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import threading
from collections.abc import Callable

import numpy as np
import pytest
from canaries import AT, between_canaries
from conftest import PAGE, in_threads, land_maps, scaled
from forked import in_a_child
from hypothesis import given, settings
from hypothesis import strategies as st

import realmap
from realmap._core import Window
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
from realmap.pages import HUGE_SIZE
from realmap.rights import MappingAccessRights, MemoryType, k_r, k_rw, k_w, u_rw

FULL = 200_000
#: The fixture `make_mapping`.
Make = Callable[..., Mapping]


@pytest.fixture
def land() -> LentLand:
    """All of LentLand, in this process."""
    return LentLand()


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


def in_place(mapping: Mapping, window: LentMapping) -> list[bool]:
    """Of each page of a window: whether it is lent. What the caller writes now is seen there, and in no copy."""
    frames = mapping.frames
    assert isinstance(frames, realmap.memory.SharedFrames)
    before = pages_of(window)
    frames.write(0, memoryview(bytes(255 - byte for byte in bytes_of(mapping))), 0)
    after = pages_of(window)
    return [before[at : at + PAGE] != after[at : at + PAGE] for at in range(0, len(after), PAGE)]


# ---- which pages are lent -------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 6 * PAGE), st.integers(1, 6 * PAGE), st.integers(1, 12))
def test_a_page_is_lent_where_the_range_covers_all_of_it_and_no_other(offset: int, length: int, fragment: int) -> None:
    frames = FrameAllocator().allocate(12 * PAGE, fragment * PAGE)
    mapping = Mapping(AT, frames, 0, 12 * PAGE, MemoryType.HEAP, u_rw)
    filled(mapping)
    with lend(mapping, offset, length, LentLand(), k_r) as window:
        pages = range(offset // PAGE * PAGE, offset + length, PAGE)
        covered = [offset <= page and page + PAGE <= offset + length for page in pages]
        assert in_place(mapping, window) == covered
    mapping.release()


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
def test_which_pages_are_lent_at_its_boundaries(
    offset: int, length: int, shown: str, make_mapping: Make, land: LentLand
) -> None:
    mapping = make_mapping(3 * PAGE)
    filled(mapping)
    with lend(mapping, offset, length, land) as window:
        assert "".join("l" if lent else "c" for lent in in_place(mapping, window)) == shown


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
    with lend(mapping, 4 * PAGE + 5, 7, land) as window:
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


def test_what_is_written_while_an_edge_is_copied_back_is_copied_back_later(make_mapping: Make, land: LentLand) -> None:
    mapping = make_mapping(PAGE)
    window = lend(mapping, 1, PAGE - 1, land, k_rw)
    view = np.asarray(window)
    again = np.lib.stride_tricks.as_strided(view, (1000, PAGE - 1), (0, 1))  # each byte, so many times
    for _ in range(scaled(100)):
        values = np.frombuffer(os.urandom(1000), np.uint8)[:, None]
        writer = threading.Thread(target=np.copyto, args=(again, values))  # without the GIL
        writer.start()
        while writer.is_alive():
            window.copy_back()
        window.copy_back()
        assert bytes_of(mapping)[1:] == view.tobytes()
    del view, again
    window.drop()


def test_a_window_that_is_only_read_changes_nothing(make_mapping: Make, land: LentLand) -> None:
    mapping = make_mapping(2 * PAGE)
    model = filled(mapping)
    with lend(mapping, 3, PAGE, land, k_r) as window, pytest.raises(AccessDenied):
        assert {entry.perms[:3] for entry in land_maps()} == {"r--"}
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
    assert land.kept_counts().bytes == 2 * PAGE
    with lend(mapping, PAGE, 2 * PAGE, land) as window:
        assert type(window) is LentMapping
    assert land.kept_counts().hits == 1
    lend(mapping, PAGE + 1, 2 * PAGE, land).drop()
    lend(mapping, PAGE, 2 * PAGE - 1, land).drop()
    assert land.kept_counts().bytes == 2 * PAGE


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
    assert caught.value.address == mapping.address + PAGE
    assert (land.live, land_maps(), frames_of(mapping).refcount) == (0, [], 1)


@pytest.mark.parametrize(("left", "lost"), [(PAGE, 2 * PAGE + 8), (0, 10)])
def test_both_edges_are_copied_back_and_the_first_error_is_told(
    left: int, lost: int, make_mapping: Make, land: LentLand
) -> None:
    mapping = make_mapping(3 * PAGE)
    window = lend(mapping, 10, 2 * PAGE, land)
    window[0:2] = b"hi"
    window[2 * PAGE - 2 : 2 * PAGE] = b"yo"
    os.ftruncate(frames_of(mapping).segments[0].fd, left)
    with pytest.raises(MemoryFault) as caught:
        window.drop()
    assert caught.value.address == mapping.address + lost
    assert not window.alive
    window.drop()
    assert os.pread(frames_of(mapping).segments[0].fd, 2, 10) == (b"hi" if left else b"")


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


def test_edges_beyond_zero_pages_are_not_copied_back(make_mapping: Make, land: LentLand) -> None:
    mapping = make_mapping(4 * PAGE, 2 * PAGE)
    model = filled(mapping)
    window = lend(mapping, 10, 4 * PAGE - 20, land)
    window[0:2] = window[-2:] = b"hi"
    os.ftruncate(frames_of(mapping).segments[0].fd, PAGE)
    with pytest.raises(MemoryFault):
        window[PAGE]
    with pytest.raises(MemoryFault) as caught:
        window.drop()
    assert caught.value.address == mapping.address + PAGE
    model[10:12] = b"hi"
    assert os.pread(frames_of(mapping).segments[0].fd, PAGE, 0) == model[:PAGE]
    assert os.pread(frames_of(mapping).segments[1].fd, 2 * PAGE, 0) == model[2 * PAGE :]


def test_without_space_nothing_is_left(make_mapping: Make) -> None:
    mapping = make_mapping(4 * PAGE)
    small = LentLand(length=2 * PAGE)
    with pytest.raises(VirtualMemoryExhaustion):
        lend(mapping, 1, 3 * PAGE, small)
    assert (frames_of(mapping).refcount, small.live, land_maps()) == (1, 0, [])


@pytest.mark.parametrize("taken", range(3))
@pytest.mark.parametrize("fragment", [PAGE, 3 * PAGE])
def test_where_one_of_its_pages_is_somebody_elses_it_goes_to_another_place(
    taken: int, fragment: int, make_mapping: Make, land: LentLand
) -> None:
    mapping = make_mapping(3 * PAGE, fragment)
    model = filled(mapping)
    place = LENT_LAND.start + taken * PAGE
    other = Window._map(place, 0, [(-1, 0, PAGE)], 0, PAGE, 0)
    with lend(mapping, 10, 3 * PAGE - 20, land) as window:
        assert window._base > place
        assert pages_of(window)[10:-10] == model[10:-10]
    assert (frames_of(mapping).refcount, land.live) == (1, 0)
    assert [entry.start for entry in land_maps()] == [place]
    other._unmap()


def test_a_forked_child_has_nothing_of_it_and_copies_nothing_back(make_mapping: Make, land: LentLand) -> None:
    mapping = make_mapping(2 * PAGE)
    window = lend(mapping, 100, PAGE, land)
    window[0:2] = b"hi"

    def work() -> None:
        assert land_maps() == []
        lend(mapping, 0, PAGE, land).drop()  # the same land, empty, is of use to the child
        window.drop()
        assert not window.alive

    in_a_child(work)
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
    assert (land.live, frames_of(mapping).refcount) == (0, 1)


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
