"""KernelLand: finding space, obstacles, exhaustion, what is where."""

from __future__ import annotations

import gc
import mmap
import os
from collections.abc import Callable

import pytest
from conftest import PAGE, in_threads, land_maps
from forked import in_a_child

from realmap import _core
from realmap._core import Window
from realmap.errors import InvalidAddress, InvalidSize, KernelPanic, VirtualMemoryExhaustion
from realmap.host import procfs
from realmap.memory import KERNEL_LAND, CrossProcessMapping, KernelMemory, Mapping

Make = Callable[..., Mapping]
mirror_mapping = CrossProcessMapping.mirror_mapping
START = KERNEL_LAND.start


class Foreign(_core.Window):
    """Somebody else's map in the land."""

    __slots__ = ()


def foreign(page: int, pages: int = 1) -> Foreign:
    return Foreign._map(START + page * PAGE, mmap.PROT_READ, [(-1, 0, pages * PAGE)], 0, PAGE, 1)


def test_the_search_goes_on_from_where_it_ended(make_mapping: Make, kernel_memory: KernelMemory) -> None:
    mapping = make_mapping(PAGE)
    seen = []
    for _ in range(5):
        with mirror_mapping(mapping, 0, 1, kernel=kernel_memory) as mirror:
            seen.append(mirror.address)
    assert seen == [START + 2 * PAGE * index for index in range(5)], "a stale address faults: it is not used again"


def test_one_page_stays_free_between_neighbours(make_mapping: Make, kernel_memory: KernelMemory) -> None:
    mapping = make_mapping(3 * PAGE)
    first = mirror_mapping(mapping, 0, 3 * PAGE, kernel=kernel_memory)
    second = mirror_mapping(mapping, 0, 1, kernel=kernel_memory)
    assert second.address - (first.address + len(first)) == PAGE
    assert kernel_memory.mapping_state(START + 3 * PAGE).mirror is None
    first.drop()
    second.drop()


def test_the_last_page_of_the_land_is_used(make_mapping: Make) -> None:
    small = KernelMemory(KERNEL_LAND.end - 3 * PAGE, 3 * PAGE)
    mapping = make_mapping(PAGE)
    with mirror_mapping(mapping, 0, 1, kernel=small), mirror_mapping(mapping, 0, 1, kernel=small) as last:
        assert last.address == KERNEL_LAND.end - PAGE
        assert small.mapping_state(last.address).end == KERNEL_LAND.end


@pytest.mark.parametrize("pages", [1, 2, 7, 8])
def test_a_small_land_is_filled_and_emptied(make_mapping: Make, pages: int) -> None:
    small = KernelMemory(length=pages * PAGE)
    mapping = make_mapping(PAGE)
    for _ in range(3):
        mirrors = []
        with pytest.raises(VirtualMemoryExhaustion):
            while True:
                mirrors.append(mirror_mapping(mapping, 0, 1, kernel=small))
        assert len(mirrors) == (pages + 1) // 2
        for mirror in mirrors[::2] + mirrors[1::2]:
            mirror.drop()
        assert small.live == 0


def test_holes_between_live_mirrors_are_found(make_mapping: Make) -> None:
    small = KernelMemory(length=16 * PAGE)
    mapping = make_mapping(4 * PAGE)
    mirrors = [mirror_mapping(mapping, 0, 1, kernel=small) for _ in range(8)]
    for index in (3, 4):
        mirrors[index].drop()
    with mirror_mapping(mapping, 0, 3 * PAGE, kernel=small) as mirror:
        assert mirror.address == START + 6 * PAGE
    for mirror in mirrors:
        mirror.drop()


def test_an_obstacle_is_passed_over_and_never_replaced(make_mapping: Make) -> None:
    small = KernelMemory(length=8 * PAGE)
    mapping = make_mapping(3 * PAGE, PAGE)
    other = foreign(1, 3)
    with mirror_mapping(mapping, 0, 2 * PAGE, kernel=small) as mirror:
        assert mirror.address >= START + 4 * PAGE
    assert other.alive
    with pytest.raises(VirtualMemoryExhaustion):
        mirror_mapping(make_mapping(8 * PAGE), 0, 5 * PAGE, kernel=small)
    assert [entry.start for entry in land_maps()] == [other.address]
    other._unmap()
    with mirror_mapping(make_mapping(8 * PAGE), 0, 8 * PAGE, kernel=small) as mirror:
        assert mirror.address == START, "obstacles are tried once more before space is called exhausted"


