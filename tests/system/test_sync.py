"""realmap.sync in one process: the faces of threading, threads, wrong use, signal handlers, memory that goes."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType

import pytest
from conftest import BOUND, PAGE, in_threads, wait_until

import realmap
from realmap import AccessDenied, Buffer, InvalidAddress, InvalidMemState, InvalidSize, KernelPanic, OwnerDied, Process
from realmap.sync import Barrier, Condition, Counter, Event, Lock, Queue, Semaphore

KINDS: list[Callable[..., object]] = [Lock, Condition, Counter, Event, Semaphore, partial(Barrier, parties=3)]
#: What waits for an event that never comes, on a page of its own.
WAITS: dict[str, Callable[[Buffer, float], object]] = {
    "lock": lambda page, timeout: Lock(page, 192).acquire(timeout=timeout),
    "event": lambda page, timeout: Event(page).wait(timeout),
    "semaphore": lambda page, timeout: Semaphore(page, value=0).acquire(timeout=timeout),
    "barrier": lambda page, timeout: Barrier(page, parties=2).wait(timeout),
    "condition": lambda page, timeout: wait_with(Condition(page), timeout),
    "get": lambda page, timeout: Queue(page.process, slots=1, size=1).get(timeout),
    "put": lambda page, timeout: fill(Queue(page.process, slots=3, size=1), timeout),
}


class Stop(Exception):
    """A signal handler's."""


def wait_with(condition: Condition, timeout: float) -> bool:
    with condition:
        try:
            return condition.wait(timeout)
        finally:
            with pytest.raises(KernelPanic):  # it has the lock
                condition.acquire()


def fill(full: Queue, timeout: float) -> None:
    for number in range(4):
        full.put(b"%d" % number, timeout)


@contextlib.contextmanager
def held_elsewhere(lock: Lock) -> Iterator[None]:
    """Another thread holds it meanwhile."""
    taken, over = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            taken.set()
            over.wait(BOUND)

    thread = threading.Thread(target=hold)
    thread.start()
    assert taken.wait(BOUND)
    yield
    over.set()
    thread.join(BOUND)


@pytest.fixture
def page(me: Process) -> Buffer:
    return me.map(PAGE)


# ---- made, found again ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_who_opens_the_same_bytes_has_the_same_one(page: Buffer, kind: Callable[..., object]) -> None:
    kind(page, 3008)
    before = page[3008:3072]
    kind(page, 3008)
    kind(page.slice(64, 3100), 2944)
    assert page[3008:3072] == before != bytes(64)
    assert page[:3008] == bytes(3008)
    assert page[3072:] == bytes(PAGE - 3072)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", [-64, 1, 32, PAGE - 63, PAGE, 1 << 40, 2**64])
def test_an_offset_that_will_not_do_is_told_of(page: Buffer, kind: Callable[..., object], offset: int) -> None:
    with pytest.raises((InvalidAddress, InvalidSize)):
        kind(page, offset)
    assert page == bytes(PAGE)


def test_a_buffer_that_will_not_do_is_told_of(me: Process) -> None:
    page = me.map(PAGE)
    with pytest.raises(InvalidAddress):
        Lock(page.slice(8, 128))
    with pytest.raises(InvalidSize):
        Lock(page.slice(64, 63))
    with pytest.raises(AccessDenied):
        Lock(me.attach(me.share(page, realmap.u_r)))
    with pytest.raises(TypeError):
        Lock(bytearray(64))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Lock(page, 0.0)  # type: ignore[arg-type]
    lock, counter, event = Lock(page), Counter(page, 64), Event(page, 128)
    page.unmap()
    with pytest.raises(InvalidAddress):
        Lock(page)
    for use in (lock.acquire, lock.release, lambda: counter.add(1), event.set, event.wait):
        with pytest.raises(BufferError):
            use()


def test_another_kind_and_other_bytes_are_left_alone(page: Buffer) -> None:
    Counter(page).add(5)
    page[100] = 1
    page[128] = 1
    before = page[:]
    for offset in (0, 64, 128):
        with pytest.raises(InvalidMemState):
            Lock(page, offset)
    assert page == before


# ---- lock -----------------------------------------------------------------------------------


def test_a_lock_is_one_threads_at_a_time(page: Buffer) -> None:
    numbers = memoryview(page)[2048:2056].cast("q")

    def work(_: int) -> None:
        lock = Lock(page, 64)
        for _ in range(2000):
            with lock:
                seen = numbers[0]
                if seen % 97 == 0:
                    time.sleep(0)  # gives the GIL away
                numbers[0] = seen + 1

    in_threads(4, work)
    assert numbers[0] == 8000
    numbers.release()


