"""Public operations, each a function of its world: the pieces of realmap.memory, and, connected, a kernel."""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import mmap
import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import syscalls

import realmap
from realmap import ambient
from realmap.memory import (
    KERNEL_LAND,
    CrossProcessMapping,
    ForeignProcess,
    FrameAllocator,
    KernelMemory,
    LentLand,
    Mapping,
    MemoryType,
    ProcessMemory,
)
from realmap.memory.cross_process import mirror_parts
from realmap.shared_memory import ShareableList, SharedMemory

PAGE = realmap.PAGE_SIZE
#: How long one pair may take before it is said to hang, in seconds.
HANGS = 60.0


class Operation(NamedTuple):
    """Something public; whether it needs the connection to a kernel, whether a process starts in it."""

    run: Callable[[Any], object]
    connected: bool
    long: bool


OPERATIONS: dict[str, Operation] = {}
Run = Callable[[Any], object]


def operation(*, connected: bool = False, long: bool = False) -> Callable[[Run], Run]:
    """Enters a function of the world. It leaves that as it was, whatever comes in between."""

    def enter(run: Run) -> Run:
        OPERATIONS[run.__name__] = Operation(run, connected, long)
        return run

    return enter


class Pieces:
    """What the operations of realmap.memory work on."""

    def __init__(self) -> None:
        self.frames = FrameAllocator()
        self.one, self.four = self.frames.allocate(PAGE), self.frames.allocate(4 * PAGE, PAGE)
        self.land = KernelMemory(length=1 << 40)
        self.lazy = KernelMemory(KERNEL_LAND.start + (1 << 40), 1 << 30, lazy_unmap=1 << 20)
        self.small = KernelMemory(KERNEL_LAND.start + (1 << 41), 64 * PAGE)
        self.lent = LentLand()
        self.books = ProcessMemory(owner="of a test", allocator=self.frames)
        start, heap, rights = self.books.start, MemoryType.HEAP, realmap.u_rw
        self.short = self.books.create_regular_mapping(start, PAGE, heap, rights, frames=self.one)
        self.long = self.books.create_regular_mapping(start + PAGE, 4 * PAGE, heap, rights, frames=self.four)
        fd = os.memfd_create("interrupted")
        os.truncate(fd, PAGE)
        self.shown = mmap.mmap(fd, PAGE)  # which this process may look into as into any other
        self.place = ctypes.addressof(ctypes.c_char.from_buffer(self.shown))
        self.process = ForeignProcess(os.getpid())
        self.process.mirror(self.place, 1, realmap.k_rw).drop()

        lend(self)  # its scratch pages stay

    def state(self) -> object:
        """What must be after each pair as it was before."""
        self.one.let_go(self)  # where an exception came right before `hold` did
        refcounts = self.one.refcount, self.four.refcount
        lands = [(land.live, land.mirrors()) for land in (self.land, self.lazy, self.small, self.lent)]
        descriptors = len(os.listdir("/proc/self/fd"))
        return self.frames.used, self.frames.segments, refcounts, lands, len(self.books), descriptors


@operation()
def allocate(world: Any) -> None:
    frames = world.frames.allocate(2 * PAGE, PAGE)
    assert (frames.refcount, frames.freed, len(frames.segments)) == (0, False, 2)


@operation()
def allocate_too_much(world: Any) -> None:
    child = FrameAllocator(3 * PAGE, parent=world.frames)
    frames = child.allocate(2 * PAGE)
    try:
        child.allocate(2 * PAGE)
    except realmap.PhysicalMemoryExhaustion:
        assert child.used == frames.length
    else:
        raise AssertionError("beyond the limit")


@operation()
def count(world: Any) -> None:
    assert world.frames.used >= 5 * PAGE and world.frames.segments >= 5
    assert world.one.refcount >= 1 and len(world.one.holders()) >= 1


@operation()
def hold(world: Any) -> None:
    world.one.hold(world, "a holder")
    world.one.let_go(world)


@operation()
def read_frames(world: Any) -> None:
    world.four.write(PAGE - 2, memoryview(b"abcd"), 0)
    assert world.four.read(PAGE - 2, 4, 0) == b"abcd"
    assert world.four.truncated_at(0, 4 * PAGE) is None


@operation()
def map_and_release(world: Any) -> None:
    mapping = Mapping(0, world.four, PAGE, PAGE, MemoryType.HEAP, realmap.u_rw)
    mapping.pin()
    mapping.release()
    mapping.unpin()


@operation()
def map_and_collect(world: Any) -> None:
    Mapping(0, world.frames.allocate(PAGE), 0, PAGE, MemoryType.HEAP, realmap.u_rw)


