"""Blocks that are made and gone again and again: windows that are parked, and names that are told when asked for."""

from __future__ import annotations

import os
import random
import signal
import threading

import pytest
from blocks import exists
from conftest import BOUND, long, wait_until
from outside import SIZE, Other, address_of, gone, limits, made, messages, other, outside, sums
from parked import inode, parked

import realmap
from realmap import KernelHandle, LimitReached, Limits, ambient
from realmap.host import procfs
from realmap.memory.stock import PLACES
from realmap.shared_memory import SharedMemory

__all__ = ["limits", "other", "outside"]


def test_nobody_is_asked_or_told(outside: KernelHandle) -> None:
    address, before = gone(made()), messages()
    os.kill(outside.pid, signal.SIGSTOP)
    try:
        assert {gone(made(b"\xff" * SIZE)) for _ in range(100)} == {address}
        assert parked() == [address]
    finally:
        os.kill(outside.pid, signal.SIGCONT)
    assert messages() == before + 1
    assert sums(outside) == (0, 0, 1)


def test_unlinked_before_it_is_closed(outside: KernelHandle) -> None:
    address, before = gone(made()), messages()
    for _ in range(3):
        block = made()
        block.unlink()
        assert bytes(block.buf[:4]) == b"here"
        block.close()
    assert (messages(), parked()) == (before + 1, [address])


def test_it_is_in_the_books_once_somebody_looks(outside: KernelHandle) -> None:
    gone(made())
    block = made()
    assert sums(outside) == (1, 1, 0)
    block.close()
    assert sums(outside) == (1, 0, 0)
    block.unlink()
    assert sums(outside) == (0, 0, 0)


def test_a_closed_one_is_in_the_books_once_somebody_looks(outside: KernelHandle) -> None:
    gone(made())
    block = made()
    block.close()
    assert sums(outside) == (1, 0, 0)
    (handle,) = outside.snapshot().handles
    assert (handle.name, handle.start, handle.length, handle.keep) == (f"name:{block.name}", 0, SIZE, 0)
    block.unlink()
    assert (sums(outside), parked()) == ((0, 0, 0), [])


@pytest.mark.parametrize("closed", [False, True])
def test_others_find_it_by_its_name(other: Other, outside: KernelHandle, closed: bool) -> None:
    gone(made())
    block = made(b"abcd")
    if closed:
        block.close()
    assert other("attach", block.name) == "abcd"
    same = SharedMemory(block.name)
    assert (bytes(same.buf[:4]), same.size) == (b"abcd", SIZE)
    same.close()
    block.close()
    block.unlink()
    assert other("attach", block.name) == "FileNotFoundError"
    assert other("attach", block.name) == "FileNotFoundError"
    assert not exists(block.name)
    assert sums(outside)[:2] == (0, 0)


@pytest.mark.parametrize("closed", [False, True])
def test_frames_that_others_have_had_are_not_used_again(other: Other, outside: KernelHandle, closed: bool) -> None:
    address = gone(made())
    block = made(b"abcd")
    segment = inode(address)
    if closed:
        block.close()
    assert other("hold", block.name) == "abcd"
    block.close()
    block.unlink()
    later = made(b"next")
    assert inode(address_of(later)) != segment
    assert other("drop", "it") == "abcd"
    gone(later)


def test_a_name_that_has_ended_is_nobodys(other: Other, outside: KernelHandle) -> None:
    gone(made())
    block = made()
    gone(block)
    assert other("attach", block.name) == "FileNotFoundError"
    assert not exists(block.name)
    with pytest.raises(FileNotFoundError):
        block.unlink()


@pytest.mark.parametrize("closed", [False, True])
def test_anybody_ends_its_name(other: Other, outside: KernelHandle, closed: bool) -> None:
    gone(made())
    block = made()
    if closed:
        block.close()
    assert other("unlink", block.name) == "unlinked"
    with pytest.raises(FileNotFoundError):
        block.unlink()
    if not closed:
        assert bytes(block.buf[:4]) == b"here"
        block.close()
    assert sums(outside) == (0, 0, 0)


@pytest.mark.parametrize("closed", [False, True])
def test_its_name_is_taken_for_everybody(other: Other, outside: KernelHandle, closed: bool) -> None:
    gone(made())
    block = made()
    if closed:
        block.close()
    assert other("make", block.name) == "FileExistsError"
    with pytest.raises(FileExistsError):
        SharedMemory(block.name, create=True, size=10)
    block.close()
    block.unlink()
    assert other("make", block.name) == "made"


def test_its_bytes_are_not_to_be_had_once_it_is_closed(outside: KernelHandle) -> None:
    gone(made())
    block = made()
    buffer = block._buffer
    view = block.buf[1:3]
    with pytest.raises(BufferError, match="view"):
        block.close()
    assert bytes(view) == b"er"
    view.release()
    block.close()
    assert buffer is not None and not buffer.alive
    with pytest.raises(BufferError):
        buffer[0]
    assert len(parked()) == 1
    block.unlink()


def test_what_is_on_its_way_may_name_its_bytes(outside: KernelHandle) -> None:
    """So the kernel is told then."""
    gone(made())
    block = made()
    before = messages()
    client = ambient.process()._own_client
    os.kill(outside.pid, signal.SIGSTOP)
    wait_until(lambda: procfs.is_stopped(outside.pid))
    asking = threading.Thread(target=lambda: ambient.process().query(realmap.memory.USER_LAND.start))
    try:
        asking.start()
        wait_until(lambda: client.endpoint.pending == 1)
        block.close()
        assert parked() == []
    finally:
        os.kill(outside.pid, signal.SIGCONT)
        asking.join(BOUND)
    assert messages() == before + 2
    block.unlink()
    assert sums(outside) == (0, 0, 0)


