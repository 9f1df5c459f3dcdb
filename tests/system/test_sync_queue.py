"""`realmap.sync.Queue` in one process."""

from __future__ import annotations

import queue
import threading

import pytest
from conftest import BOUND, PAGE, wait_until

import realmap
from realmap import InvalidMemState, InvalidSize, Process
from realmap.sync import Queue


@pytest.mark.parametrize(("slots", "size"), [(1, 1), (3, 33), (7, 3333), (64, 64), (2, 1_500_000)])
def test_a_queue_gives_what_was_put_in_order(me: Process, slots: int, size: int) -> None:
    box = Queue(me, slots=slots, size=size)
    for start in range(3 * slots):
        messages = [bytes([start + number & 255]) * (size - (start + number) % min(size, 5)) for number in range(slots)]
        for message in messages:
            box.put(message)
        assert box.qsize() == slots
        with pytest.raises(queue.Full):
            box.put_nowait(b"")
        with pytest.raises(queue.Full):
            box.put(b"", timeout=0.01)
        assert [box.get() for _ in messages] == messages
        with pytest.raises(queue.Empty):
            box.get_nowait()
        with pytest.raises(queue.Empty):
            box.get(timeout=0.01)
    with pytest.raises(InvalidSize):
        box.put(bytes(size + 1))
    box.put(bytearray(b"x"))
    box.put_nowait(memoryview(b"")) if slots > 1 else None
    assert box.get() == b"x"


@pytest.mark.parametrize("shape", [(0, 1), (1, 0), (-1, 1), (2**31, 1), (1, 2**31)])
def test_a_queue_that_cannot_be_is_told_of(me: Process, shape: tuple[int, int]) -> None:
    with pytest.raises(InvalidSize):
        Queue(me, slots=shape[0], size=shape[1])
    with pytest.raises(TypeError):
        Queue(None, slots=1, size=1)  # type: ignore[arg-type]


def test_only_bytes_and_buffers_are_put(me: Process) -> None:
    box = Queue(me, slots=1, size=64)
    for wrong in ("text", 5, None, [1]):
        with pytest.raises(TypeError):
            box.put(wrong)
    with pytest.raises(ValueError):
        box.put(b"", -1)
    for use in (lambda: box.get(True), lambda: box.put(b"", True), lambda: box.put(me.map(1), timeout=False)):
        with pytest.raises(TypeError, match="to wait without a bound give none"):
            use()
    with pytest.raises(TypeError):
        box.put()  # type: ignore[call-arg]
    assert box.qsize() == 0
    box.buffer.unmap()
    for use in (box.get, box.qsize, lambda: box.put(b"x"), box.get_nowait):
        with pytest.raises(BufferError):
            use()


def test_a_buffer_comes_out_as_the_same_memory(kernel: realmap.KernelHandle, me: Process) -> None:
    box = Queue(me, slots=2, size=1)
    sent = me.map(PAGE + 77)
    box.put(sent.slice(5, PAGE))
    box.put(b"b")
    with pytest.raises(queue.Full):
        box.put(sent, 0)
    with box.get() as got:
        assert (len(got), got.rights) == (PAGE, realmap.u_rw)
        got[0] = 7
        assert sent[5] == 7
    assert box.get() == b"b"
    wait_until(lambda: not kernel.stats()["handles"], "the end of the handles")
    with realmap.boot() as other, other.connect() as stranger, pytest.raises(realmap.InvalidHandle):
        box.put(stranger.map(1))


def test_nothing_is_lost_between_many_threads(me: Process) -> None:
    box = Queue(me, slots=5, size=8)
    got: list[list[int]] = [[] for _ in range(3)]

    def work(number: int) -> None:
        if number < 3:
            for value in range(number, 3000, 3):
                box.put(value.to_bytes(8, "little"))
            return
        while (value := int.from_bytes(box.get(BOUND), "little")) < 2**60:
            got[number - 3].append(value)
        box.put(bytes([255]) * 8)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads[:3]:
        thread.join(BOUND)
    box.put(bytes([255]) * 8)
    for thread in threads[3:]:
        thread.join(BOUND)
    assert sorted(value for each in got for value in each) == list(range(3000))
    for each in got:  # of one producer in order
        for number in range(3):
            mine = [value for value in each if value % 3 == number]
            assert mine == sorted(mine)


def test_a_queue_that_was_written_over_says_so(me: Process) -> None:
    box = Queue(me, slots=4, size=16)
    box.put(b"first")
    box.buffer[128:132] = b"\xff" * 4  # its length
    with pytest.raises(InvalidMemState):
        box.get()
    with pytest.raises(InvalidMemState):
        box.get()
