"""The SIGBUS guard: a segment truncated under somebody who is using it. Nobody dies, and nobody is lied to."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from conftest import BOUND, PAGE, wait_until

import realmap
from realmap import KernelHandle, MemoryFault, Process, _core
from realmap.host import procfs
from realmap.memory import CrossProcessMapping, FrameAllocator, KernelMemory, Mapping, SharedFrames

Make = Callable[..., Mapping]
GIB = 1 << 30


def resize(mapping: Mapping, size: int, segment: int = 0) -> None:
    """Truncates, or grows, a segment of a mapping."""
    assert isinstance(mapping.frames, SharedFrames)
    os.truncate(f"/proc/self/fd/{mapping.frames.segments[segment].fd}", size)


# ---- a mirror by itself -------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, PAGE, 3 * PAGE + 17, 15 * PAGE])
def test_what_is_gone_reads_as_zeros_and_the_drop_says_so(
    kernel_memory: KernelMemory, make_mapping: Make, size: int
) -> None:
    mapping = make_mapping(16 * PAGE)
    mirror = CrossProcessMapping.mirror_mapping(mapping, 5, 16 * PAGE - 5, kernel=kernel_memory)
    mirror[:] = b"\x55" * len(mirror)
    with memoryview(mirror) as view:
        resize(mapping, size)
        whole = -(-size // PAGE) * PAGE
        seen = bytes(view)
        assert seen[: max(0, size - 5)] == b"\x55" * max(0, size - 5)
        assert not any(seen[max(0, size - 5) :])
        view[-1] = 9  # the zeros are a page like any other
        assert view[-1] == 9
    gone = mapping.address + max(whole, 5)
    assert mirror.fault == mirror.address - 5 + max(whole, 5)
    for use in (lambda: mirror[0], lambda: memoryview(mirror), lambda: mirror[3:9], lambda: mirror.__setitem__(0, 1)):
        with pytest.raises(MemoryFault) as caught:
            use()
        assert caught.value.address == gone
    with pytest.raises(MemoryFault) as caught:
        mirror.drop()
    assert caught.value.address == gone
    assert not mirror.alive
    mirror.drop()
    assert not kernel_memory.live


def test_the_access_that_hits_it_says_so(kernel_memory: KernelMemory, make_mapping: Make) -> None:
    mapping = make_mapping(4 * PAGE)
    mirror = CrossProcessMapping.mirror_mapping(mapping, 0, 4 * PAGE, kernel=kernel_memory)
    resize(mapping, 0)
    with pytest.raises(MemoryFault, match="truncated"):
        mirror[2 * PAGE]
    with pytest.raises(MemoryFault):
        mirror.drop()
    mirror = CrossProcessMapping.mirror_mapping(mapping, 0, 4 * PAGE, kernel=kernel_memory)
    with pytest.raises(MemoryFault):
        mirror[PAGE : PAGE + 3] = b"abc"
    with pytest.raises(MemoryFault), mirror:
        pass


def test_untouched_is_no_fault(kernel_memory: KernelMemory, make_mapping: Make) -> None:
    mapping = make_mapping(4 * PAGE)
    before = _core.faults()
    with CrossProcessMapping.mirror_mapping(mapping, 0, 4 * PAGE, kernel=kernel_memory) as mirror:
        mirror[0] = 1
        resize(mapping, PAGE)
        assert mirror[0] == 1
    assert _core.faults() == before


def test_a_hole_and_a_shrink_undone_read_as_zeros(kernel_memory: KernelMemory, make_mapping: Make) -> None:
    mapping = make_mapping(4 * PAGE)
    with CrossProcessMapping.mirror_mapping(mapping, 0, 4 * PAGE, kernel=kernel_memory) as mirror:
        mirror[:] = b"x" * len(mirror)
        resize(mapping, 0)
        resize(mapping, 4 * PAGE)
        assert mirror[:] == bytes(4 * PAGE)
        mirror[:] = b"y" * len(mirror)
        assert mirror.fault is None


def test_the_frames_can_be_used_again_once_they_are_whole(kernel_memory: KernelMemory, make_mapping: Make) -> None:
    mapping = make_mapping(2 * PAGE)
    with pytest.raises(MemoryFault), CrossProcessMapping.mirror_mapping(mapping, 0, 9, kernel=kernel_memory) as mirror:
        resize(mapping, 0)
        mirror[0]
    resize(mapping, 2 * PAGE)
    with CrossProcessMapping.mirror_mapping(mapping, 0, 9, kernel=kernel_memory) as mirror:
        mirror[0] = 3
        assert mirror[0] == 3


def test_only_the_window_that_was_touched(kernel_memory: KernelMemory, make_mapping: Make) -> None:
    short, other = make_mapping(2 * PAGE), make_mapping(2 * PAGE)
    mirrors = [CrossProcessMapping.mirror_mapping(short, 0, 2 * PAGE, kernel=kernel_memory) for _ in range(3)]
    with CrossProcessMapping.mirror_mapping(other, 0, 2 * PAGE, kernel=kernel_memory) as fine:
        fine[:] = b"z" * len(fine)
        resize(short, PAGE)
        with pytest.raises(MemoryFault):
            mirrors[1][PAGE]
        assert [mirror.fault is None for mirror in mirrors] == [True, False, True]
        assert fine[:] == b"z" * len(fine)
    for mirror in mirrors:
        with suppress(MemoryFault):
            mirror.drop()


def test_in_segments_the_rest_of_the_window_goes(kernel_memory: KernelMemory, make_mapping: Make) -> None:
    mapping = make_mapping(6 * PAGE, PAGE)
    mirror = CrossProcessMapping.mirror_mapping(mapping, 0, 6 * PAGE, kernel=kernel_memory)
    mirror[:] = b"s" * len(mirror)
    resize(mapping, 0, segment=2)
    with memoryview(mirror) as view:
        assert bytes(view) == b"s" * 2 * PAGE + bytes(4 * PAGE)
    with pytest.raises(MemoryFault) as caught:
        mirror.drop()
    assert caught.value.address == mapping.address + 2 * PAGE


@pytest.mark.parametrize("backwards", [False, True])
def test_a_window_of_gigabytes_at_alternate_pages(
    kernel_memory: KernelMemory, frames: FrameAllocator, backwards: bool
) -> None:
    shared = frames.allocate(2 * GIB, commit=False)
    mapping = Mapping(0x2000_0000_0000, shared, 0, 2 * GIB, realmap.MemoryType.HEAP, realmap.u_rw)
    mirror = CrossProcessMapping.mirror_mapping(mapping, 0, 2 * GIB, kernel=kernel_memory)
    resize(mapping, 0)
    pages = range(0, 2 * GIB, 64 * PAGE)
    with memoryview(mirror) as view:
        for at in reversed(pages) if backwards else pages:
            assert view[at] == 0
    maps = procfs.maps("self", mirror._base, mirror._base + mirror._span)
    assert len(maps) == 1
    with pytest.raises(MemoryFault):
        mirror.drop()
    mapping.release()


def test_a_window_that_faulted_is_not_kept(make_mapping: Make) -> None:
    memory = KernelMemory(lazy_unmap=1 << 20)
    mapping = make_mapping(4 * PAGE)
    with CrossProcessMapping.mirror_mapping(mapping, 0, 4 * PAGE, kernel=memory) as mirror:
        base = mirror._base
    resize(mapping, 0)  # while it is kept
    again = CrossProcessMapping.mirror_mapping(mapping, 0, 4 * PAGE, kernel=memory)
    assert again._base == base
    with pytest.raises(MemoryFault):
        again[PAGE]
    with pytest.raises(MemoryFault):
        again.drop()
    assert memory.kept_counts().windows == 0
    resize(mapping, 4 * PAGE)
    with CrossProcessMapping.mirror_mapping(mapping, 0, 4 * PAGE, kernel=memory) as mirror:
        mirror[:] = b"k" * len(mirror)


def test_threads_without_the_gil(kernel_memory: KernelMemory, make_mapping: Make) -> None:
    numpy = pytest.importorskip("numpy")
    mapping = make_mapping(1 << 24)
    mirror = CrossProcessMapping.mirror_mapping(mapping, 0, 1 << 24, kernel=kernel_memory)
    mirror[:] = b"\1" * len(mirror)
    words = numpy.frombuffer(mirror, dtype=numpy.uint8)
    sums: list[int] = []
    start = threading.Barrier(5)

    def work(words: Any) -> None:
        start.wait(BOUND)
        for _ in range(5):
            sums.append(int(words.sum()))

    threads = [threading.Thread(target=work, args=(words,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    start.wait(BOUND)
    resize(mapping, PAGE)
    for thread in threads:
        thread.join(BOUND)
    assert len(sums) == 20
    assert int(words.sum()) == PAGE
    del words, threads, thread
    with pytest.raises(MemoryFault):
        mirror.drop()


def test_in_a_forked_child(kernel: KernelHandle, me: Process) -> None:
    buffer = me.map(4 * PAGE)
    child = os.fork()
    if not child:
        try:
            me_too = buffer._window
            view = memoryview(buffer)
            os.kill(os.getpid(), signal.SIGSTOP)
            os._exit(sum(view[::PAGE]) + (me_too.fault is None))
        except BaseException:
            os._exit(99)
    os.waitpid(child, os.WUNTRACED)
    me.call("resize", buffer, 0)
    os.kill(child, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert buffer.fault is None  # nobody touched it here


# ---- a call -------------------------------------------------------------------------------


@pytest.fixture
def buffer(me: Process) -> Iterator[realmap.Buffer]:
    """16 pages of ones."""
    with me.map(16 * PAGE) as found:
        found[:] = b"\1" * len(found)
        yield found


@pytest.mark.parametrize("name", ["truncate_and_sum", "slow_truncate_and_sum"])
@pytest.mark.parametrize("how", ["dropped", "collected", "raises", "forgives", "kept", "written"])
@pytest.mark.parametrize("size", [0, 3 * PAGE])
def test_the_call_ends_in_a_fault(
    kernel: KernelHandle, me: Process, buffer: realmap.Buffer, name: str, how: str, size: int
) -> None:
    try:
        if how == "written" and size:  # as much as is there was written: write(2) says how much, and nothing is wrong
            assert me.call(name, buffer, size, how) == size
        else:
            with pytest.raises(MemoryFault) as caught:
                me.call(name, buffer, size, how)
            assert caught.value.address == buffer.address + size
        assert me.call("echo", 1) == [1]
    finally:
        me.call("forget", "short")
    with me.map(PAGE) as other:  # whatever was mapped there, it is another's now
        other[:] = b"\2" * PAGE
        assert me.call("peek", other, 3, 0) == b"\2\2\2"
    assert kernel.audit()


def test_copies_say_so(me: Process, buffer: realmap.Buffer) -> None:
    me.call("resize", buffer, PAGE)
    assert me.call("peek", buffer, PAGE, 0) == b"\1" * PAGE
    for name, args in (("peek", (2, PAGE)), ("poke", (b"xy", 2 * PAGE)), ("peek", (None, 0))):
        with pytest.raises(MemoryFault) as caught:
            me.call(name, buffer, *args)
        assert caught.value.address >= buffer.address + PAGE


def test_a_mirror_of_an_earlier_call(kernel: KernelHandle, me: Process, buffer: realmap.Buffer) -> None:
    me.call("keep_view", buffer)
    assert me.call("sum_kept") == 16
    me.call("resize", buffer, PAGE)
    with pytest.raises(MemoryFault) as caught:
        me.call("sum_kept")
    assert caught.value.address == buffer.address + PAGE
    report = kernel.audit()
    assert report, str(report)
    assert [(found.where, found.length) for found in report.faulted] == [("KernelLand", 15 * PAGE)]
    assert "truncated" in me.call("end_kept")


def test_calls_beside_it_do_not_suffer(kernel: KernelHandle, me: Process, buffer: realmap.Buffer) -> None:
    """Another's fault on the same kernel, at the same moment, is not one's own."""
    me.call("echo", 0)
    with me.map(PAGE) as mine:
        thread = threading.Thread(target=lambda: me.call("hold", "beside", mine))
        thread.start()
        wait_until(lambda: me.call("state", "beside") == "waiting", "the handler")
        with pytest.raises(MemoryFault):
            me.call("truncate_and_sum", buffer, 0, "dropped")
        me.call("go")
        thread.join(BOUND)
        assert me.call("state", "beside") not in (None, "waiting")


def test_a_mirror_that_was_kept_is_not_a_bystanders(kernel: KernelHandle, me: Process, buffer: realmap.Buffer) -> None:
    """Another's call that ends meanwhile is not told of it; the one that touched it is."""
    me.call("keep_view", buffer)
    told: list[object] = []

    def call() -> None:
        try:
            told.append(me.call("slow_sum_kept"))
        except MemoryFault as error:
            told.append(error)

    with me.map(PAGE) as mine:
        beside = threading.Thread(target=lambda: told.append(me.call("hold", "bystander", mine)))
        beside.start()
        wait_until(lambda: me.call("state", "bystander") == "waiting", "the bystander")
        me.call("resize", buffer, PAGE)
        toucher = threading.Thread(target=call)
        toucher.start()
        wait_until(lambda: me.call("state", "sum") == "waiting", "the toucher")
        me.call("go")  # both wait for one each: they end in any order
        me.call("go")
        beside.join(BOUND)
        toucher.join(BOUND)
    assert sorted(type(each).__name__ for each in told) == ["MemoryFault", "str"]
    me.call("end_kept")


