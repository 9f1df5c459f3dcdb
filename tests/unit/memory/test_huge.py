"""Huge frames and prefaulting: what they promise, and what they say where Linux gives none."""

from __future__ import annotations

import errno
import os
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import syscalls
from conftest import PAGE, land_maps
from hypothesis import given, settings
from hypothesis import strategies as st

import realmap
from realmap import InvalidMemState, InvalidSize, MemoryFault, MemoryType, PhysicalMemoryExhaustion, k_r, u_rw
from realmap.host import segment
from realmap.memory import USER_LAND, CrossProcessMapping, FrameAllocator, KernelMemory, Mapping, SharedFrames
from realmap.pages import HUGE_SIZE

Make = Callable[..., Mapping]
mirror_mapping = CrossProcessMapping.mirror_mapping
MIB = 1 << 20


def pmd_mapped(base: int) -> int:
    """Bytes of the mapping at `base` in this process that huge pages show, as Linux tells them."""
    found = re.search(rf"^{base:x}-.*?ShmemPmdMapped:\s+(\d+) kB", Path("/proc/self/smaps").read_text(), re.M | re.S)
    assert found is not None
    return int(found[1]) * 1024


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt


@pytest.fixture
def huge(frames: FrameAllocator) -> Iterator[SharedFrames]:
    """8 MiB, all of it in huge pages."""
    made = frames.allocate(4 * HUGE_SIZE, huge=True)
    if made.huge < made.length:
        del made
        pytest.skip("Linux has no huge pages to give")
    holder = Mapping(USER_LAND.start, made, 0, made.length, MemoryType.HEAP, u_rw)
    yield made
    holder.release()


def test_what_is_said_is_what_linux_says(huge: SharedFrames, kernel_memory: KernelMemory) -> None:
    mapping = Mapping(USER_LAND.start, huge, 0, huge.length, MemoryType.HEAP, u_rw)
    with mirror_mapping(mapping, 0, huge.length, kernel=kernel_memory) as mirror:
        mirror[:] = b"\1" * huge.length
        assert pmd_mapped(mirror._base) == huge.length == huge.huge
    mapping.release()