@operation()
def mirror(world: Any) -> None:
    with CrossProcessMapping.mirror_mapping(world.short, 1, 5, kernel=world.land) as mirror:
        mirror[2] = 7
        assert mirror.alive and mirror[2] == 7


@operation()
def mirror_long(world: Any) -> None:
    CrossProcessMapping.mirror_mapping(world.long, 3, 3 * PAGE, kernel=world.land, populate=True).drop()


@operation()
def mirror_in_little_space(world: Any) -> None:
    CrossProcessMapping.mirror_mapping(world.long, 0, 4 * PAGE, kernel=world.small).drop()
    CrossProcessMapping.mirror_mapping(world.short, 0, PAGE, kernel=world.small).drop()


@operation()
def mirror_kept(world: Any) -> None:
    for length in (PAGE, 2 * PAGE):
        CrossProcessMapping.mirror_mapping(world.long, 0, length, kernel=world.lazy).drop()


@operation()
def mirror_and_collect(world: Any) -> None:
    memoryview(CrossProcessMapping.mirror_mapping(world.short, 0, PAGE, kernel=world.land)).release()


@operation()
def lend(world: Any) -> None:
    window = mirror_parts([(world.long, 5, 2 * PAGE)], kernel=world.lent)
    window[0:1] = window[-1:] = b"x"
    world.lent.settle([])
    window.drop()


@operation()
def lend_and_collect(world: Any) -> None:
    memoryview(mirror_parts([(world.long, 5, 2 * PAGE)], kernel=world.lent)).release()


@operation()
def find_space(world: Any) -> None:
    for land in (world.land, world.small):
        address = land.find_virtual_space(3 * PAGE)
        assert land.start <= address < land.land.end


@operation()
def look_at_land(world: Any) -> None:
    with CrossProcessMapping.mirror_mapping(world.long, 0, 2 * PAGE, kernel=world.small) as mirror:
        state = world.small.mapping_state(mirror.address)
        assert state == (mirror.address, mirror.address + 2 * PAGE, mirror), state
        assert mirror in world.small.mirrors()
        assert hex(mirror.address) in world.small.dump_kernelland_state()


@operation()
def unmap_no_dealloc(world: Any) -> None:
    mirror = CrossProcessMapping.mirror_mapping(world.long, 0, 2 * PAGE, kernel=world.land)
    world.land.unmap_no_dealloc(mirror.address, 2 * PAGE)
    assert not mirror.alive


@operation()
def kept_windows(world: Any) -> None:
    world.lazy.kept_counts()
    world.lazy.kept_windows()
    world.lazy._clear_kept()


@operation()
def look_at_books(world: Any) -> None:
    start = world.books.start
    assert [mapping.length for mapping in world.books] == [PAGE, 4 * PAGE]
    assert world.books.query_memory(start + PAGE) is world.long
    assert len(world.books.parts(start, 2 * PAGE)) == 2
    world.books.check_range(start, 5 * PAGE)
    with world.books.mirror_mapping(start + 5, 2 * PAGE, kernel=world.land) as mirror:
        assert len(mirror) == 2 * PAGE


@operation()
def own_land(world: Any) -> None:
    land = KernelMemory(KERNEL_LAND.start + (1 << 42), 1 << 30)
    CrossProcessMapping.mirror_mapping(world.short, 0, PAGE, kernel=land).drop()


@operation()
def look_into_a_process(world: Any) -> None:
    with ForeignProcess(os.getpid()) as process:
        with process.mirror(world.place, 5, realmap.k_rw) as mirror:
            assert len(mirror) == 5
        assert process.pid == os.getpid() and process.name


@operation()
def mirror_of_a_process(world: Any) -> None:
    with world.process.mirror(world.place + 3, 5) as mirror:
        assert len(mirror) == 5


@operation()
def copy_of_a_process(world: Any) -> None:
    assert len(world.process.copy_in(id(world), 16)) == 16
    world.process.copy_out(world.place, b"copied")


@operation()
def mappings_of_a_process(world: Any) -> None:
    assert any(each.address == world.place for each in world.process.mappings())


# ---- with a kernel --------------------------------------------------------------------------


