"""Kept windows: the rules of `lazy_unmap`."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable, Iterator

import pytest
import syscalls
from conftest import PAGE, in_threads, land_maps, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st

import realmap
from realmap import InvalidSize
from realmap.memory import CrossProcessMapping, FrameAllocator, KernelMemory, Mapping, MemoryType
from realmap.memory.kernel_memory import KeptCounts
from realmap.rights import k_r, u_rw

Make = Callable[..., Mapping]
mirror_mapping = CrossProcessMapping.mirror_mapping


@pytest.fixture
def lazy() -> Iterator[KernelMemory]:
    kernel = KernelMemory(lazy_unmap=8 * PAGE)
    yield kernel
    kernel._clear_kept()
    assert kernel.live == 0


def test_a_dropped_mirror_is_kept_and_used_again(make_mapping: Make, lazy: KernelMemory) -> None:
    mapping = make_mapping(4 * PAGE)
    with mirror_mapping(mapping, 5, 7, kernel=lazy) as mirror:
        mirror[:] = b"content"
        address = mirror.address
    assert not mirror.alive
    assert mapping.frames.refcount == 1, "what is kept is no reference"  # type: ignore[union-attr]
    assert (lazy.live, len(land_maps())) == (0, 1)
    with mirror_mapping(mapping, 4, 9, kernel=lazy) as again:
        assert (again.address, bytes(again)) == (address - 1, b"\0content\0")
        assert mapping.frames.refcount == 2  # type: ignore[union-attr]
        assert lazy.kept_counts() == KeptCounts(1, 1, 0, 0, 0), "one mirror at a time: it is taken out"
    assert lazy.kept_counts() == KeptCounts(1, 1, 0, 1, PAGE)


def test_a_kept_window_serves_one_mirror_at_a_time(make_mapping: Make, lazy: KernelMemory) -> None:
    mapping = make_mapping(PAGE)
    first, second = (mirror_mapping(mapping, 0, 1, kernel=lazy) for _ in range(2))
    assert first.address != second.address
    first.drop()
    second.drop()
    assert lazy.kept_counts().windows == 1, "of one range, one window is enough"
    assert len(land_maps()) == 1


def test_rights_range_and_frames_must_be_the_same(make_mapping: Make, lazy: KernelMemory) -> None:
    one, two = make_mapping(3 * PAGE), make_mapping(3 * PAGE)
    mirror_mapping(one, PAGE, PAGE, kernel=lazy).drop()
    for mapping, offset, rights in [(one, 0, 3), (one, PAGE, k_r), (two, PAGE, 3), (one, 2 * PAGE, 3)]:
        with mirror_mapping(mapping, offset, 1, kernel=lazy, rights=rights) as mirror:
            assert mirror.rights == rights
    assert lazy.kept_counts().hits == 0


def test_a_larger_window_serves_a_smaller_range_inside(make_mapping: Make, lazy: KernelMemory) -> None:
    mapping = make_mapping(6 * PAGE, phys_offset=PAGE)
    content = os.urandom(6 * PAGE)
    with mirror_mapping(mapping, PAGE, 4 * PAGE, kernel=lazy) as mirror:
        mirror[:] = content[PAGE : 5 * PAGE]
    with mirror_mapping(mapping, 3 * PAGE + 9, 100, kernel=lazy) as mirror:
        assert bytes(mirror) == content[3 * PAGE + 9 : 3 * PAGE + 109]
        assert (len(mirror), mirror.address % PAGE) == (100, 9)
        assert len(land_maps()) == 1
    assert lazy.kept_counts() == KeptCounts(1, 1, 0, 1, 4 * PAGE), "and goes back whole"
    with mirror_mapping(mapping, 4 * PAGE, 2 * PAGE, kernel=lazy):
        assert lazy.kept_counts().hits == 1, "a range that only overlaps is none inside"


def test_the_budget_and_its_order(make_mapping: Make, lazy: KernelMemory) -> None:
    mapping = make_mapping(32 * PAGE)
    for page in range(0, 16, 2):
        mirror_mapping(mapping, page * PAGE, 1, kernel=lazy).drop()
    assert lazy.kept_counts() == KeptCounts(0, 8, 0, 8, 8 * PAGE)
    mirror_mapping(mapping, 0, 1, kernel=lazy).drop()  # used: now the youngest
    mirror_mapping(mapping, 20 * PAGE, 2 * PAGE, kernel=lazy).drop()
    assert lazy.kept_counts() == KeptCounts(1, 9, 2, 7, 8 * PAGE)
    assert [window.start // PAGE for window in lazy.kept_windows()] == [6, 8, 10, 12, 14, 0, 20]
    mirror_mapping(mapping, 0, 9 * PAGE, kernel=lazy).drop()
    assert lazy.kept_counts().bytes == 8 * PAGE, "larger than the budget: not kept, and nothing goes for it"
    assert sum(entry.length for entry in land_maps()) == 8 * PAGE


def test_nothing_survives_the_unmapping(lazy: KernelMemory, frames: FrameAllocator) -> None:
    shared = frames.allocate(2 * PAGE)
    one, two = (Mapping(0x2000_0000_0000 + at, shared, 0, 2 * PAGE, MemoryType.HEAP, u_rw) for at in (0, 1 << 20))
    mirror_mapping(one, 0, 1, kernel=lazy).drop()
    late = mirror_mapping(one, PAGE, 1, kernel=lazy)
    one.release()
    assert len(land_maps()) == 1, "the window of the mapping that went"
    late.drop()
    assert land_maps() == [], "a mirror of a mapping that is gone is not kept"
    mirror_mapping(two, 0, 1, kernel=lazy).drop()
    two.release()
    assert (shared.freed, land_maps(), lazy.kept_counts().windows) == (True, [], 0)


def test_no_drop_while_a_view_lives(make_mapping: Make, lazy: KernelMemory) -> None:
    mirror = mirror_mapping(make_mapping(PAGE), 0, 5, kernel=lazy)
    view = memoryview(mirror)
    with pytest.raises(BufferError, match="still live"):
        mirror.drop()
    view[0] = 1
    assert (mirror.alive, lazy.kept_counts().windows) == (True, 0)
    view.release()
    mirror.drop()
    assert lazy.kept_counts().windows == 1
    with pytest.raises(BufferError):
        memoryview(mirror)


def test_collected_mirrors_are_kept_too(make_mapping: Make, lazy: KernelMemory) -> None:
    mirror_mapping(make_mapping(PAGE), 0, 5, kernel=lazy)
    gc.collect()
    assert lazy.kept_counts().windows == 1


def test_kept_windows_go_before_space_is_called_exhausted(make_mapping: Make) -> None:
    small = KernelMemory(length=4 * PAGE, lazy_unmap=100 * PAGE)
    mapping = make_mapping(4 * PAGE)
    for page in (0, 2):
        mirror_mapping(mapping, page * PAGE, 1, kernel=small).drop()
    assert small.kept_counts().windows == 2
    with mirror_mapping(mapping, 0, 4 * PAGE, kernel=small) as mirror:
        assert len(mirror) == 4 * PAGE
    mapping.release()
    assert land_maps() == []


def test_fragmented_frames_are_kept_as_one_window(make_mapping: Make, lazy: KernelMemory) -> None:
    mapping = make_mapping(5 * PAGE, PAGE)
    with mirror_mapping(mapping, 10, 4 * PAGE, kernel=lazy) as mirror:
        mirror[:] = bytes(range(256)) * (4 * PAGE // 256)
    with mirror_mapping(mapping, PAGE, 10, kernel=lazy) as mirror:
        assert bytes(mirror) == (bytes(range(256)) * 99)[PAGE - 10 : PAGE]
    assert lazy.kept_counts().hits == 1


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1 << 32), budget=st.integers(1, 12))
def test_bytes_are_those_of_a_bytearray_whatever_is_kept(seed: int, budget: int) -> None:
    rng = random.Random(seed)
    kernel = KernelMemory(length=64 * PAGE, lazy_unmap=budget * PAGE)
    allocator = FrameAllocator()
    mappings = []
    for index in range(3):
        shared = allocator.allocate(6 * PAGE, rng.choice((None, PAGE)))
        mappings.append(Mapping(0x2000_0000_0000 + (index << 30), shared, 0, 6 * PAGE, MemoryType.HEAP, u_rw))
    models = [bytearray(6 * PAGE) for _ in mappings]
    live: list[CrossProcessMapping] = []
    for _ in range(60):
        which = rng.randrange(3)
        offset = rng.randrange(6 * PAGE)
        length = rng.randrange(1, 6 * PAGE - offset + 1)
        mirror = mirror_mapping(mappings[which], offset, length, kernel=kernel)
        assert bytes(mirror) == models[which][offset : offset + length]
        content = rng.randbytes(min(length, 9))
        mirror[: len(content)] = content
        models[which][offset : offset + len(content)] = content
        live.append(mirror)
        while len(live) > rng.randrange(4):
            live.pop(rng.randrange(len(live))).drop()
        assert kernel.kept_counts().bytes <= budget * PAGE
        assert sum(window.span for window in kernel.kept_windows()) == kernel.kept_counts().bytes
    for mapping in mappings:
        mapping.release()
    for mirror in live:
        mirror.drop()
    assert (land_maps(), allocator.used) == ([], 0)


def test_many_threads_share_what_is_kept(make_mapping: Make, lazy: KernelMemory) -> None:
    mapping = make_mapping(4 * PAGE)

    def work(seed: int) -> None:
        for turn in range(400):
            with mirror_mapping(mapping, (turn + seed) % 4 * PAGE, 1, kernel=lazy) as mirror:
                mirror[0]

    in_threads(4, work)
    assert lazy.kept_counts().windows <= 4


@pytest.mark.process
@pytest.mark.parametrize(
    ("value", "error"), [(-1, InvalidSize), (1 << 64, InvalidSize), ("1", TypeError), (1.5, TypeError)]
)
def test_budgets_that_are_none(value: object, error: type[Exception]) -> None:
    for make in (KernelMemory, realmap.Kernel, realmap.boot):
        with pytest.raises(error):
            make(lazy_unmap=value)  # type: ignore[operator]


@pytest.mark.process
def test_a_kernel_that_keeps(tmp_path: object) -> None:
    with realmap.boot(syscalls=syscalls.ALL, lazy_unmap=1 << 20) as kernel, kernel.connect() as me:
        buffer = me.map(3 * PAGE)
        addresses = {me.call("reverse", buffer, 5, 100)[1] for _ in range(10)}
        assert len(addresses) == 1
        stats = kernel.stats()
        assert (stats["kept_hits"], stats["kept_misses"], stats["kept_windows"]) == (9, 1, 1)
        assert kernel.audit(), "kept windows are in the books"
        child = kernel.spawn(_use_and_wait)
        wait_until(lambda: kernel.stats()["kept_windows"] == 2)
        child.kill()
        child.join()
        wait_until(lambda: kernel.stats()["kept_windows"] == 1)
        buffer.unmap()
        stats = kernel.stats()
        assert (stats["kept_windows"], stats["kept_bytes"], stats["segments"]) == (0, 0, 0)
        assert kernel.audit()


def _use_and_wait(me: realmap.Process) -> None:
    import signal

    buffer = me.map(100)
    me.call("sha256", buffer)
    signal.pause()
