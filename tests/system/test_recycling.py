"""Small mappings come back: parked where they are when they are unmapped, and given out again, zeroed."""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import select
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import msgspec
import pytest
import syscalls
from conftest import BOUND, PAGE, in_threads, land_maps, wait_until

import realmap
from realmap import (
    Buffer,
    InvalidAddress,
    InvalidSize,
    KernelHandle,
    Limits,
    MemoryType,
    PhysicalMemoryExhaustion,
    Process,
)
from realmap.host import forks
from realmap.memory.stock import PLACES
from realmap.user.windows import open_segment
from realmap.wire import messages


def parked() -> list[int]:
    """Where this process has parked windows."""
    return [entry.start for entry in land_maps(parked=True) if entry.perms == "---s"]


def stock(kernel: KernelHandle) -> tuple[int, int]:
    """Windows and bytes that the kernel keeps."""
    stats = kernel.stats()
    return stats["stock"], stats["stock_bytes"]


def park(me: Process, *lengths: int) -> list[int]:
    """Maps, writes and unmaps; where they were."""
    buffers = [me.map(length) for length in lengths]
    for buffer in buffers:
        buffer[:] = b"\x5a" * len(buffer)
    for buffer in buffers:
        buffer.unmap()
    return [buffer.address for buffer in buffers]


def inode(address: int) -> int:
    return next(entry.inode for entry in land_maps(parked=True) if entry.start == address)


@contextmanager
def segment_of(kernel: KernelHandle, address: int) -> Iterator[int]:
    """A descriptor of the segment that is mapped there, found as any process of this uid finds it."""
    wanted = inode(address)
    for name in os.listdir(f"/proc/{kernel.pid}/fd"):
        path = f"/proc/{kernel.pid}/fd/{name}"
        if os.path.exists(path) and os.stat(path).st_ino == wanted:
            fd = os.open(path, os.O_RDWR)
            yield fd
            os.close(fd)
            return
    raise AssertionError("the kernel has no such segment")