class Connected(Pieces):
    """The same, a kernel, and a connection to it."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = realmap.boot(syscalls=syscalls.ALL, limits=realmap.Limits(calls=4096))
        os.environ[ambient.VARIABLE] = self.kernel.path
        self.me = self.kernel.connect()
        self.buffer = self.me.map(2 * PAGE)
        self.handle = self.me.share(self.buffer)
        self.block = SharedMemory(create=True, size=PAGE)
        self._folder = tempfile.TemporaryDirectory()  # made here: tempfile has plain locks
        self._numbers = itertools.count()
        for each in OPERATIONS.values():
            each.run(self)  # what is made once is made now

    def new_path(self) -> str:
        """Where nothing is yet."""
        return os.path.join(self._folder.name, str(next(self._numbers)))

    def close(self) -> None:
        """Ends it."""
        self.block.close()
        self.block.unlink()
        self.me.close()
        assert self.kernel.audit(), "the books are wrong"
        self.kernel.shutdown()
        self._folder.cleanup()


@operation(connected=True)
def stats(world: Any) -> None:
    assert world.kernel.stats()["processes"] >= 1


@operation(connected=True)
def snapshot(world: Any) -> None:
    assert world.kernel.snapshot().processes
    assert not world.kernel.has_ended and world.kernel.pid and repr(world.kernel)


@operation(connected=True)
def audit(world: Any) -> None:
    world.kernel.audit()  # what is being mapped this moment it may take for a difference


@operation(connected=True)
def trace(world: Any) -> None:
    try:
        with world.kernel.trace(world.new_path()):
            world.me.call("nop")
    except realmap.LimitReached:  # it is what was interrupted
        pass


@operation(connected=True)
def connect(world: Any) -> None:
    with world.kernel.connect() as other:
        assert other.path == world.kernel.path


@operation(connected=True)
def connect_to_ambient(world: Any) -> None:
    with realmap.connect() as other:
        other.call("nop")
    assert not ambient.process().has_ended


@operation(connected=True, long=True)
def spawn(world: Any) -> None:
    child = world.kernel.spawn(_child, 7)
    assert child.join(HANGS) == 7 and child.exitcode == 7


def _child(me: realmap.Process, status: int) -> None:
    sys.exit(status)


@operation(connected=True, long=True)
def boot_and_shut_down(world: Any) -> None:
    with realmap.boot() as other:
        assert other.stats()["processes"] == 0
        other.shutdown()
    assert other.has_ended


@operation(connected=True, long=True)
def serve_here(world: Any) -> None:
    with realmap.Kernel(path=world.new_path(), kernel_land=1 << 30) as other:
        other.loop.post(lambda: None)
        other.stop()


@operation(connected=True)
def map_and_unmap(world: Any) -> None:
    with world.me.map(PAGE) as buffer:
        buffer[:3] = b"abc"
        assert buffer[0] == 97 and bytes(memoryview(buffer)[:3]) == buffer.slice(0, 3)[:] == b"abc"


@operation(connected=True)
def map_and_drop(world: Any) -> None:
    world.me.map(PAGE)


@operation(connected=True)
def share_and_attach(world: Any) -> None:
    handle = world.me.share(world.buffer)
    with world.me.attach(handle, PAGE, 10) as same:
        assert len(same) == 10
    world.me.revoke(handle)


@operation(connected=True)
def query(world: Any) -> None:
    assert world.me.query(world.buffer.address).length == 2 * PAGE
    assert world.buffer.refcount >= 1


@operation(connected=True)
def call(world: Any) -> None:
    assert world.me.call("echo", 5, "x" * 100) == [5, "x" * 100]
    assert len(world.me.call("sha256", world.buffer)) == 64


@operation(connected=True)
def call_with_timeout(world: Any) -> None:
    assert world.me.call("slow_sha256", world.buffer, timeout=HANGS)
    try:
        world.me.call("nothing of this name", timeout=HANGS)
    except realmap.UnknownSyscall:
        pass


@operation(connected=True)
def call_long(world: Any) -> None:
    assert len(world.me.call("echo", b"x" * 200_000)[0]) == 200_000


@operation(connected=True)
def call_of_a_task(world: Any) -> None:
    if asyncio._get_running_loop() is None:  # within one there is no other
        asyncio.run(world.me.acall("nop"))


@operation(connected=True)
def pickle_buffer(world: Any) -> None:
    with pickle.loads(pickle.dumps(world.buffer)) as same:
        assert len(same) == len(world.buffer)


@operation(connected=True)
def shared_memory(world: Any) -> None:
    block = SharedMemory(create=True, size=100)
    block.buf[:3] = b"abc"
    same = SharedMemory(block.name)
    assert bytes(same.buf[:3]) == b"abc"
    same.close()
    block.close()
    block.unlink()


@operation(connected=True)
def attach_shared_memory(world: Any) -> None:
    pickle.loads(pickle.dumps(world.block)).close()
    SharedMemory(world.block.name, readonly=True)


@operation(connected=True)
def shareable_list(world: Any) -> None:
    names = ShareableList(["a", 5])
    assert list(names) == ["a", 5]
    names.shm.close()
    names.shm.unlink()
