"""realmap.sync in one process: the faces of threading, threads, wrong use, signal handlers, memory that goes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from types import MethodDescriptorType
from typing import Generic, TypeVar

import pytest
from conftest import BOUND, PAGE, in_threads, tried_with
from held import held_elsewhere

import realmap
from realmap import (
    AccessDenied,
    Buffer,
    InvalidAddress,
    InvalidMemState,
    InvalidSize,
    KernelPanic,
    OwnerDied,
    Process,
    _core,
)
from realmap.sync import Barrier, Condition, Counter, Event, Lock, Queue, Semaphore

T = TypeVar("T")
KINDS: list[Callable[..., object]] = [Lock, Condition, Counter, Event, Semaphore, partial(Barrier, parties=3)]


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
def test_an_offset_that_will_not_do_is_told_of(page: Buffer, kind: Callable[..., object]) -> None:
    for offset in (-64, 1, 32, PAGE - 63, PAGE, 1 << 40, 2**64):
        with tried_with(offset), pytest.raises((InvalidAddress, InvalidSize)):
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
    for kind in (Lock, Counter, Event, Condition, Semaphore, Barrier):
        with pytest.raises(TypeError, match=rf"^{kind.__name__}\b.*'buffer'"):
            kind()  # type: ignore[operator]
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


@pytest.mark.parametrize("kind", [Lock, Condition, Counter, Event, Semaphore, Barrier, Queue])
def test_the_methods_of_a_class_are_its_own(kind: type[_core.Shared]) -> None:
    base = kind.__mro__[kind.__mro__.index(_core.Shared) - 1]
    names = [name for name, each in vars(base).items() if isinstance(each, MethodDescriptorType)]
    assert names
    assert all(vars(kind)[name].__objclass__ is kind for name in names)


def test_a_class_keeps_what_it_says_itself_or_by_a_base_before(page: Buffer) -> None:
    class Before(_core.Shared):
        __slots__ = ()

        def release(self) -> str:
            return "before"

    class Mine(Before, _core.SharedLock):  # type: ignore[misc]
        __slots__ = ()

        def acquire(self) -> str:  # type: ignore[override]
            return "mine"

    mine = Mine._open(page, 0, 0)
    assert (mine.acquire(), mine.release()) == ("mine", "before")
    with mine, pytest.raises(BufferError):
        page.unmap()


def test_a_class_may_have_other_bases_that_are_told_of_it(page: Buffer) -> None:
    told: dict[type, str] = {}

    class Told:
        def __init_subclass__(cls, /, by: str = "", **more: object) -> None:
            super().__init_subclass__(**more)
            told[cls] = by

    class Typed(Lock, Generic[T]):
        pass

    class Both(Lock, Told, by="name"):
        pass

    with Typed[int](page):
        pass
    assert told == {Both: "name"}
    with pytest.raises(TypeError):
        type("Odd", (Lock,), {}, by="name")


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


def test_a_timeout_of_minus_one_is_none_as_of_threading(page: Buffer) -> None:
    lock, tokens = Lock(page), Semaphore(page, 64)
    for each in (lock, tokens):
        assert each.acquire(True, -1) is True
        assert each.acquire(False, -1) is False
        each.release()
        assert each.acquire(timeout=-1.0) is True
    lock.release()


@pytest.mark.parametrize("arguments", [{"timeout": -2}, {"timeout": float("nan")}, {"blocking": False, "timeout": 1}])
def test_a_timeout_that_is_none_is_told_of(page: Buffer, arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="timeout"):
        Lock(page).acquire(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="timeout"):
        Event(page, 64).wait(-1)


@pytest.mark.parametrize("arguments", [{"timeout": "1"}, {"blocking": False, "timeout": "1"}, {"wait": 1}])
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
    with lock, pytest.raises(BufferError, match="held lock"):
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
