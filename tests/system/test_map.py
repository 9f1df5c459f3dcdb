"""map, unmap, query: memory of a user process, and what it says no to."""

from __future__ import annotations

import gc
import mmap
import os
import pickle
import resource
from itertools import product
from typing import Any

import posix_ipc
import pytest
from conftest import PAGE, land_maps, tried_with, wait_until

import realmap
from realmap import (
    AccessDenied,
    InvalidAddress,
    InvalidHandle,
    InvalidMemState,
    InvalidRights,
    InvalidSize,
    KernelHandle,
    MemoryType,
    PhysicalMemoryExhaustion,
    Process,
    VirtualMemoryExhaustion,
    _core,
)
from realmap.memory import USER_LAND
from realmap.wire import messages

CARRIERS = ("ring", "socket")


class Foreign(_core.Window):
    """Somebody else's map in UserLand."""

    __slots__ = ()


@pytest.mark.parametrize(
    ("options", "faults"), [({}, False), ({"fragment": 32 * PAGE}, False), ({"commit": False}, True)]
)
def test_touching_what_was_taken_faults_no_more(me: Process, options: dict[str, Any], faults: bool) -> None:
    count = 800
    buffer = me.map(count * PAGE, **options)
    view = memoryview(buffer)
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for at in range(0, len(buffer), PAGE):
        view[at] = 1
    assert (resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before >= count // 2) is faults
    view.release()


def test_any_length_above_zero(me: Process) -> None:
    for length, fragment in product([1, PAGE - 1, PAGE, PAGE + 1, 3333333], [None, PAGE, 64 * PAGE]):
        with tried_with(length, fragment), me.map(length, fragment=fragment) as buffer:
            assert len(buffer) == length
            assert buffer.address % PAGE == 0
            assert USER_LAND.holds(buffer.address, length)
            assert sum(entry.length for entry in land_maps()) == -(-length // PAGE) * PAGE
            assert bytes(buffer) == bytes(length)
            buffer[length - 1] = 7
            info = me.query(buffer.address + length - 1)
            assert (info.address, info.length) == (buffer.address, -(-length // PAGE) * PAGE)
            assert (info.type, info.rights, info.refcount) == (MemoryType.HEAP, realmap.u_rw, 1)


def test_many_segments_come_in_batches(me: Process, kernel: KernelHandle) -> None:
    buffer = me.map(300 * PAGE, fragment=PAGE)
    assert kernel.stats()["segments"] == 300
    buffer[::PAGE] = bytes(range(100)) * 3
    assert me.call("peek", buffer, PAGE + 1, 299 * PAGE - 1)[1] == 99


def test_holes_are_queried(me: Process) -> None:
    hole = me.query(USER_LAND.start + 5)
    assert (hole.address, hole.length, hole.type) == (USER_LAND.start, USER_LAND.length, MemoryType.UNMAPPED)
    for outside in (0, USER_LAND.end, USER_LAND.start - 1, -1, 1 << 64):
        with pytest.raises(InvalidAddress):
            me.query(outside)
    with pytest.raises(TypeError):
        me.query("0")  # type: ignore[arg-type]


CANNOT_BE_MAPPED: list[tuple[dict[str, Any], type[Exception]]] = [
    ({"length": 0}, InvalidSize),
    ({"length": -1}, InvalidSize),
    ({"length": 1 << 64}, InvalidSize),
    ({"length": (1 << 64) - 1}, VirtualMemoryExhaustion),
    ({"length": USER_LAND.length + 1}, VirtualMemoryExhaustion),
    ({"length": 1 << 42}, PhysicalMemoryExhaustion),
    ({"length": 1.0}, TypeError),
    ({"length": "1"}, TypeError),
    ({"length": None}, TypeError),
    ({"fragment": 0}, InvalidSize),
    ({"fragment": 100}, InvalidSize),
    ({"fragment": -PAGE}, InvalidSize),
    ({"fragment": 1 << 64}, InvalidSize),
    ({"rights": 0}, AccessDenied),
    ({"rights": 64}, InvalidRights),
    ({"rights": realmap.k_rw}, AccessDenied),
    ({"rights": 8}, AccessDenied),
    ({"rights": "rw"}, TypeError),
    ({"type": MemoryType.UNMAPPED}, InvalidMemState),
    ({"type": MemoryType.RESERVED}, InvalidMemState),
    ({"type": MemoryType.KERNEL_STACK}, InvalidMemState),
    ({"type": 22}, TypeError),
    ({"type": MemoryType.NORMAL, "fragment": PAGE}, InvalidMemState),
    ({"name": ""}, InvalidHandle),
    ({"name": "a/b"}, InvalidHandle),
    ({"name": 5}, TypeError),
    ({"name": "fragmented", "fragment": PAGE}, InvalidSize),
]


def test_what_cannot_be_mapped(me: Process, kernel: KernelHandle) -> None:
    for arguments, error in CANNOT_BE_MAPPED:
        with tried_with(arguments):
            with pytest.raises(error) as caught:
                me.map(**({"length": 2 * PAGE} | arguments))
            assert len(str(caught.value)) > 15
            stats = kernel.stats()
            assert (stats["mappings"], stats["segments"], stats["bytes"]) == (0, 0, 0)
            assert land_maps() == []


@pytest.mark.parametrize(
    ("rights", "perms"), [(realmap.u_r, "r--s"), (realmap.u_w, "-w-s"), (realmap.u_rw, "rw-s"), (realmap.u_rx, "r-xs")]
)
def test_rights_are_page_protection(me: Process, rights: realmap.MappingAccessRights, perms: str) -> None:
    buffer = me.map(PAGE, rights=rights)
    assert [entry.perms for entry in land_maps()] == [perms]
    assert buffer.rights == rights
    assert memoryview(buffer).readonly == ("w" not in perms)
    gc.collect()


def test_every_type_with_frames(me: Process) -> None:
    for kind in [kind for kind in MemoryType if kind.has_frames]:
        with tried_with(kind), me.map(5000, type=kind) as buffer:
            buffer[4999] = 5
            assert me.query(buffer.address).type is kind
            assert (land_maps()[0].inode != 0) == kind.is_counted


def test_a_named_one_can_be_opened_by_others(me: Process) -> None:
    name = f"realmap-test-{os.getpid()}"
    with me.map(PAGE, name=name) as buffer:
        buffer[0:5] = b"named"
        shm = posix_ipc.SharedMemory("/" + name)
        with mmap.mmap(shm.fd, PAGE) as view:
            assert view[:5] == b"named"
        os.close(shm.fd)
        with pytest.raises(InvalidHandle, match="exists already"):
            me.map(PAGE, name=name)
    assert not os.path.exists("/dev/shm/" + name)


def test_without_commit_nothing_is_taken_yet(me: Process, kernel: KernelHandle) -> None:
    buffer = me.map(1 << 34, commit=False)
    buffer[(1 << 34) - 1] = 1
    assert me.call("sha256", buffer.slice((1 << 34) - 3, 3))
    assert kernel.stats()["bytes"] == 1 << 34


def test_slices(me: Process) -> None:
    buffer = me.map(1000)
    part = buffer.slice(10, 100).slice(5, 7)
    part[:] = b"sliced!"
    assert (part.address, len(part), buffer[15:22]) == (buffer.address + 15, 7, b"sliced!")
    for offset, length in [(0, 0), (0, 1001), (1000, 1), (-1, 2), (5, -1), (1 << 64, 1)]:
        with pytest.raises(InvalidSize):
            buffer.slice(offset, length)
    with pytest.raises(TypeError):
        buffer.slice(0.0, 1)  # type: ignore[arg-type]
    part.unmap()
    assert not buffer.alive
    with pytest.raises(InvalidAddress, match="unmapped"):
        buffer.slice(0, 1)


def test_a_view_of_a_slice_keeps_the_whole(me: Process) -> None:
    buffer = me.map(100)
    view = memoryview(buffer.slice(3, 5))
    with pytest.raises(BufferError):
        buffer.unmap()
    view.release()
    buffer.unmap()
    assert land_maps() == []


def test_collected_buffers_are_unmapped_here_and_there(me: Process, kernel: KernelHandle) -> None:
    part = me.map(1000).slice(5, 5)
    gc.collect()
    part[:] = b"alive"
    assert me.call("sha256", part)
    del part
    gc.collect()
    assert land_maps() == []
    wait_until(lambda: kernel.stats()["mappings"] == 0)


def test_addresses_are_not_used_again_at_once(me: Process) -> None:
    """Those that are not recycled: what is kept of them faults."""
    seen = []
    for _ in range(5):
        with me.map(messages.RECYCLED + PAGE) as buffer:
            seen.append(buffer.address)
    assert len(set(seen)) == 5


def test_something_else_is_mapped_there(me: Process, kernel: KernelHandle) -> None:
    """The kernel's books move a mapping whose place is taken in the user's process."""
    first = me.map(PAGE)
    at = first.address + PAGE
    other = Foreign._map(at, 3, [(-1, 0, 3 * PAGE)], 0, PAGE, 1)
    buffer = me.map(5 * PAGE, fragment=PAGE)
    assert buffer.address >= at + 3 * PAGE
    buffer[:] = bytes(range(256)) * (5 * PAGE // 256)
    assert me.call("sha256", buffer)
    assert other.alive
    other._unmap()


def test_two_processes_in_one(me: Process, kernel: KernelHandle) -> None:
    with kernel.connect() as other:
        ours, theirs = me.map(3 * PAGE), other.map(3 * PAGE)
        assert ours.address != theirs.address
        assert kernel.audit()


def test_closing_unmaps_what_has_no_view(kernel: KernelHandle) -> None:
    process = kernel.connect()
    dead, viewed = process.map(PAGE), process.map(PAGE)
    viewed[0:4] = b"kept"
    view = memoryview(viewed)
    process.close()
    process.close()
    assert (dead.alive, bytes(view[:4])) == (False, b"kept")
    with pytest.raises(realmap.ProcessKilled, match="closed"):
        process.map(1)
    view.release()
    del view, viewed
    gc.collect()
    assert land_maps() == []


def test_a_process_is_not_pickled(me: Process) -> None:
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(me)
