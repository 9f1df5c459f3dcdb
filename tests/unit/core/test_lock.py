"""The lock: an RLock that a signal handler that raises does not leave taken, wherever it comes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest
from conftest import BOUND

from realmap._core import Lock


class Stop(Exception):
    """A signal handler's own."""


@pytest.fixture
def alarm() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Stop

    before = signal.signal(signal.SIGALRM, stop)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def is_free(lock: Lock) -> bool:
    """As another thread sees it."""
    seen: list[bool] = []

    def look() -> None:
        seen.append(lock.acquire(blocking=False))
        if seen[0]:
            lock.release()

    thread = threading.Thread(target=look)
    thread.start()
    thread.join(BOUND)
    return seen[0]


def use(lock: Lock) -> None:
    for _ in range(500):
        with lock, lock:
            pass


def test_no_handler_that_raises_leaves_it_taken(alarm: None) -> None:
    lock, interrupted = Lock(), 0
    for _ in range(2000):
        try:
            signal.setitimer(signal.ITIMER_REAL, 2e-5)
            use(lock)
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Stop:
            interrupted += 1
    assert interrupted > 200
    assert is_free(lock)


def test_it_is_held_in_the_block_and_by_one_thread_as_often_as_that_wants() -> None:
    lock = Lock()
    with lock, lock:
        assert not is_free(lock)
    assert is_free(lock)
    with pytest.raises(ValueError, match="of the block"), lock:
        raise ValueError("of the block")
    assert is_free(lock)


def test_giving_back_what_is_not_taken_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="un-acquired"):
        Lock().release()


def test_an_exception_that_is_handled_around_it_makes_no_difference() -> None:
    lock = Lock()
    try:
        raise ValueError
    except ValueError:
        with lock:
            assert not is_free(lock)
    assert is_free(lock)
