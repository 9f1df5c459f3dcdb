"""Small mappings come back: parked where they are when they are unmapped, and given out again, zeroed."""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import syscalls
from conftest import BOUND, PAGE, wait_until
from parked import inode, park, parked, segment_of, stock

import realmap
from realmap import Buffer, InvalidAddress, KernelHandle, MemoryType, Process
from realmap.memory.stock import PLACES
from realmap.user.windows import open_segment
from realmap.wire import messages


@pytest.mark.parametrize("commit", [True, False])
@pytest.mark.parametrize("length", [1, PAGE, 3333, 5 * PAGE + 1, messages.RECYCLED])
def test_it_comes_back_with_its_segment_and_zeroed(
    me: Process, kernel: KernelHandle, length: int, commit: bool
) -> None:
    buffer = me.map(length, commit=commit)
    address, segment = buffer.address, inode(buffer.address)
    buffer[:] = b"\xff" * length
    buffer.unmap()
    span = -(-length // PAGE) * PAGE
    assert (parked(), stock(kernel)) == ([address], (1, span))
    assert (kernel.stats()["segments"], kernel.stats()["bytes"]) == (0, 0)
    again = me.map(length, commit=commit)
    assert (again.address, inode(address), len(again)) == (address, segment, length)
    assert bytes(again) == bytes(length)
    assert (parked(), stock(kernel)) == ([], (0, 0))
    again[length - 1] = 7
    assert me.call("peek", again, 1, length - 1) == b"\x07"


def test_what_was_not_committed_takes_no_space_while_it_is_parked(me: Process, kernel: KernelHandle) -> None:
    length = 100 * PAGE
    for touched in (length, PAGE, 0):
        buffer = me.map(length, commit=False)
        buffer[:touched] = b"\xff" * touched
        with segment_of(kernel, buffer.address) as fd:
            assert os.fstat(fd).st_blocks * 512 == touched
            buffer.unmap()
            assert (os.fstat(fd).st_blocks, parked()) == (0, [buffer.address])
    assert stock(kernel) == (1, length)
    assert kernel.audit()


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
        {"length": messages.RECYCLED + 1},
        {"length": 2 * PAGE, "fragment": PAGE},
        {"length": PAGE, "fragment": PAGE},
        {"length": PAGE, "name": name},
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


def test_a_window_parked_behind_a_fork_in_c_is_not_used_again(me: Process) -> None:
    (address,) = park(me, PAGE)
    forked_in_c(me, me.map(2 * PAGE))
    buffer = me.map(PAGE)
    assert buffer.address != address
    assert bytes(buffer) == bytes(PAGE)
    assert parked() == []