@pytest.mark.parametrize("length", [1, PAGE, 3333, 5 * PAGE + 1, 16 * PAGE])
def test_it_comes_back_with_its_segment_and_zeroed(me: Process, kernel: KernelHandle, length: int) -> None:
    buffer = me.map(length)
    address, segment = buffer.address, inode(buffer.address)
    buffer[:] = b"\xff" * length
    buffer.unmap()
    span = -(-length // PAGE) * PAGE
    assert (parked(), stock(kernel)) == ([address], (1, span))
    assert (kernel.stats()["segments"], kernel.stats()["bytes"]) == (0, 0)
    again = me.map(length)
    assert (again.address, inode(address), len(again)) == (address, segment, length)
    assert bytes(again) == bytes(length)
    assert (parked(), stock(kernel)) == ([], (0, 0))
    again[length - 1] = 7
    assert me.call("peek", again, 1, length - 1) == b"\x07"


def test_what_is_behind_the_length_is_zeroed_too(me: Process) -> None:
    park(me, PAGE)
    buffer = me.map(10)
    me.map(PAGE)
    assert me.query(buffer.address).length == PAGE
    buffer.unmap()
    assert bytes(me.map(PAGE)) == bytes(PAGE)


def test_nobody_is_asked_for_it(me: Process, kernel: KernelHandle) -> None:
    """The kernel does not have to wake, nor to look."""
    (address,) = park(me, PAGE)
    os.kill(kernel.pid, signal.SIGSTOP)
    try:
        for number in range(100):
            with me.map(PAGE) as buffer:
                assert (buffer.address, buffer[0]) == (address, 0)
                buffer[0] = number + 1
    finally:
        os.kill(kernel.pid, signal.SIGCONT)
    assert stock(kernel) == (1, PAGE)


def test_it_is_a_mapping_as_any_other_once_somebody_looks(me: Process, kernel: KernelHandle) -> None:
    park(me, PAGE)
    buffer = me.map(PAGE)
    assert kernel.stats()["mappings"] == 1
    assert me.query(buffer.address).type == MemoryType.HEAP
    buffer.unmap()
    assert (me.query(buffer.address).type, stock(kernel)) == (MemoryType.UNMAPPED, (1, PAGE))
    again = me.map(PAGE)
    assert me.call("peek", again, 1, 0) == b"\0"
    assert [each.address for each in kernel.snapshot().processes[0].mappings] == [again.address]
    with pytest.raises(BufferError), memoryview(again):
        again.unmap()
    del again
    gc.collect()
    wait_until(lambda: not kernel.stats()["mappings"])
    assert (parked(), stock(kernel)) == ([], (0, 0))


def test_places_of_what_is_used_for_long_are_free_again(me: Process) -> None:
    park(me, *[PAGE] * PLACES)
    live = [me.map(PAGE) for _ in range(PLACES)]
    addresses = {me.map(2 * PAGE).address for _ in range(1)}
    for _ in range(3):
        with me.map(2 * PAGE) as buffer:
            addresses.add(buffer.address)
    assert parked() == [buffer.address]
    assert len(live) == PLACES


def test_the_longest_unused_comes_first(me: Process) -> None:
    first, second, third = park(me, PAGE, PAGE, PAGE)
    buffers = [me.map(PAGE) for _ in range(3)]
    assert [buffer.address for buffer in buffers] == [first, second, third]


def test_it_serves_its_own_kind_alone(me: Process) -> None:
    (address,) = park(me, 2 * PAGE)
    others = [
        me.map(PAGE),
        me.map(3 * PAGE),
        me.map(2 * PAGE, type=MemoryType.SHARED_MEMORY),
        me.map(2 * PAGE, rights=realmap.u_r),
        me.map(2 * PAGE, commit=False),
        me.map(2 * PAGE, fragment=PAGE),
    ]
    assert all(other.address + len(other) <= address or address + 2 * PAGE <= other.address for other in others)
    assert me.map(2 * PAGE).address == address


def test_what_was_there_before_is_dead_for_good(me: Process) -> None:
    buffer = me.map(PAGE)
    part = buffer.slice(10, 100)
    buffer.unmap()
    again = me.map(PAGE)
    assert again.address == buffer.address
    for stale in (buffer, part):
        assert not stale.alive
        for use in (lambda b: b[0], lambda b: memoryview(b), lambda b: b.__setitem__(0, 1), bytes):
            with pytest.raises(BufferError):
                use(stale)
        with pytest.raises(InvalidAddress):
            me.call("peek", stale, 1, 0)
        with pytest.raises(InvalidAddress):
            me.share(stale)
        stale.unmap()  # again: nothing
    again[0] = 9
    assert again.alive


def test_nothing_is_there_while_it_is_parked(me: Process) -> None:
    (address,) = park(me, PAGE)
    assert me.query(address).type == MemoryType.UNMAPPED
    arguments = msgspec.msgpack.encode([messages.buffer_ext(address, 1), 1, 0])
    for request in (
        messages.Call(me._own_client.next_id(), "peek", msgspec.Raw(arguments)),
        messages.Unmap(me._own_client.next_id(), address, PAGE),
        messages.More(me._own_client.next_id(), address, 0),
        messages.Move(me._own_client.next_id(), address, address, address + PAGE),
        messages.Share(me._own_client.next_id(), address, 1, 3, None, None, 0.0),
    ):
        with pytest.raises(InvalidAddress):
            me._own_client.request(request)


def test_a_stale_pointer_faults(kernel: KernelHandle) -> None:
    program = f"""
        import ctypes, realmap
        me = realmap.connect({kernel.path!r})
        buffer = me.map(100)
        ctypes.string_at(buffer.address, 1)
        buffer.unmap()
        print("unmapped", flush=True)
        ctypes.string_at(buffer.address, 1)
        print("still there")
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], timeout=BOUND, capture_output=True)
    assert ended.stdout == b"unmapped\n"
    assert ended.returncode in (-signal.SIGSEGV, -signal.SIGABRT)  # a sanitizer aborts
    wait_until(lambda: kernel.stats()["processes"] == 0)


def test_a_handler_that_kept_its_buffer_is_refused(me: Process) -> None:
    buffer = me.map(PAGE)
    me.call("keep_buffer", buffer)
    buffer.unmap()
    again = me.map(PAGE)
    assert again.address == buffer.address
    with pytest.raises(InvalidAddress):
        me.call("use_kept_buffer")


# ---- what is not kept -------------------------------------------------------------------------


def shared(me: Process, buffer: Buffer) -> object:
    return me.share(buffer)


def attached_before(me: Process, buffer: Buffer) -> None:
    handle = me.share(buffer)
    with realmap.connect(me.path) as other:
        other.attach(handle).unmap()
    me.revoke(handle)


def attached_by_itself_before(me: Process, buffer: Buffer) -> None:
    handle = me.share(buffer)
    me.attach(handle).unmap()
    me.revoke(handle)


def travelled_before(me: Process, buffer: Buffer) -> None:
    pickle.loads(pickle.dumps(buffer)).unmap()
    gc.collect()


def opened(me: Process, buffer: Buffer) -> None:
    os.close(open_segment(buffer))


def forked(me: Process, buffer: Buffer) -> None:
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)


def forked_in_c(me: Process, buffer: Buffer) -> None:
    pid = ctypes.CDLL(None).fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)


OTHERS_HAD_IT: dict[str, Callable[[Process, Buffer], object]] = {
    each.__name__: each
    for each in (shared, attached_before, attached_by_itself_before, travelled_before, opened, forked, forked_in_c)
}


@pytest.mark.parametrize("how", OTHERS_HAD_IT)
def test_frames_that_others_may_have_are_not_kept(me: Process, kernel: KernelHandle, how: str) -> None:
    buffer = me.map(PAGE)
    buffer[0] = 1
    held = OTHERS_HAD_IT[how](me, buffer)
    buffer.unmap()
    assert (parked(), stock(kernel)) == ([], (0, 0))
    assert me.map(PAGE).address != buffer.address
    del held


def test_special_ones_are_not_kept(me: Process, kernel: KernelHandle) -> None:
    name = f"recycling.{os.getpid()}"
    kinds: list[dict[str, Any]] = [
        {"length": 16 * PAGE + 1},
        {"length": 2 * PAGE, "fragment": PAGE},
        {"length": PAGE, "fragment": PAGE},
        {"length": PAGE, "name": name},
        {"length": PAGE, "commit": False},
        {"length": PAGE, "rights": realmap.u_r},
        {"length": PAGE, "type": MemoryType.NORMAL},
        {"length": PAGE, "huge": True},
    ]
    for kind in kinds:
        me.map(**kind).unmap()
        assert (parked(), stock(kernel)) == ([], (0, 0)), kind


def test_what_the_collector_finds_is_not_kept(me: Process, kernel: KernelHandle) -> None:
    buffer = me.map(PAGE)
    del buffer
    gc.collect()
    wait_until(lambda: not kernel.stats()["mappings"])
    assert (parked(), stock(kernel)) == ([], (0, 0))


def test_what_a_call_works_on_is_not_kept(me: Process, kernel: KernelHandle) -> None:
    name = f"held {os.getpid()} {parked()}"
    buffer = me.map(PAGE)
    buffer[:3] = b"abc"
    thread = threading.Thread(target=lambda: me.call("hold", name, buffer))
    thread.start()
    wait_until(lambda: me.call("state", name) is not None)
    buffer.unmap()
    assert (parked(), stock(kernel)) == ([], (0, 0))
    me.call("go")
    thread.join(BOUND)
    me.call("forget", name)


def test_no_kept_mirror_outlives_the_unmapping() -> None:
    with realmap.boot(syscalls=syscalls.ALL, lazy_unmap=1 << 20) as kernel, kernel.connect() as me:
        buffer = me.map(PAGE)
        me.call("sha256", buffer)
        assert kernel.stats()["kept_windows"] == 1
        buffer.unmap()
        assert (kernel.stats()["kept_windows"], stock(kernel)) == (0, (1, PAGE))
        again = me.map(PAGE)
        again[:3] = b"new"
        assert me.call("peek", again, 3, 0) == b"new"
        assert kernel.audit()


# ---- bounds, and need -------------------------------------------------------------------------


def test_so_many_and_no_more(me: Process, kernel: KernelHandle) -> None:
    addresses = park(me, *[PAGE] * (PLACES + 5))
    assert stock(kernel) == (PLACES, PLACES * PAGE)
    assert parked() == addresses[:PLACES]
    assert kernel.audit()
    assert me.map(PAGE).address == addresses[0]


def test_another_kind_takes_the_place_of_what_was_parked_first(me: Process, kernel: KernelHandle) -> None:
    addresses = park(me, *[PAGE] * PLACES)
    park(me, 2 * PAGE)
    assert parked() == addresses[1:]
    (address,) = park(me, 2 * PAGE)
    assert parked() == [*addresses[1:], address]
    assert stock(kernel) == (PLACES, (PLACES + 1) * PAGE)
    assert park(me, 2 * PAGE) == [address]


def test_its_limit_in_bytes() -> None:
    with realmap.boot(limits=Limits(stock=5 * PAGE)) as kernel, kernel.connect() as me:
        park(me, 6 * PAGE)
        assert stock(kernel) == (0, 0)
        first, second, _ = park(me, 2 * PAGE, 2 * PAGE, 2 * PAGE)
        assert stock(kernel) == (2, 4 * PAGE)
        assert first not in parked()
        assert second in parked()
        assert kernel.audit()
        snapshot = kernel.snapshot()
        assert [each.address for each in snapshot.processes[0].stock] == parked()
        assert snapshot.limits.stock == 5 * PAGE


def test_none_at_all() -> None:
    with realmap.boot(limits=Limits(stock=0)) as kernel, kernel.connect() as me:
        park(me, PAGE, PAGE)
        assert (parked(), stock(kernel)) == ([], (0, 0))


def test_a_limit_of_its_process_refuses_nothing_for_it() -> None:
    with realmap.boot(process_limit=8 * PAGE) as kernel, kernel.connect() as me:
        park(me, *[PAGE] * 8)
        assert stock(kernel) == (8, 8 * PAGE)
        buffer = me.map(8 * PAGE)
        assert bytes(buffer) == bytes(8 * PAGE)
        assert stock(kernel) == (0, 0)
        assert kernel.audit()  # the windows are bare
        assert len(parked()) == 8
        buffer.unmap()  # its process is told
        assert (parked(), stock(kernel)) == ([buffer.address], (1, 8 * PAGE))
        assert kernel.audit()


def test_large_frames_are_taken_again_once_there_is_room() -> None:
    size = 5 << 20
    with realmap.boot(process_limit=size) as kernel, kernel.connect() as me:
        park(me, PAGE, PAGE)
        buffer = me.map(size)
        assert buffer[size - 1] == 0
        with pytest.raises(PhysicalMemoryExhaustion):
            me.map(size)
        assert kernel.audit()


def test_everybodys_gives_way_to_anybody() -> None:
    with realmap.boot(memory_limit=9 * PAGE) as kernel, kernel.connect() as rich, kernel.connect() as poor:
        (address,) = park(rich, 4 * PAGE)
        (own,) = park(poor, 2 * PAGE)
        with segment_of(kernel, address) as fd:
            assert os.fstat(fd).st_size == 4 * PAGE
            buffer = poor.map(5 * PAGE)  # its own is enough
            assert stock(kernel) == (1, 4 * PAGE)
            more = poor.map(4 * PAGE)
            assert os.fstat(fd).st_size == 0  # its pages are free, whoever maps it
        assert stock(kernel) == (0, 0)
        assert (sorted(parked()), bool(kernel.audit())) == (sorted([address, own]), True)
        with pytest.raises(PhysicalMemoryExhaustion):
            rich.map(PAGE)
        more.unmap()
        assert own not in parked()
        rich.map(PAGE).unmap()
        assert address not in parked()
        assert kernel.audit()
        buffer.unmap()


def test_a_limit_of_segments_refuses_nothing_for_it() -> None:
    with realmap.boot(limits=Limits(segments=3)) as kernel, kernel.connect() as me:
        park(me, PAGE, PAGE, PAGE)
        assert len(me.map(3 * PAGE, fragment=PAGE)) == 3 * PAGE
        assert stock(kernel) == (0, 0)


def test_a_truncated_one_is_not_given_out(me: Process, kernel: KernelHandle) -> None:
    (address,) = park(me, 3 * PAGE)
    with segment_of(kernel, address) as fd:
        os.ftruncate(fd, PAGE)
    buffer = me.map(3 * PAGE)
    assert (bytes(buffer), buffer.fault) == (bytes(3 * PAGE), None)
    assert buffer.address != address
    assert parked() == []
    me.call("poke", buffer, b"x", 2 * PAGE)
    assert buffer[2 * PAGE] == ord("x")


def test_a_faulted_one_is_not_parked(me: Process, kernel: KernelHandle) -> None:
    buffer = me.map(2 * PAGE)
    with segment_of(kernel, buffer.address) as fd:
        os.ftruncate(fd, 0)
    with pytest.raises(realmap.MemoryFault):
        buffer[0]
    buffer.unmap()
    assert (parked(), stock(kernel)) == ([], (0, 0))


# ---- ends and forks ---------------------------------------------------------------------------


def test_all_of_it_goes_with_the_connection(kernel: KernelHandle) -> None:
    with kernel.connect() as me:
        park(me, PAGE, 2 * PAGE)
        assert len(parked()) == 2
    assert parked() == []
    wait_until(lambda: stock(kernel) == (0, 0))


def test_all_of_it_goes_with_the_kernel() -> None:
    kernel = realmap.boot()
    me = kernel.connect()
    park(me, PAGE)
    live = me.map(PAGE)
    os.kill(kernel.pid, signal.SIGKILL)
    with pytest.raises(realmap.KernelDied):
        me.query(0x2000_0000_0000)
    assert parked() == []
    live.unmap()  # nobody is there to keep it
    assert land_maps(parked=True) == []
    me.close()
    kernel.shutdown()


def test_all_of_it_goes_with_its_process(kernel: KernelHandle) -> None:
    program = f"""
        import os, signal, realmap
        me = realmap.connect({kernel.path!r})
        me.map(100).unmap()
        print(flush=True)
        signal.pause()
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert stock(kernel) == (1, PAGE)
        child.kill()
    wait_until(lambda: stock(kernel) == (0, 0))
    wait_until(lambda: not kernel.stats()["processes"])


def test_a_forked_child_has_none_of_it(me: Process, kernel: KernelHandle) -> None:
    (address,) = park(me, PAGE)
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(write, bytes([len(land_maps(parked=True))]))
        os._exit(0)
    assert (os.read(read, 1), os.waitpid(pid, 0)[1]) == (b"\0", 0)
    os.close(read)
    os.close(write)
    assert parked() == []
    assert me.query(address).type == MemoryType.UNMAPPED  # behind what was said of the fork
    assert stock(kernel) == (0, 0)
    assert bytes(me.map(PAGE)) == bytes(PAGE)


def test_a_child_recycles_what_it_maps_itself(me: Process, kernel: KernelHandle) -> None:
    before = me.map(PAGE)
    before[0] = 1
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        park(me, PAGE)
        ours = me.map(PAGE)
        before.unmap()  # inherited, so its parent's as well
        os.write(write, bytes([ours[0], len(parked())]))
        os._exit(0)
    ready, _, _ = select.select([read], [], [], BOUND)
    assert ready
    assert os.read(read, 2) == b"\0\0"
    os.waitpid(pid, 0)
    os.close(read)
    os.close(write)
    assert before[0] == 1
    wait_until(lambda: kernel.stats()["processes"] == 1)


def test_what_is_used_again_is_inherited(me: Process) -> None:
    park(me, PAGE)
    buffer = me.map(PAGE)
    buffer[:3] = b"abc"
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(write, me.call("peek", buffer, 3, 0))
        os._exit(0)
    assert select.select([read], [], [], BOUND)[0]
    assert os.read(read, 3) == b"abc"
    os.waitpid(pid, 0)
    os.close(read)
    os.close(write)
    assert me.call("peek", buffer, 3, 0) == b"abc"
    buffer.unmap()
    assert parked() == []


def test_a_window_parked_behind_a_fork_in_c_is_not_used_again(me: Process) -> None:
    (address,) = park(me, PAGE)
    forked_in_c(me, me.map(2 * PAGE))
    buffer = me.map(PAGE)
    assert buffer.address != address
    assert bytes(buffer) == bytes(PAGE)
    assert parked() == []


def test_without_a_ring_nothing_is_parked() -> None:
    with realmap.boot(spin=0) as kernel, kernel.connect() as me:
        park(me, PAGE, PAGE)
        assert (parked(), stock(kernel)) == ([], (0, 0))


# ---- together ---------------------------------------------------------------------------------


def test_many_threads(me: Process, kernel: KernelHandle) -> None:
    def work(number: int) -> None:
        for turn in range(150):
            length = (PAGE, 2 * PAGE, 3333)[turn % 3]
            with me.map(length) as buffer:
                assert bytes(buffer) == bytes(length)
                buffer[:] = bytes([number + 1]) * length
                assert me.call("peek", buffer, 2, length - 2) == bytes([number + 1]) * 2
                assert bytes(buffer) == bytes([number + 1]) * length

    in_threads(4, work)
    assert not kernel.stats()["mappings"]
    assert kernel.stats()["stock"] == len(parked()) > 0


def test_forks_beside_threads_that_map_and_unmap(me: Process, kernel: KernelHandle) -> None:
    ended = threading.Event()

    def work(number: int) -> None:
        while not ended.is_set():
            with me.map(PAGE) as one, me.map(2 * PAGE) as two:
                assert (bytes(one), bytes(two)) == (bytes(PAGE), bytes(2 * PAGE))
                one[:], two[:] = bytes([number]) * PAGE, bytes([number]) * 2 * PAGE
                if number % 2:
                    assert me.call("peek", two, 1, PAGE) == bytes([number])
                assert (one[5], two[5]) == (number, number)

    threads = [threading.Thread(target=work, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(30):
            pid = forks.fork()
            if not pid:
                os._exit(len([entry for entry in land_maps(parked=True) if entry.perms == "---s"]))
            assert os.waitpid(pid, 0)[1] == 0
    finally:
        ended.set()
        for thread in threads:
            thread.join(BOUND)
    assert kernel.audit()
    wait_until(lambda: not kernel.stats()["mappings"])
    assert kernel.stats()["stock"] == len(parked())


def test_memory_is_taken_back_while_it_is_used_again() -> None:
    """Both at once, again and again: whose a window is never is in doubt."""
    with realmap.boot(memory_limit=8 * PAGE) as kernel, kernel.connect() as me, kernel.connect() as greedy:
        ended = threading.Event()
        seen: set[bytes] = set()

        def take_back() -> None:
            while not ended.is_set():
                with suppress(PhysicalMemoryExhaustion):
                    greedy.map(8 * PAGE, fragment=2 * PAGE).unmap()

        thread = threading.Thread(target=take_back)
        thread.start()
        try:
            for number in range(1, 3000):
                with suppress(PhysicalMemoryExhaustion), me.map(PAGE) as buffer:
                    seen.add(bytes(buffer[:]))
                    buffer[:] = bytes([number % 255 + 1]) * PAGE
                    assert buffer[:] == bytes([number % 255 + 1]) * PAGE
        finally:
            ended.set()
            thread.join(BOUND)
        assert seen == {bytes(PAGE)}
        assert kernel.audit()


def test_two_processes_have_each_their_own(me: Process, kernel: KernelHandle) -> None:
    (address,) = park(me, PAGE)
    with kernel.connect() as other:
        assert other.map(PAGE).address != address or inode(address) != 0
        assert parked() == [address]
    assert me.map(PAGE).address == address


def test_who_lies_about_parking_hurts_only_itself(me: Process, kernel: KernelHandle) -> None:
    with kernel.connect() as liar:
        client = liar._own_client

        def say(kind: Any, *what: Any) -> Any:
            return client.request(kind(client.next_id(), *what))[0]

        buffer = liar.map(PAGE)
        buffer[:3] = b"abc"
        address = buffer.address
        for place in (PLACES, 1 << 60):
            with pytest.raises(InvalidSize):
                say(messages.Unmap, address, PAGE, place)
        with pytest.raises(InvalidSize):
            say(messages.Unmap, address, 2 * PAGE, 3)
        say(messages.Unmap, address, PAGE, 3)  # it has it mapped as before
        assert stock(kernel) == (1, PAGE)
        with pytest.raises(InvalidAddress):
            say(messages.Unmap, address, PAGE, 4)
        with pytest.raises(InvalidAddress):
            liar.call("peek", buffer, 3, 0)
        other = liar.map(PAGE)
        with pytest.raises(InvalidSize):
            say(messages.Unmap, other.address, PAGE, 3)
        # What it has parked is not in the way of what it says that it inherited.
        assert say(messages.Adopt, me._own_client.secret, [(address, PAGE, 1)]) == [False]
        client.notice(messages.Forked(0, False))  # it has not
        liar.query(address)
        assert stock(kernel) == (0, 0)
        buffer._window._farewell(None, None, None)
    assert me.call("echo", 1) == [1]
    assert bytes(me.map(PAGE)) == bytes(PAGE)


def test_it_is_shown(me: Process, kernel: KernelHandle) -> None:
    (address,) = park(me, 3 * PAGE)
    (process,) = kernel.snapshot().processes
    (row,) = process.stock
    assert (row.address, row.length, row.inode) == (address, 3 * PAGE, inode(address))
    assert (process.bytes, process.mappings) == (0, [])
    command = [sys.executable, "-m", "realmap", "maps", str(os.getpid()), "--kernel", kernel.path]
    text = subprocess.run(command, capture_output=True, text=True, timeout=BOUND).stdout
    assert "parked" in text, text
