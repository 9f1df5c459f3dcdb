"""The contract of `CrossProcessMapping`, line by line (the number is in the test's name).

`mirror_mapping(mapping, offset, length)`:

 1  only shared frames can be mirrored, anything else is InvalidMemState; the mirror shares ownership of the frames
 2  `offset` is in bytes, and adds to the offset that the mapping itself has in its frames
 3  `length` is in bytes, and may be less than what is left of the mapping
 4  length 0 is InvalidSize, whatever the offset
 5  an end beyond the mapping is InvalidSize: the mapping's end, not that of its frames
 6  an end beyond 64 bits, or a negative number, is InvalidSize; what is no integer is TypeError
 7  phys_offset + offset beyond 64 bits is a KernelPanic: a caller's bug. The order of the checks is 1, 4, 6, 7, 5
 8  whole pages are mapped, from the page that `offset` lies in; no space for them is VirtualMemoryExhaustion
 9  `address` and len() of the mirror are to the byte, never rounded
10  the kernel's rights on it are k_rw; a caller may ask for less
11  dropping it unmaps it, and does not free the frames: their refcount does
12  it may outlive its mapping, and the process that owns that
13  by address, it goes on through mappings that follow without a gap: test_process_memory.py
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import PAGE, land_maps

from realmap.errors import (
    AccessDenied,
    InvalidMemState,
    InvalidRights,
    InvalidSize,
    KernelPanic,
    VirtualMemoryExhaustion,
)
from realmap.memory import CrossProcessMapping, KernelMemory, Mapping, MemoryType, OwnedFrames, SharedFrames
from realmap.memory.lands import KERNEL_LAND
from realmap.pages import HUGE_SIZE, USIZE_MAX
from realmap.rights import k_r, k_rw, k_rx, k_w, u_r, u_rw

Make = Callable[..., Mapping]
mirror_mapping = CrossProcessMapping.mirror_mapping


def frames_of(mapping: Mapping) -> SharedFrames:
    assert isinstance(mapping.frames, SharedFrames)
    return mapping.frames


def fill(mapping: Mapping) -> bytes:
    content = np.random.default_rng(3).integers(0, 256, frames_of(mapping).length, np.uint8).tobytes()
    frames_of(mapping).write(0, memoryview(content), 0)
    return content


@pytest.mark.parametrize("kind", [kind for kind in MemoryType if not kind.is_counted])
def test_line_1_only_shared_frames_can_be_mirrored(kind: MemoryType, kernel_memory: KernelMemory) -> None:
    frames = OwnedFrames(PAGE) if kind.has_frames else None
    mapping = Mapping(0x2000_0000_0000, frames, 0, PAGE, kind, u_rw)
    with pytest.raises(InvalidMemState) as caught:
        mirror_mapping(mapping, 0, 0, kernel=kernel_memory)  # line 1 comes before line 4
    assert (caught.value.address, caught.value.type) == (0x2000_0000_0000, kind)


def test_line_1_the_mirror_shares_ownership(make_mapping: Make, kernel_memory: KernelMemory) -> None:
    mapping = make_mapping(PAGE)
    with mirror_mapping(mapping, 0, PAGE, kernel=kernel_memory) as mirror:
        assert frames_of(mapping).refcount == 2
        assert frames_of(mapping).holders()[1] == f"mirror {mirror.address:#x}"
    assert frames_of(mapping).refcount == 1


def test_line_2_offset_adds_to_the_mappings_own(make_mapping: Make, kernel_memory: KernelMemory) -> None:
    mapping = make_mapping(2 * PAGE, phys_offset=PAGE)  # 3 frames, from the second on
    content = fill(mapping)
    with mirror_mapping(mapping, PAGE, PAGE, kernel=kernel_memory) as mirror:
        assert bytes(mirror) == content[2 * PAGE :], "the third frame"
    entry = (2 * PAGE, frames_of(mapping).segments[0].inode)
    with mirror_mapping(mapping, PAGE + 3, 5, kernel=kernel_memory) as mirror:
        assert bytes(mirror) == content[2 * PAGE + 3 : 2 * PAGE + 8]
        (seen,) = land_maps()
        assert (seen.offset, seen.inode) == entry


def test_line_3_length_in_bytes_and_smaller(make_mapping: Make, kernel_memory: KernelMemory) -> None:
    mapping = make_mapping(2 * PAGE)
    content = fill(mapping)
    for length in (1, 2, 3333, PAGE, PAGE + 1, 2 * PAGE):
        with mirror_mapping(mapping, 0, length, kernel=kernel_memory) as mirror:
            assert len(mirror) == length
            assert bytes(mirror) == content[:length]


@pytest.mark.parametrize("offset", [0, 1, PAGE, 2 * PAGE, 3 * PAGE, USIZE_MAX, -1, 1 << 70])
def test_line_4_no_bytes_whatever_the_offset(make_mapping: Make, kernel_memory: KernelMemory, offset: int) -> None:
    with pytest.raises(InvalidSize) as caught:
        mirror_mapping(make_mapping(2 * PAGE), offset, 0, kernel=kernel_memory)
    assert caught.value.size == 0


def test_line_5_the_mappings_length_threshold(make_mapping: Make, kernel_memory: KernelMemory) -> None:
    mapping = make_mapping(2 * PAGE, extra=4 * PAGE)  # a window onto larger frames
    mirror_mapping(mapping, 2 * PAGE - 1, 1, kernel=kernel_memory).drop()
    mirror_mapping(mapping, 0, 2 * PAGE, kernel=kernel_memory).drop()
    for offset, length in [(0, 2 * PAGE + 1), (1, 2 * PAGE), (2 * PAGE, 1), (2 * PAGE - 1, 2), (5 * PAGE, PAGE)]:
        with pytest.raises(InvalidSize, match="past the mapping"):
            mirror_mapping(mapping, offset, length, kernel=kernel_memory)
    assert land_maps() == []


@pytest.mark.parametrize(
    ("offset", "length"), [(1, USIZE_MAX), (USIZE_MAX, 1), (PAGE, USIZE_MAX - PAGE + 1), (1 << 64, 1), (0, 1 << 64)]
)
def test_line_6_overflow(make_mapping: Make, kernel_memory: KernelMemory, offset: int, length: int) -> None:
    with pytest.raises(InvalidSize, match="overflows"):
        mirror_mapping(make_mapping(2 * PAGE, phys_offset=PAGE), offset, length, kernel=kernel_memory)


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, -1), (-PAGE, PAGE), (-1, -1)])
def test_line_6_negative(make_mapping: Make, kernel_memory: KernelMemory, offset: int, length: int) -> None:
    with pytest.raises(InvalidSize, match="negative"):
        mirror_mapping(make_mapping(PAGE), offset, length, kernel=kernel_memory)


@pytest.mark.parametrize("bad", [1.0, "1", None, b"1", [1]])
def test_line_6_no_integer(make_mapping: Make, kernel_memory: KernelMemory, bad: Any) -> None:
    mapping = make_mapping(PAGE)
    for offset, length in [(bad, 1), (0, bad)]:
        with pytest.raises(TypeError, match="integer"):
            mirror_mapping(mapping, offset, length, kernel=kernel_memory)


def test_line_6_other_integers_are_integers(make_mapping: Make, kernel_memory: KernelMemory) -> None:
    with mirror_mapping(make_mapping(PAGE), np.int64(3), np.uint8(5), kernel=kernel_memory) as mirror:
        assert (len(mirror), mirror.address % PAGE) == (5, 3)


def test_line_7_phys_offset_overflow_is_a_panic(make_mapping: Make, kernel_memory: KernelMemory) -> None:
    mapping = make_mapping(PAGE, phys_offset=PAGE)
    with pytest.raises(KernelPanic, match="phys_offset"):
        mirror_mapping(mapping, USIZE_MAX - PAGE + 1, 1, kernel=kernel_memory)
    with pytest.raises(InvalidSize, match="past"):  # the last offset that does not overflow: line 5
        mirror_mapping(mapping, USIZE_MAX - PAGE, 1, kernel=kernel_memory)


def test_lines_are_checked_in_order_1_4_6_7_5(make_mapping: Make, kernel_memory: KernelMemory) -> None:
    mapping = make_mapping(PAGE, phys_offset=PAGE)
    owned = Mapping(0x2000_0000_0000, OwnedFrames(PAGE), 0, PAGE, MemoryType.NORMAL, u_rw)
    with pytest.raises(InvalidMemState):
        mirror_mapping(owned, -1, 0, kernel=kernel_memory)
    with pytest.raises(InvalidSize, match="no bytes"):  # 4 before 6 and 7
        mirror_mapping(mapping, USIZE_MAX, 0, kernel=kernel_memory)
    with pytest.raises(InvalidSize, match="overflows"):  # 6 before 7
        mirror_mapping(mapping, USIZE_MAX, 1, kernel=kernel_memory)
    with pytest.raises(KernelPanic):  # 7 before 5
        mirror_mapping(mapping, USIZE_MAX - 1, 1, kernel=kernel_memory)


@pytest.mark.parametrize("offset", [0, 1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE + 17])
@pytest.mark.parametrize("length", [1, 2, PAGE - 1, PAGE, PAGE + 1, 3333])
def test_line_8_whole_pages_are_mapped(
    make_mapping: Make, kernel_memory: KernelMemory, offset: int, length: int
) -> None:
    mapping = make_mapping(4 * PAGE, phys_offset=PAGE)
    with mirror_mapping(mapping, offset, length, kernel=kernel_memory) as mirror:
        (seen,) = land_maps()
        pages = -(-(offset % PAGE + length) // PAGE)
        assert seen.length == pages * PAGE
        assert seen.offset == PAGE + offset // PAGE * PAGE
        assert seen.start == mirror.address - offset % PAGE
        assert seen.perms == "rw-s"
    assert land_maps() == []


def test_line_8_no_space_is_exhaustion(make_mapping: Make) -> None:
    small = KernelMemory(length=4 * PAGE)
    mapping = make_mapping(8 * PAGE)
    with pytest.raises(VirtualMemoryExhaustion):
        mirror_mapping(mapping, 0, 4 * PAGE + 1, kernel=small)
    with mirror_mapping(mapping, 0, 4 * PAGE, kernel=small):
        with pytest.raises(VirtualMemoryExhaustion) as caught:
            mirror_mapping(mapping, 0, 1, kernel=small)
        assert caught.value.size == PAGE
        assert frames_of(mapping).refcount == 2
    with mirror_mapping(mapping, 0, 1, kernel=small), mirror_mapping(mapping, 0, 1, kernel=small):
        with pytest.raises(VirtualMemoryExhaustion):  # one page stays free between neighbours
            mirror_mapping(mapping, 0, 2 * PAGE, kernel=small)
    assert small.live == 0


def test_line_9_address_and_length_to_the_byte(make_mapping: Make, kernel_memory: KernelMemory) -> None:
    with mirror_mapping(make_mapping(2 * PAGE), PAGE + 5, 7, kernel=kernel_memory) as mirror:
        assert mirror.address == KERNEL_LAND.start + 5
        assert len(mirror) == len(bytes(mirror)) == memoryview(mirror).nbytes == 7
        gc.collect()


def test_line_10_rights(make_mapping: Make, kernel_memory: KernelMemory) -> None:
    mapping = make_mapping(PAGE, rights=u_r)  # what the kernel may do is not what the user may
    for rights, perms in [(k_rw, "rw-s"), (k_r, "r--s"), (k_w, "-w-s")]:
        with mirror_mapping(mapping, 0, PAGE, kernel=kernel_memory, rights=rights) as mirror:
            assert land_maps()[0].perms == perms
            assert mirror.rights == rights
            assert memoryview(mirror).readonly == (rights == k_r)
            gc.collect()
    with mirror_mapping(mapping, 0, PAGE, kernel=kernel_memory) as mirror:
        assert mirror.rights == k_rw
    for rights in (k_rx, u_rw, 15, 4):
        with pytest.raises((AccessDenied, InvalidRights)):
            mirror_mapping(mapping, 0, PAGE, kernel=kernel_memory, rights=rights)
    for none in (0, 64, -1):
        with pytest.raises(InvalidRights):
            mirror_mapping(mapping, 0, PAGE, kernel=kernel_memory, rights=none)


def test_line_10_a_read_only_mirror_says_so(make_mapping: Make, kernel_memory: KernelMemory) -> None:
    with mirror_mapping(make_mapping(PAGE), 0, PAGE, kernel=kernel_memory, rights=k_r) as mirror:
        with pytest.raises(AccessDenied, match="read-only"):
            mirror[0] = 1
        with pytest.raises(AccessDenied):
            mirror[0:2] = b"ab"


def test_line_11_drop_unmaps_and_does_not_free(make_mapping: Make, kernel_memory: KernelMemory) -> None:
    mapping = make_mapping(PAGE)
    mirror = mirror_mapping(mapping, 0, PAGE, kernel=kernel_memory)
    mirror[0:5] = b"stays"
    mirror.drop()
    mirror.drop()
    assert land_maps() == []
    assert (frames_of(mapping).freed, frames_of(mapping).read(0, 5, 0)) == (False, b"stays")
    assert not mirror.alive
    with pytest.raises(BufferError, match="unmapped"):
        bytes(mirror)
    with pytest.raises(BufferError):
        mirror[0]
    assert "dropped" in repr(mirror)


def test_line_11_collection_is_a_drop(make_mapping: Make, kernel_memory: KernelMemory) -> None:
    mapping = make_mapping(PAGE)
    mirror_mapping(mapping, 0, PAGE, kernel=kernel_memory)
    gc.collect()
    assert (land_maps(), frames_of(mapping).refcount, kernel_memory.live) == ([], 1, 0)


@pytest.mark.parametrize("fragment", [None, PAGE])
@pytest.mark.parametrize(
    "take",
    [
        memoryview,
        np.asarray,
        lambda m: memoryview(m)[1:3],
        lambda m: np.asarray(m)[1:3],
        lambda m: np.frombuffer(m, np.uint8),
    ],
)
def test_line_11_no_drop_while_a_view_lives(
    make_mapping: Make, kernel_memory: KernelMemory, take: Callable[[Any], Any], fragment: int | None
) -> None:
    mapping = make_mapping(3 * PAGE, fragment)
    mirror = mirror_mapping(mapping, PAGE - 2, PAGE + 4, kernel=kernel_memory)
    view = take(mirror)
    with pytest.raises(BufferError, match="still live"):
        mirror.drop()
    assert mirror.alive
    mirror[1:3] = b"ok"
    assert bytes(mirror)[1:3] == b"ok"
    assert frames_of(mapping).refcount == 2
    del view
    gc.collect()
    mirror.drop()
    assert land_maps() == []


def test_line_12_a_mirror_outlives_its_mapping(frames: Any, kernel_memory: KernelMemory) -> None:
    shared = frames.allocate(3 * PAGE, PAGE)
    mapping = Mapping(0x2000_0000_0000, shared, 0, 3 * PAGE, MemoryType.HEAP, u_rw)
    content = fill(mapping)
    mirror = mirror_mapping(mapping, 5, 2 * PAGE, kernel=kernel_memory)
    mapping.release()
    assert (shared.refcount, shared.freed) == (1, False)
    assert bytes(mirror) == content[5 : 2 * PAGE + 5]
    with pytest.raises(InvalidMemState, match="released"):
        mirror_mapping(mapping, 0, 1, kernel=kernel_memory)
    mirror.drop()
    assert shared.freed


@pytest.mark.parametrize("fragment", [PAGE, 2 * PAGE, 3 * PAGE])
def test_fragmented_frames_are_contiguous(make_mapping: Make, kernel_memory: KernelMemory, fragment: int) -> None:
    mapping = make_mapping(7 * PAGE, fragment, phys_offset=PAGE, extra=PAGE)
    content = fill(mapping)
    with mirror_mapping(mapping, PAGE + 9, 5 * PAGE, kernel=kernel_memory) as mirror:
        assert bytes(mirror) == content[2 * PAGE + 9 :][: 5 * PAGE]
        mirror[:] = bytes(5 * PAGE)
    after = frames_of(mapping).read(0, frames_of(mapping).length, 0)
    assert after[: 2 * PAGE + 9] == content[: 2 * PAGE + 9], "not a byte before it"
    assert after[7 * PAGE + 9 :] == content[7 * PAGE + 9 :], "not a byte behind it"


def test_a_long_mirror_is_congruent_modulo_huge_pages(make_mapping: Make, kernel_memory: KernelMemory) -> None:
    mapping = make_mapping(3 * HUGE_SIZE)
    for offset in (0, PAGE, HUGE_SIZE, HUGE_SIZE - PAGE):
        with mirror_mapping(mapping, offset, 2 * HUGE_SIZE, kernel=kernel_memory) as mirror:
            assert (mirror.address - offset) % HUGE_SIZE == 0


def test_a_failed_mapping_leaves_nothing(make_mapping: Make, kernel_memory: KernelMemory) -> None:
    mapping = make_mapping(3 * PAGE, PAGE)
    segment = frames_of(mapping).segments[2]
    kept, segment.fd = segment.fd, os.open("/dev/null", os.O_WRONLY)  # cannot be mapped
    try:
        with pytest.raises((AccessDenied, VirtualMemoryExhaustion, ValueError)):
            mirror_mapping(mapping, 0, 3 * PAGE, kernel=kernel_memory)
    finally:
        os.close(segment.fd)
        segment.fd = kept
    assert (land_maps(), kernel_memory.live, frames_of(mapping).refcount) == ([], 0, 1)
    mirror_mapping(mapping, 0, 3 * PAGE, kernel=kernel_memory).drop()