def test_a_lock_says_whether_it_was_taken(page: Buffer) -> None:
    lock = Lock(page)
    assert lock.acquire() is True
    assert lock.acquire(False) is False
    lock.release()
    with held_elsewhere(lock):
        assert lock.acquire(blocking=False) is False
        assert lock.acquire(timeout=0) is False
        assert lock.acquire(True, 0.05) is False
        assert Lock(page).acquire(timeout=0.01) is False
    assert lock.acquire(timeout=1e300) is True
    lock.release()


@pytest.mark.parametrize("arguments", [{"timeout": -1}, {"timeout": float("nan")}, {"blocking": False, "timeout": 1}])
def test_a_timeout_that_is_none_is_told_of(page: Buffer, arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="timeout"):
        Lock(page).acquire(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("arguments", [{"timeout": "1"}, {"wait": 1}])
def test_arguments_that_are_none_are_told_of(page: Buffer, arguments: dict[str, object]) -> None:
    with pytest.raises(TypeError):
        Lock(page).acquire(**arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Lock(page).acquire(True, 1, 1)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        Lock(page).acquire(True, blocking=True)  # type: ignore[misc]


def test_who_does_not_hold_a_lock_does_not_release_it(page: Buffer) -> None:
    lock = Lock(page)
    with pytest.raises(KernelPanic):
        lock.release()
    with held_elsewhere(lock), pytest.raises(KernelPanic):
        lock.release()
    with lock:
        with pytest.raises(KernelPanic):
            lock.acquire()
        with pytest.raises(KernelPanic):
            Lock(page).acquire(timeout=BOUND)
        with pytest.raises(KernelPanic):
            Lock(page).release()
        with pytest.raises(KernelPanic):
            lock.recovered()
    lock.acquire()
    lock.release()


def test_a_buffer_is_not_unmapped_under_a_lock_that_is_held(page: Buffer) -> None:
    lock = Lock(page)
    with lock, pytest.raises(BufferError):
        page.unmap()
    page.unmap()


def test_a_thread_that_ends_with_a_lock_leaves_it_to_the_next(page: Buffer) -> None:
    lock = Lock(page)
    thread = threading.Thread(target=lock.acquire)
    thread.start()
    thread.join(BOUND)
    with pytest.raises(OwnerDied) as caught:
        lock.acquire(timeout=BOUND)
    assert caught.value.address == page.address
    with pytest.raises(KernelPanic):
        lock.acquire()
    lock.recovered()
    with pytest.raises(KernelPanic):
        lock.recovered()
    lock.release()
    with lock:
        pass
    page.unmap()


def test_a_lock_that_nobody_recovered_is_of_no_use(page: Buffer) -> None:
    lock = Lock(page)
    thread = threading.Thread(target=lock.acquire)
    thread.start()
    thread.join(BOUND)
    with pytest.raises(OwnerDied):
        lock.acquire()
    lock.release()
    for each in (lock, Lock(page), lock):
        with pytest.raises(InvalidMemState, match="recovered"):
            each.acquire()


# ---- counter, event -------------------------------------------------------------------------


def test_a_counter_counts(page: Buffer) -> None:
    counter = Counter(page, 128)
    assert counter.value == 0
    assert counter.add(-3) == -3
    assert counter.compare_exchange(-3, 2**63 - 1)
    assert not counter.compare_exchange(-3, 5)
    with pytest.raises(OverflowError):
        counter.add(1)
    with pytest.raises(OverflowError):
        counter.add(2**63)
    assert Counter(page, 128).value == 2**63 - 1
    with pytest.raises(TypeError):
        counter.add("1")  # type: ignore[arg-type]


def test_an_event_tells_all_who_wait(page: Buffer) -> None:
    event, told = Event(page), Counter(page, 64)
    threads = [threading.Thread(target=lambda: told.add(event.wait(BOUND))) for _ in range(3)]
    assert not event.wait(0)
    for thread in threads:
        thread.start()
    event.set()
    event.set()
    for thread in threads:
        thread.join(BOUND)
    assert told.value == 3
    assert event.is_set()
    assert event.wait()
    event.clear()
    event.clear()
    assert not event.is_set()
    assert not event.wait(timeout=0.01)


# ---- semaphore, barrier, condition ----------------------------------------------------------


def test_a_semaphore_is_as_often_acquired_as_released(page: Buffer) -> None:
    tokens = Semaphore(page, 64, 2)
    assert (tokens.value, Semaphore(page, 64, 7).value) == (2, 2)
    with tokens, tokens:
        assert not tokens.acquire(False)
        assert not tokens.acquire(timeout=0.01)
    tokens.release(n=3)
    assert tokens.value == 5
    for wrong in (0, -1, 2**31):
        with pytest.raises(ValueError):
            tokens.release(wrong)
    for wrong in (-1, 2**31):
        with pytest.raises(ValueError):
            Semaphore(page, 128, wrong)
    assert page[128:192] == bytes(64)


def test_so_many_have_a_semaphore_at_a_time(page: Buffer) -> None:
    tokens, inside, most = Semaphore(page, 0, 2), Counter(page, 64), Counter(page, 128)

    def work(_: int) -> None:
        for _ in range(200):
            with tokens:
                now = inside.add(1)
                while (before := most.value) < now and not most.compare_exchange(before, now):
                    pass
                time.sleep(0)
                inside.add(-1)

    in_threads(5, work)
    assert most.value <= 2
    assert (tokens.value, inside.value) == (2, 0)


def test_a_barrier_lets_all_through_when_all_have_come(page: Buffer) -> None:
    barrier, arrived = Barrier(page, parties=3), Counter(page, 64)
    numbers: list[int] = []

    def work(_: int) -> None:
        for turn in range(50):
            arrived.add(1)
            numbers.append(barrier.wait(BOUND))
            assert arrived.value >= 3 * (turn + 1)

    in_threads(3, work)
    assert sorted(numbers) == sorted([0, 1, 2] * 50)
    assert (barrier.parties, barrier.n_waiting, barrier.broken) == (3, 0, False)
    assert Barrier(page, 128, parties=1).wait() == 0
    with pytest.raises(InvalidMemState):
        Barrier(page, parties=2)
    for wrong in (0, -1, 2**15):
        with pytest.raises(ValueError):
            Barrier(page, 192, parties=wrong)


@pytest.mark.parametrize("end", ["abort", "reset", "timeout"])
def test_a_barrier_is_broken_for_all_who_wait(page: Buffer, end: str) -> None:
    barrier, broken = Barrier(page, parties=3), Counter(page, 64)

    def come() -> None:
        with pytest.raises(threading.BrokenBarrierError):
            barrier.wait(BOUND)
        broken.add(1)

    thread = threading.Thread(target=come)
    thread.start()
    wait_until(lambda: barrier.n_waiting == 1)
    if end == "timeout":
        with pytest.raises(threading.BrokenBarrierError):
            barrier.wait(timeout=0.01)
    else:
        getattr(barrier, end)()
    thread.join(BOUND)
    assert broken.value == 1
    assert barrier.broken is (end != "reset")
    if barrier.broken:
        with pytest.raises(threading.BrokenBarrierError):
            barrier.wait()
    barrier.reset()
    in_threads(3, lambda _: barrier.wait(BOUND))


@pytest.mark.parametrize("own", [True, False])
def test_a_condition_wakes_as_many_as_it_is_told(page: Buffer, own: bool) -> None:
    lock = None if own else Lock(page, 512)
    waiting, woken = Counter(page, 64), Counter(page, 128)

    def wait(_: int) -> None:
        condition = Condition(page, 0, None if own else Lock(page, 512))
        with condition:
            waiting.add(1)
            assert condition.wait(BOUND)
            woken.add(1)

    threads = [threading.Thread(target=wait, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    condition = Condition(page, 0, lock)
    wait_until(lambda: waiting.value == 6)
    for n, after in ((1, 1), (2, 3), (0, 3)):
        with condition:
            condition.notify(n)
        wait_until(lambda after=after: woken.value == after)
        with condition:
            assert not condition.wait(0.2)  # longer than a slice: nobody wakes by himself
        assert woken.value == after
    with condition:
        condition.notify_all()
    for thread in threads:
        thread.join(BOUND)
    with condition:
        condition.notify()  # nobody is there: it is not kept
        assert not condition.wait(0.01)
        assert condition.wait_for(lambda: woken.value == 6)
        assert not condition.wait_for(lambda: woken.value == 7, 0.01)


def test_a_condition_wants_its_lock_held(page: Buffer) -> None:
    condition = Condition(page, lock=Lock(page, 64))
    for use in (condition.wait, condition.notify, condition.notify_all, condition.release, condition.recovered):
        with pytest.raises(KernelPanic):
            use()
    with pytest.raises(TypeError):
        Condition(page, lock=threading.Lock())  # type: ignore[arg-type]
    thread = threading.Thread(target=condition.acquire)
    thread.start()
    thread.join(BOUND)
    with pytest.raises(OwnerDied):
        condition.acquire()
    with pytest.raises(KernelPanic, match="recovered"):
        condition.wait()
    condition.recovered()
    condition.release()


def test_who_waits_learns_that_the_holder_has_died(page: Buffer) -> None:
    condition, other, waits = Condition(page), Condition(page), threading.Event()
    raised: list[BaseException] = []

    def wait() -> None:
        with condition:
            waits.set()
            try:
                condition.wait(BOUND)
            except OwnerDied as error:
                raised.append(error)
                condition.recovered()

    def die() -> None:
        other.acquire()
        other.notify()

    thread = threading.Thread(target=wait)
    thread.start()
    assert waits.wait(BOUND)
    killer = threading.Thread(target=die)
    killer.start()
    killer.join(BOUND)
    thread.join(BOUND)
    assert [type(each) for each in raised] == [OwnerDied]
    with other:
        pass


# ---- queue ----------------------------------------------------------------------------------


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


# ---- signal handlers ------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAITS)
def test_a_signal_handler_that_raises_ends_a_wait(page: Buffer, way: str) -> None:
    def stop(*_: object) -> None:
        raise Stop

    before = signal.signal(signal.SIGALRM, stop)
    try:
        with held_elsewhere(Lock(page, 192)):
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            with pytest.raises(Stop):
                WAITS[way](page, BOUND)
    finally:
        signal.signal(signal.SIGALRM, before)
    page.unmap()  # nothing is held


@pytest.mark.parametrize("way", WAITS)
def test_a_signal_handler_does_not_lengthen_a_wait(page: Buffer, way: str) -> None:
    """It comes every few milliseconds, and uses what is waited for."""
    came: list[object] = []

    def use(_: int, frame: FrameType | None) -> None:
        came.append(Lock(page, 192).acquire(False))
        with pytest.raises(BufferError):
            page.unmap()

    before = signal.signal(signal.SIGALRM, use)
    try:
        with held_elsewhere(Lock(page, 192)):
            signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
            with contextlib.suppress(queue.Empty, queue.Full, threading.BrokenBarrierError):
                assert not WAITS[way](page, 0.3)
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert came
    assert not any(came)


@pytest.mark.parametrize("kind", [Lock, Condition])
def test_a_handler_that_raises_at_any_moment_leaves_nothing_held(
    page: Buffer, kind: type[Lock] | type[Condition]
) -> None:
    """Another thread takes it all the time, so that it is waited for as well."""
    lock, box = kind(page, 64), Queue(page.process, slots=2, size=8)
    stopped = 0
    over = threading.Event()

    def stop(*_: object) -> None:
        raise Stop

    def contend() -> None:
        while not over.is_set():
            with lock:
                time.sleep(0.0001)

    thread = threading.Thread(target=contend)
    before = signal.signal(signal.SIGALRM, stop)
    try:
        thread.start()
        while stopped < 300:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0005 + 0.000007 * (stopped % 97))  # once
                while True:
                    with lock:
                        pass
                    with contextlib.suppress(queue.Empty, queue.Full):
                        box.put(b"x" * (stopped % 8), 0.0001)
                        box.get(0.0001)
                        box.get(0.0001)
            except Stop:
                stopped += 1
            with pytest.raises(KernelPanic):
                lock.release()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        over.set()
        thread.join(BOUND)
        signal.signal(signal.SIGALRM, before)
    page.unmap()
    box.buffer.unmap()


# ---- memory that goes -----------------------------------------------------------------------

#: What becomes of each when its segment is truncated, in a process of its own: what was held then stays mapped.
TRUNCATED = """
import sys, threading, time, realmap, os
from realmap.sync import *
kernel = realmap.connect(sys.argv[1])
page = kernel.map(4096, name=sys.argv[2])
lock, held, counter, event = Lock(page), Lock(page, 64), Counter(page, 128), Event(page, 192)
held.acquire()
said = []
def wait(use):
    try:
        said.append(use())
    except realmap.MemoryFault:
        said.append("fault")
other = threading.Thread(target=held.acquire, kwargs={"timeout": 0.01})
other.start(); other.join()
other = Barrier(page, 256, parties=2)
tokens = Semaphore(page, 320, 0)
condition = Condition(page, 384)
def wait_with():
    with condition: condition.wait()
waits = (event.wait, held.acquire, other.wait, tokens.acquire, wait_with)
threads = [threading.Thread(target=wait, args=(use,)) for use in waits]
for thread in threads: thread.start()
time.sleep(0.1)  # some of them sleep by now, most likely; right in any case
os.truncate("/dev/shm/" + sys.argv[2], 0)
for thread in threads: thread.join()
for use in (lock.acquire, held.release, held.recovered, lambda: counter.add(1), event.set, event.is_set, event.wait,
            lambda: Lock(page), lambda: counter.value, other.wait, other.reset, tokens.release, condition.acquire):
    wait(use)
fresh = Lock(kernel.map(4096))
for _ in range(3):
    with fresh: pass
assert said == ["fault"] * 18, said
print("held")
"""


def test_a_truncated_segment_is_a_memory_fault(kernel: realmap.KernelHandle) -> None:
    name = f"realmap-test-sync-{os.getpid()}"
    done = subprocess.run(
        [sys.executable, "-c", TRUNCATED, kernel.path, name], capture_output=True, text=True, timeout=BOUND
    )
    assert (done.stdout, done.stderr, done.returncode) == ("held\n", "", 0)
    wait_until(lambda: not kernel.stats()["processes"], "its end")
