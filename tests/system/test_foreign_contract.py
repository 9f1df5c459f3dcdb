"""`ForeignProcess`: the contract of mirrors (the line of it is in the test's name), over processes that are no users of
a kernel: a program in C."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import pytest
from conftest import PAGE, land_maps
from strangers import FREE, KINDS, Stranger, at, other, pattern, process, require_map_files

import realmap
from realmap import (
    AccessDenied,
    ForeignProcess,
    InvalidAddress,
    InvalidMemState,
    InvalidRights,
    InvalidSize,
    MemoryType,
    ProcessKilled,
    k_r,
    k_rw,
    k_rx,
    k_w,
)
from realmap.host import procfs
from realmap.pages import USIZE_MAX

__all__ = ["other", "process"]


@pytest.mark.parametrize("kind", KINDS)
def test_line_1_shared_memory_of_every_kind_is_mirrored_in_place(
    other: Stranger, process: ForeignProcess, kind: str
) -> None:
    if kind in ("sysv", "anonymous"):  # they have no descriptor
        require_map_files()
    place = other.map(kind, 3, seed=5)
    process.mirror(place.address, 1).drop()  # for reading only, at first
    with process.mirror(place.address, 3 * PAGE, k_rw) as mirror:
        assert bytes(mirror) == pattern(3 * PAGE, 5)
        mirror[4000] = 77
        assert other.tell("get", place.address + 4000) == "77"
        other.tell("put", place.address + 4001, 78)
        assert mirror[4001] == 78
    assert land_maps() == []
    entry = at(process, place.address)
    assert (entry.kind, entry.length, entry.rights, entry.why_not) == (kind, 3 * PAGE, realmap.u_rw, "")
    assert (entry.resident, entry.offset) == (3 * PAGE, 0)
    (line,) = procfs.maps(other.pid, place.address, place.address + 1)
    assert (entry.name, entry.inode, entry.device) == (line.path, line.inode, procfs.device_number(line.device))


@pytest.mark.parametrize("kind", ["posix", "memfd", "sysv", "anonymous"])
def test_line_1_what_is_gone_by_name_and_descriptor_is_mirrored_by_root(
    other: Stranger, process: ForeignProcess, kind: str
) -> None:
    require_map_files()
    place = other.map(kind, 2, flags="u", seed=9)
    with process.mirror(place.address + PAGE, 7) as mirror:
        assert bytes(mirror) == pattern(2 * PAGE, 9)[PAGE : PAGE + 7]


def test_line_1_private_memory_is_no_shared_frames(other: Stranger, process: ForeignProcess) -> None:
    place = other.map("private", 2, seed=3)
    with pytest.raises(InvalidMemState, match="copy it") as caught:
        process.mirror(place.address + 5, 7)
    assert (caught.value.address, caught.value.type) == (place.address, MemoryType.NORMAL)
    assert process.copy_in(place.address + 5, PAGE) == pattern(2 * PAGE, 3)[5 : PAGE + 5]
    process.copy_out(place.address + 4090, b"over a border")
    assert process.copy_in(place.address + 4090, 13) == b"over a border"
    assert at(process, place.address).kind == "private"


def test_line_1_the_mirror_shares_ownership(other: Stranger, process: ForeignProcess) -> None:
    place = other.map("memfd", 2, seed=1)
    first, second = process.mirror(place.address, PAGE), process.mirror(place.address + PAGE, 1)
    frames: Any = first.mapping.frames
    assert frames is second.mapping.frames
    assert frames.refcount == 3  # and what is known of it
    first.drop()
    process.close()
    assert frames.refcount == 1
    assert second[0] == pattern(2 * PAGE, 1)[PAGE]
    second.drop()
    assert frames.freed


def test_line_2_the_offset_of_the_mapping_in_its_file(other: Stranger, process: ForeignProcess) -> None:
    place = other.map("file", 3, flags="lk", seed=21)  # from the second page of the file on
    with process.mirror(place.address + PAGE + 3, 5) as mirror:
        assert bytes(mirror) == pattern(3 * PAGE, 21)[PAGE + 3 : PAGE + 8]
        (seen,) = land_maps()
        assert (seen.offset, seen.length) == (2 * PAGE, PAGE)
        assert mirror.offset == PAGE + 3
    assert at(process, place.address).offset == PAGE


def test_lines_3_8_and_9_length_and_address_to_the_byte(other: Stranger, process: ForeignProcess) -> None:
    place = other.map("posix", 2, seed=2)
    content = pattern(2 * PAGE, 2)
    for offset, length in [(0, 1), (1, 2), (100, 3333), (4095, 2), (0, PAGE), (5, PAGE), (0, 2 * PAGE)]:
        with process.mirror(place.address + offset, length) as mirror:
            assert (len(mirror), mirror.address % PAGE) == (length, offset % PAGE)
            assert bytes(mirror) == content[offset : offset + length]


def test_lines_4_and_6_no_bytes_and_overflow(other: Stranger, process: ForeignProcess) -> None:
    place = other.map("posix", 1)
    for address in (place.address, place.address + 1, FREE):
        with pytest.raises(InvalidSize, match="no bytes"):
            process.mirror(address, 0)
    for address, length in [(place.address, USIZE_MAX), (USIZE_MAX, 2), (place.address, 1 << 64), (place.address, -1)]:
        for ask in (process.mirror, process.copy_in):
            with pytest.raises(InvalidSize):
                ask(address, length)
    for address in (-1, 1 << 64):
        with pytest.raises(InvalidAddress):
            process.mirror(address, 1)
    for wrong in (1.0, "1", None):
        with pytest.raises(TypeError, match="integer"):
            process.mirror(wrong, 1)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="integer"):
            process.mirror(place.address, wrong)  # type: ignore[arg-type]
    with process.mirror(np.int64(place.address), np.uint8(5)) as mirror:
        assert len(mirror) == 5


def test_lines_5_and_13_a_hole_is_named(other: Stranger, process: ForeignProcess) -> None:
    other.map("posix", 2, FREE)
    other.map("memfd", 1, FREE + 3 * PAGE)
    for ask in (process.mirror, process.copy_in):
        for address, length, hole in [
            (FREE, 2 * PAGE + 1, FREE + 2 * PAGE),
            (FREE + PAGE, 3 * PAGE, FREE + 2 * PAGE),
            (FREE + 2 * PAGE, 1, FREE + 2 * PAGE),
            (FREE + 3 * PAGE, PAGE + 1, FREE + 4 * PAGE),
            (FREE - 1, 2, FREE - 1),
            (0, 1, 0),
            (USIZE_MAX, 1, USIZE_MAX),
        ]:
            with pytest.raises(InvalidAddress) as caught:
                ask(address, length)
            assert caught.value.address == hole


def test_line_13_over_adjacent_mappings_it_is_one_window(other: Stranger, process: ForeignProcess) -> None:
    require_map_files()
    for number, kind in enumerate(KINDS):
        other.map(kind, 2, FREE + 2 * number * PAGE, seed=number)
    content = b"".join(pattern(2 * PAGE, number) for number in range(len(KINDS)))
    with process.mirror(FREE + 100, 10 * PAGE - 200, k_rw) as mirror:
        assert bytes(mirror) == content[100:-100]
        mirror[2 * PAGE - 110 : 2 * PAGE - 90] = b"across the border, y"
        assert len(mirror.mappings) == 5
    assert process.copy_in(FREE + 2 * PAGE - 10, 20) == b"across the border, y"
    other.map("private", 1, FREE + 10 * PAGE, seed=9)
    with pytest.raises(InvalidMemState) as caught:
        process.mirror(FREE, 11 * PAGE)
    assert caught.value.address == FREE + 10 * PAGE
    assert process.copy_in(FREE + 9 * PAGE, 2 * PAGE)[PAGE:] == pattern(PAGE, 9)


def test_line_10_rights_are_those_that_the_process_has_itself(other: Stranger, process: ForeignProcess) -> None:
    place = other.map("posix", 1, flags="r")
    process.mirror(place.address, 1).drop()
    for rights in (k_w, k_rw):
        with pytest.raises(AccessDenied, match="itself") as caught:
            process.mirror(place.address, 1, rights)
        assert (caught.value.asked, caught.value.allowed) == (rights, realmap.u_r)
    with pytest.raises(AccessDenied, match="itself"):
        process.copy_out(place.address, b"x")
    other.tell("protect", place.address, PAGE, mmap.PROT_READ | mmap.PROT_WRITE)
    with process.mirror(place.address, 1, k_w) as mirror:  # it was opened for reading before
        mirror[0] = 5
    with process.mirror(place.address, 1, k_r) as mirror, pytest.raises(AccessDenied):
        mirror[0] = 6
    other.tell("protect", place.address, PAGE, 0)
    for ask in (process.mirror, process.copy_in):
        with pytest.raises(AccessDenied, match="itself"):
            ask(place.address, 1)
    with pytest.raises(AccessDenied, match="reads and writes"):
        process.mirror(place.address, 1, k_rx)
    with pytest.raises(InvalidRights):
        process.mirror(place.address, 1, realmap.MappingAccessRights(0))


def test_line_11_and_12_it_outlives_the_mapping_and_its_process(other: Stranger, process: ForeignProcess) -> None:
    places = [other.map(kind, 1, flags="uk", seed=number) for number, kind in enumerate(KINDS[:2])]
    mirrors = [process.mirror(place.address, PAGE) for place in places]
    other.tell("unmap", places[0].address, PAGE)
    with pytest.raises(InvalidAddress):
        process.mirror(places[0].address, 1)
    other.end()
    for number, mirror in enumerate(mirrors):
        assert bytes(mirror) == pattern(PAGE, number)
        mirror.drop()
    for ask in (lambda: process.mirror(places[1].address, 1), process.mappings, lambda: process.copy_in(FREE, 1)):
        with pytest.raises(ProcessKilled, match="has ended"):
            ask()
    assert process.name == "stranger"  # also where it was never asked for