def test_obstacles_everywhere(make_mapping: Make) -> None:
    small = KernelMemory(length=4 * PAGE)
    other = foreign(0, 4)
    with pytest.raises(VirtualMemoryExhaustion):
        mirror_mapping(make_mapping(PAGE), 0, 1, kernel=small)
    assert small.live == 0
    other._unmap()


def test_two_kernels_over_the_same_land_do_not_collide(make_mapping: Make) -> None:
    one, two = KernelMemory(length=64 * PAGE), KernelMemory(length=64 * PAGE)
    mapping = make_mapping(PAGE)
    mirrors = [mirror_mapping(mapping, 0, 1, kernel=kernel) for _ in range(12) for kernel in (one, two)]
    assert len({mirror.address for mirror in mirrors}) == 24
    for mirror in mirrors:
        mirror.drop()


def test_find_virtual_space(kernel_memory: KernelMemory) -> None:
    assert kernel_memory.find_virtual_space(PAGE) == START
    assert kernel_memory.find_virtual_space(3 * PAGE) == START + 2 * PAGE
    for bad in (0, 1, PAGE + 1, -PAGE):
        with pytest.raises(InvalidSize):
            kernel_memory.find_virtual_space(bad)
    with pytest.raises(VirtualMemoryExhaustion):
        kernel_memory.find_virtual_space(KERNEL_LAND.length + PAGE)
    assert kernel_memory.mapping_state(START) == (START, KERNEL_LAND.end, None), "nothing is taken"


def test_unmap_no_dealloc(make_mapping: Make, kernel_memory: KernelMemory) -> None:
    mapping = make_mapping(3 * PAGE)
    mirror = mirror_mapping(mapping, PAGE + 3, PAGE, kernel=kernel_memory)
    base = mirror.address - 3
    assert kernel_memory.mapping_state(base + 2 * PAGE - 1) == (base, base + 2 * PAGE, mirror)
    with pytest.raises(InvalidAddress):
        kernel_memory.unmap_no_dealloc(base + PAGE, PAGE)
    with pytest.raises(InvalidSize):
        kernel_memory.unmap_no_dealloc(base, PAGE)
    with memoryview(mirror), pytest.raises(BufferError):
        kernel_memory.unmap_no_dealloc(base, 2 * PAGE)
    kernel_memory.unmap_no_dealloc(base, 2 * PAGE)
    assert not mirror.alive
    assert mapping.frames.refcount == 1  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "region", [(START - PAGE, PAGE), (KERNEL_LAND.end, PAGE), (KERNEL_LAND.end - PAGE, 2 * PAGE), (0, 1)]
)
def test_a_region_outside_kernelland_is_a_panic(kernel_memory: KernelMemory, region: tuple[int, int]) -> None:
    with pytest.raises(KernelPanic, match="KernelLand"):
        kernel_memory.unmap_no_dealloc(*region)
    if region[1] == PAGE or not region[0]:
        with pytest.raises(KernelPanic):
            kernel_memory.mapping_state(region[0])


@pytest.mark.parametrize(
    ("start", "length", "error"),
    [
        (START + 1, PAGE, InvalidAddress),
        (START - PAGE, PAGE, InvalidAddress),
        (START, 0, InvalidSize),
        (START, PAGE + 1, InvalidSize),
        (START, -PAGE, InvalidSize),
        (START, KERNEL_LAND.length + PAGE, InvalidAddress),
        (START, 1.0, TypeError),
    ],
)
def test_a_land_that_is_none(start: int, length: int, error: type[Exception]) -> None:
    with pytest.raises(error):
        KernelMemory(start, length)


def test_the_dump_names_holes_and_mirrors(make_mapping: Make) -> None:
    small = KernelMemory(length=8 * PAGE)
    with mirror_mapping(make_mapping(PAGE), 0, 5, kernel=small) as mirror:
        lines = small.dump_kernelland_state().splitlines()
    assert f"{mirror.address:#x}" in lines[0]
    assert "hole" in lines[1]
    assert small.dump_kernelland_state().count("\n") == 0
    assert "0 mirrors" in repr(small)