@pytest.mark.parametrize(
    ("start", "length", "offset", "size"),
    [
        (0, 4 * HUGE_SIZE, 5000, 10),
        (0, 4 * HUGE_SIZE, HUGE_SIZE - 1, 2),
        (0, 4 * HUGE_SIZE, 4 * HUGE_SIZE - 1, 1),
        (PAGE, 2 * HUGE_SIZE, 0, 1),
        (PAGE, 2 * HUGE_SIZE, 2 * HUGE_SIZE - 1, 1),
        (HUGE_SIZE + 3 * PAGE, 2 * PAGE, PAGE, 5),
    ],
)
def test_windows_are_widened_and_stay_in_the_mapping(
    huge: SharedFrames, kernel_memory: KernelMemory, start: int, length: int, offset: int, size: int
) -> None:
    mapping = Mapping(USER_LAND.start, huge, start, length, MemoryType.HEAP, u_rw)
    with mirror_mapping(mapping, offset, size, kernel=kernel_memory) as mirror:
        assert (len(mirror), mirror.offset) == (size, offset)
        first = mirror._start
        assert start <= first <= start + offset
        assert start + offset + size <= first + mirror._span <= start + length
        whole = (start + offset) // HUGE_SIZE * HUGE_SIZE
        assert first == max(start, whole)
        if mirror._span >= HUGE_SIZE:
            assert (mirror._base - first) % HUGE_SIZE == 0
        assert mirror.address == mirror._base + start + offset - first
        mirror[:] = b"x" * size
        assert huge.read(start + offset, size, 0) == b"x" * size
    mapping.release()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_bytes_are_those_of_the_frames(data: st.DataObject) -> None:
    """In one segment and in several, huge or (where Linux has none) not."""
    allocator, kernel = FrameAllocator(), KernelMemory()
    fragment = data.draw(st.sampled_from([None, HUGE_SIZE]))
    frames = allocator.allocate(3 * HUGE_SIZE, fragment, huge=True)
    start = data.draw(st.integers(0, 700)) * PAGE
    length = data.draw(st.integers(1, (frames.length - start) // PAGE)) * PAGE
    mapping = Mapping(USER_LAND.start, frames, start, length, MemoryType.HEAP, u_rw)
    offset = data.draw(st.integers(0, length - 1))
    size = data.draw(st.integers(1, min(length - offset, 3 * PAGE)))
    text = os.urandom(size)
    frames.write(start + offset, memoryview(text), 0)
    with mirror_mapping(mapping, offset, size, kernel=kernel, populate=data.draw(st.booleans())) as mirror:
        assert bytes(mirror) == text
        mirror[size // 2] = 7
        assert frames.read(start + offset + size // 2, 1, 0) == b"\7"
    assert not land_maps()
    mapping.release()
    assert allocator.used == 0


@pytest.mark.parametrize(("length", "fragment"), [(HUGE_SIZE + PAGE, None), (2 * HUGE_SIZE, PAGE), (PAGE, None)])
def test_huge_frames_come_in_huge_pages(frames: FrameAllocator, length: int, fragment: int | None) -> None:
    with pytest.raises(InvalidSize, match=str(HUGE_SIZE)):
        frames.allocate(length, fragment, huge=True)
    assert frames.used == 0


# ---- users --------------------------------------------------------------------------------


def test_a_user_maps_huge_frames(me: realmap.Process, kernel: realmap.KernelHandle) -> None:
    with me.map(5 * MIB, huge=True) as buffer:
        assert len(buffer) == 5 * MIB
        assert buffer.address % HUGE_SIZE == 0 or not buffer.huge
        assert buffer.huge in range(0, 6 * MIB + 1, HUGE_SIZE)
        assert buffer.slice(1, 2).huge == buffer.huge
        assert kernel.stats()["bytes"] == 6 * MIB, "whole huge pages"
        (segment,) = kernel.snapshot().frames[0].segments
        assert (segment.length, segment.huge) == (6 * MIB, buffer.huge)
        buffer[3 * MIB : 3 * MIB + 4] = b"data"
        assert me.call("sha256", buffer.slice(3 * MIB, 4)) == syscalls.hashlib.sha256(b"data").hexdigest()
        assert kernel.audit()
        if buffer.huge == 6 * MIB:
            memoryview(buffer)[:] = b"\1" * len(buffer)
            assert pmd_mapped(buffer.address) == 6 * MIB
    with me.map(4 * MIB, huge=True, fragment=HUGE_SIZE) as buffer:
        assert kernel.stats()["segments"] == 2
        memoryview(buffer)[:] = bytes(range(256)) * (4 * MIB // 256)
        assert (
            me.call("sha256", buffer.slice(HUGE_SIZE - 3, 6))
            == syscalls.hashlib.sha256(b"\xfd\xfe\xff\0\1\2").hexdigest()
        )
    with me.map(PAGE) as small:
        assert small.huge == 0


def test_what_cannot_be_huge(me: realmap.Process, kernel: realmap.KernelHandle) -> None:
    with pytest.raises(InvalidSize, match="multiple"):
        me.map(4 * MIB, huge=True, fragment=PAGE)
    with pytest.raises(InvalidMemState, match="huge"):
        me.map(4 * MIB, huge=True, type=MemoryType.NORMAL)
    assert kernel.stats()["bytes"] == 0


@pytest.mark.process
def test_the_limits_count_whole_huge_pages() -> None:
    with realmap.boot(process_limit=HUGE_SIZE) as kernel, kernel.connect() as me:
        with me.map(1, huge=True):
            assert kernel.stats()["bytes"] == HUGE_SIZE
        with pytest.raises(PhysicalMemoryExhaustion, match="limit"):
            me.map(HUGE_SIZE + 1, huge=True)
        assert kernel.stats()["bytes"] == 0


def test_where_linux_gives_none_it_works_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the answer of Linux is made up here."""
    monkeypatch.setattr(segment, "collapse", lambda fd, length: 0)
    with realmap.Kernel(syscalls=syscalls.ALL) as kernel, realmap.connect(kernel.path) as me:
        with me.map(3 * MIB, huge=True) as buffer:
            assert buffer.huge == 0
            buffer[:4] = b"data"
            assert me.call("sha256", buffer.slice(0, 4)) == syscalls.hashlib.sha256(b"data").hexdigest()
            mapping = next(iter(next(iter(kernel.books.processes)).memory))
            with mirror_mapping(mapping, PAGE, 1, kernel=kernel.memory) as mirror:
                assert mirror._span == PAGE, "nothing to widen it for"


def test_a_descriptor_that_cannot_be_collapsed_is_an_error_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(fd: int, length: int) -> int:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(segment, "collapse", fails)
    frames = FrameAllocator()
    with pytest.raises(PhysicalMemoryExhaustion):
        frames.allocate(2 * HUGE_SIZE, HUGE_SIZE, huge=True)
    assert (frames.used, frames.segments) == (0, 0)


# ---- prefaulting --------------------------------------------------------------------------


@pytest.mark.parametrize("fragment", [None, 3 * PAGE])
def test_a_populated_mirror_faults_no_more(
    make_mapping: Make, kernel_memory: KernelMemory, fragment: int | None
) -> None:
    mapping = make_mapping(64 * PAGE, fragment)
    for rights in (realmap.k_rw, k_r):
        with mirror_mapping(mapping, 5, 63 * PAGE, kernel=kernel_memory, rights=rights, populate=True) as mirror:
            view = memoryview(mirror)
            before = faults()
            total = sum(view[at] for at in range(0, len(view), PAGE))
            assert faults() - before < 8, total
            view.release()


def test_an_unpopulated_one_does(make_mapping: Make, kernel_memory: KernelMemory) -> None:
    mapping = make_mapping(64 * PAGE)
    with mirror_mapping(mapping, 0, 64 * PAGE, kernel=kernel_memory) as mirror:
        view = memoryview(mirror)
        before = faults()
        for at in range(0, len(view), PAGE):
            view[at] = 1
        assert faults() - before >= 64
        view.release()


def test_populating_a_kept_window(make_mapping: Make) -> None:
    kernel = KernelMemory(lazy_unmap=1 << 20)
    mapping = make_mapping(32 * PAGE)
    mirror_mapping(mapping, 0, 32 * PAGE, kernel=kernel).drop()
    with mirror_mapping(mapping, 0, 32 * PAGE, kernel=kernel, populate=True) as mirror:
        view = memoryview(mirror)
        before = faults()
        for at in range(0, len(view), PAGE):
            view[at] = 1
        assert faults() - before < 8
        view.release()
    assert kernel.kept_counts().hits == 1
    kernel._clear_kept()


@pytest.mark.parametrize("fragment", [None, 4 * PAGE])
def test_populating_what_was_truncated(make_mapping: Make, kernel_memory: KernelMemory, fragment: int | None) -> None:
    mapping = make_mapping(16 * PAGE, fragment)
    assert isinstance(mapping.frames, SharedFrames)
    os.ftruncate(mapping.frames.segments[-1].fd, PAGE)
    missing = mapping.address + mapping.length - mapping.frames.segments[-1].length + PAGE
    with pytest.raises(MemoryFault) as caught:
        mirror_mapping(mapping, 0, 16 * PAGE, kernel=kernel_memory, populate=True)
    assert caught.value.address == missing
    assert (kernel_memory.live, mapping.frames.refcount, land_maps()) == (0, 1, [])


def test_populating_without_memory(
    make_mapping: Make, kernel_memory: KernelMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(mirror: CrossProcessMapping) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    mapping = make_mapping(4 * PAGE)
    monkeypatch.setattr(CrossProcessMapping, "_populate", fails)
    with pytest.raises(PhysicalMemoryExhaustion):
        mirror_mapping(mapping, 0, 4 * PAGE, kernel=kernel_memory, populate=True)
    assert (kernel_memory.live, land_maps()) == (0, [])


def test_a_handler_populates(me: realmap.Process) -> None:
    with me.map(9 * PAGE, fragment=2 * PAGE) as buffer:
        buffer[:] = bytes(range(256)) * (9 * PAGE // 256)
        wanted = syscalls.hashlib.sha256(bytes(buffer)[7:-7]).hexdigest()
        assert me.call("sha256_populated", buffer, 7, len(buffer) - 14) == wanted
