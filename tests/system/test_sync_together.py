"""`realmap.sync`: semaphores, barriers and conditions, by the threads of one process."""

from __future__ import annotations

import threading
import time

import pytest
from conftest import BOUND, PAGE, in_threads, wait_until

from realmap import Buffer, InvalidMemState, KernelPanic, OwnerDied, Process
from realmap.sync import Barrier, Condition, Counter, Lock, Semaphore


@pytest.fixture
def page(me: Process) -> Buffer:
    return me.map(PAGE)


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
    assert Barrier(page, 128, 1).wait() == 0
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