def test_many_at_a_time(outside: KernelHandle, other: Other) -> None:
    blocks = [made(b"%04d" % number) for number in range(PLACES + 4)]
    assert len({block.name for block in blocks}) == PLACES + 4
    for number, block in enumerate(blocks):
        if number % 2:
            block.close()
    for number, block in enumerate(blocks):
        assert other("attach", block.name) == f"{number:04}"
    wait_until(lambda: sums(outside)[:2] == (PLACES + 4, PLACES // 2 + 2))
    for block in blocks:
        block.close()
        block.unlink()
    assert sums(outside)[0] == 0


def test_who_makes_what_others_attach_parks_nothing_for_it(outside: KernelHandle, other: Other) -> None:
    for number in range(4):
        before = messages()
        block = made(b"abcd")
        assert other("attach", block.name) == "abcd"
        gone(block)
        asked = messages() - before - 1
        assert asked <= (4 if number < 2 else 3)


@pytest.mark.parametrize("limits", [Limits(stock=0)])
def test_without_a_stock(outside: KernelHandle, other: Other) -> None:
    for _ in range(3):
        block = made(b"abcd")
        assert other("attach", block.name) == "abcd"
        gone(block)
    assert (sums(outside)[0], parked()) == (0, [])


@pytest.mark.parametrize("limits", [Limits(handles=2)])
def test_a_limit_of_handles_counts_them(outside: KernelHandle) -> None:
    gone(made())
    blocks = [made(), made()]
    with pytest.raises(LimitReached, match="handles"):
        made()
    assert sums(outside)[0] == 2
    gone(blocks.pop())
    blocks.append(made())
    with pytest.raises(LimitReached, match="handles"):
        SharedMemory(f"again_{os.getpid()}", create=True, size=10)
    for block in blocks:
        gone(block)


@pytest.mark.parametrize("text, length", [(b"\xff", SIZE), (b"a", 0), (b"a", SIZE * 2), (b"a", 1 << 63)])
def test_what_is_no_name_is_none(outside: KernelHandle, text: bytes, length: int) -> None:
    gone(made())
    buffer = ambient.process().map(SIZE)
    endpoint = ambient.process()._own_client.endpoint
    assert endpoint.name(buffer._window, text, length, False)
    assert sums(outside) == (0, 1, 0)
    assert not endpoint.end_name(text)
    buffer.unmap()


def test_a_name_that_another_one_has_stays_its(outside: KernelHandle) -> None:
    gone(made())
    block = made()
    with realmap.connect(outside.path) as liar:
        liar.map(SIZE).unmap()
        buffer = liar.map(SIZE)
        assert liar._own_client.endpoint.name(buffer._window, block.name.encode(), SIZE, False)
        assert sums(outside) == (1, 2, 0)
        assert outside.snapshot().handles[0].maker == ambient.process()._own_client.number
    gone(block)


def test_what_cannot_have_a_name_has_none(outside: KernelHandle) -> None:
    fresh, long = ambient.process().map(SIZE, fragment=4096), b"n" * 48
    endpoint = ambient.process()._own_client.endpoint
    assert not endpoint.name(fresh._window, b"a", SIZE, False)
    gone(made())
    buffer = ambient.process().map(SIZE)
    assert not endpoint.name(buffer._window, long, SIZE, False)
    assert endpoint.name(buffer._window, long[:47], SIZE, False)
    assert not endpoint.end_name(long)
    assert exists(long[:47].decode()) and not exists(long.decode())
    with pytest.raises(TypeError):
        endpoint.name(buffer, b"a", SIZE, False)  # type: ignore[arg-type]
    SharedMemory(long[:47].decode()).unlink()
    fresh.unmap(), buffer.unmap()


# ---- anything, in any order -------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, long(1), long(2)])
def test_a_name_stands_for_its_block_and_for_no_other(outside: KernelHandle, other: Other, seed: int) -> None:
    rng = random.Random(seed)
    blocks: dict[SharedMemory, str] = {}
    ended: list[str] = []
    for step in range(400):
        what = rng.choice(["make", "make", "close", "unlink", "attach", "own", "look", "gone", "fork"])
        if what == "make" and len(blocks) < 12:
            text = f"{step:04}"
            blocks[made(text.encode())] = text
        elif what == "gone":
            gone(made())
        elif what == "look":
            assert sums(outside)[0] == len(blocks)
        elif what == "fork" and step % 5 == 0:
            pid = os.fork()
            if not pid:
                os._exit(0)
            os.waitpid(pid, 0)
        elif what in ("attach", "own") and ended and rng.random() < 0.3:
            assert other("attach", rng.choice(ended[-5:])) == "FileNotFoundError"
        elif blocks:
            block, text = rng.choice(list(blocks.items()))
            if what == "close":
                block.close()
            elif what == "attach":
                assert other("attach", block.name) == text
            elif what == "own":
                same = SharedMemory(block.name)
                assert bytes(same.buf[:4]).decode() == text
                same.close()
            elif what == "unlink":
                block.unlink()
                block.close()
                ended.append(block.name)
                del blocks[block]
    for block in blocks:
        block.close()
        block.unlink()
    assert sums(outside)[0] == 0