@pytest.mark.parametrize("how", ["collected", "dropped"])
def test_a_mirror_that_was_kept_and_goes_in_the_call(me: Process, buffer: realmap.Buffer, how: str) -> None:
    me.call("keep", "going", buffer)
    me.call("resize", buffer, PAGE)
    with pytest.raises(MemoryFault) as caught:
        me.call("sum_and_let_go", "going", how)
    assert caught.value.address == buffer.address + PAGE
    assert me.call("echo", 1) == [1]


def test_what_a_handler_keeps_under_its_process_goes_with_it(kernel: KernelHandle, me: Process) -> None:
    pid = os.fork()
    if not pid:
        with suppress(BaseException), realmap.connect(kernel.path) as process:
            process.call("keep_by_process", process.map(1 << 20))
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(1)
    os.waitpid(pid, 0)
    wait_until(lambda: kernel.stats()["processes"] == 1)
    me.call("collect")
    wait_until(lambda: kernel.stats()["mirrors"] == 0)
    assert kernel.stats()["segments"] == 0


# ---- a user's own mapping -----------------------------------------------------------------


def test_a_users_own_buffer_says_so(kernel: KernelHandle, me: Process, buffer: realmap.Buffer) -> None:
    part, front = buffer.slice(5 * PAGE, 10), buffer.slice(0, 10)
    view = memoryview(buffer)
    me.call("resize", buffer, PAGE)
    assert view[0] == 1
    assert view[2 * PAGE] == 0
    view.release()
    assert buffer.fault == buffer.address + 2 * PAGE
    for use in (lambda: buffer[0], lambda: part[0], lambda: memoryview(part), lambda: me.call("echo", buffer)):
        with pytest.raises(MemoryFault):
            use()
    assert front[:] == b"\1" * 10
    assert me.call("peek", front, 3, 0) == b"\1\1\1"
    report = kernel.audit()
    assert report, str(report)
    assert [found.length for found in report.faulted] == [14 * PAGE]
    buffer.unmap()
    with pytest.raises(BufferError):
        buffer[0]


def test_the_use_that_hits_it_says_so(me: Process, buffer: realmap.Buffer) -> None:
    me.call("resize", buffer, 0)
    with pytest.raises(MemoryFault) as caught:
        buffer[PAGE]
    assert caught.value.address == buffer.address + PAGE
    assert "unmap" in str(caught.value)


def test_a_named_segment_truncated_by_anybody(me: Process) -> None:
    name = f"realmap-test-{os.getpid()}"
    with me.map(4 * PAGE, name=name) as buffer:
        os.truncate(f"/dev/shm/{name}", 0)
        with pytest.raises(MemoryFault):
            me.call("sha256", buffer)
        with pytest.raises(MemoryFault):
            buffer[0] = 1