def test_many_threads(make_mapping: Make) -> None:
    small = KernelMemory(length=64 * PAGE)
    mapping = make_mapping(4 * PAGE)

    def work(seed: int) -> None:
        for turn in range(400):
            with mirror_mapping(mapping, turn % 3 * PAGE, 1 + seed, kernel=small) as mirror:
                mirror[0]

    in_threads(4, work)
    assert (small.live, land_maps()) == (0, [])


def test_a_forked_child_has_no_kernelland(make_mapping: Make, kernel_memory: KernelMemory) -> None:
    mapping = make_mapping(PAGE)
    mirror = mirror_mapping(mapping, 0, PAGE, kernel=kernel_memory)

    def work() -> None:
        nonlocal mirror
        assert land_maps() == []
        mirror.drop()  # dead in the child: nothing to unmap
        with mirror_mapping(mapping, 0, 1, kernel=kernel_memory) as own:
            del mirror
            gc.collect()
            assert own.alive and len(land_maps()) == 1

    in_a_child(work)
    assert bytes(mirror) == bytes(PAGE)
    mirror.drop()


# ---- anchors -------------------------------------------------------------------------------

SLOT = 1 << 39


def anchors() -> list[int]:
    return [
        entry.start
        for entry in procfs.maps("self", KERNEL_LAND.start, KERNEL_LAND.end)
        if (entry.perms, entry.length, entry.inode) == ("---p", PAGE, 0)
    ]


def test_an_anchor_stands_above_the_mirrors_for_as_long_as_the_land(make_mapping: Callable[..., Mapping]) -> None:
    kernel = KernelMemory()
    assert (kernel._anchors(), anchors()) == ([], []), "not before there is a mirror"
    CrossProcessMapping.mirror_mapping(make_mapping(PAGE), 0, 1, kernel=kernel).drop()
    assert kernel._anchors() == anchors() == [kernel.start + SLOT - PAGE]
    pid = os.fork()
    if not pid:
        os._exit(len(anchors()) + len(kernel._anchors()))
    assert os.waitpid(pid, 0)[1] == 0, "a fork has no part in it"
    del kernel
    gc.collect()
    assert anchors() == []


def test_an_anchor_is_never_in_the_way(make_mapping: Callable[..., Mapping]) -> None:
    """Mirrors up to it, across it (they go behind it), and where it stands."""
    mapping = make_mapping(8 * PAGE)
    kernel = KernelMemory(KERNEL_LAND.start, 2 * SLOT)
    anchor = KERNEL_LAND.start + SLOT - PAGE
    CrossProcessMapping.mirror_mapping(mapping, 0, 1, kernel=kernel).drop()
    assert kernel._move(kernel._cursor, anchor - 39 * PAGE, anchor)
    made = [CrossProcessMapping.mirror_mapping(mapping, 0, 5 * PAGE, kernel=kernel) for _ in range(12)]
    assert kernel._anchors() == [anchor, anchor + SLOT]
    for mirror in made:
        assert mirror._base + 5 * PAGE <= anchor or mirror._base >= anchor + PAGE
    assert sum(mirror._base > anchor for mirror in made) == 12 - 39 // 6
    address = kernel.find_virtual_space(3 * PAGE)
    assert not address <= anchor < address + 3 * PAGE
    for mirror in made:
        mirror.drop()
    assert land_maps() == []


def test_a_small_land_has_no_anchor(make_mapping: Callable[..., Mapping]) -> None:
    kernel = KernelMemory(KERNEL_LAND.start, 64 * PAGE)
    CrossProcessMapping.mirror_mapping(make_mapping(PAGE), 0, 1, kernel=kernel).drop()
    assert (kernel._anchors(), anchors()) == ([], [])


def test_what_stands_where_an_anchor_would_is_left_alone(make_mapping: Callable[..., Mapping]) -> None:
    there = Window._map(KERNEL_LAND.start + SLOT - PAGE, 3, [(-1, 0, PAGE)], 0, PAGE, 0)
    memoryview(there)[0] = 7
    kernel = KernelMemory()
    CrossProcessMapping.mirror_mapping(make_mapping(PAGE), 0, 1, kernel=kernel).drop()
    assert kernel._anchors() == []
    assert memoryview(there)[0] == 7
    there._unmap()
