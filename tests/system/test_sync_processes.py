"""realmap.sync between processes: forked and unpickled ones, and such as are killed at any moment."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from conftest import BOUND, PAGE, SUPPORT, scaled, wait_until

import realmap
from realmap import Buffer, KernelPanic, OwnerDied, Process
from realmap.sync import Condition, Counter, Event, Lock, Queue, Semaphore

WORKERS = 3
#: Where what the workers count lies in a page, from 64 bytes on; and what they do in all, in a long run.
FULL = 1_000_000


@pytest.fixture
def page(me: Process) -> Buffer:
    return me.map(PAGE)


class Family:
    """Forked children of this process; each ends with 0, or the test fails."""

    def __init__(self) -> None:
        self.pids: list[int] = []

    def fork(self, work: Callable[[], object]) -> int:
        pid = os.fork()
        if not pid:
            try:
                signal.alarm(20 * int(BOUND))  # whatever becomes of the test
                work()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        self.pids.append(pid)
        return pid

    def wait(self, pid: int) -> int:
        """How it ended."""
        self.pids.remove(pid)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def kill(self, pid: int) -> bool:
        """Whether it was killed: it may have ended before."""
        os.kill(pid, signal.SIGKILL)
        return self.wait(pid) == -signal.SIGKILL

    def join(self) -> None:
        for pid in list(self.pids):
            assert self.wait(pid) == 0


@pytest.fixture
def family() -> Iterator[Family]:
    made = Family()
    yield made
    for pid in list(made.pids):  # of a test that has failed
        made.kill(pid)


def sleeps(pid: int) -> bool:
    """Whether it waits in Linux for a futex: what it waits for, it has missed by then."""
    with open(f"/proc/{pid}/wchan") as file:
        return "futex" in file.read()


# ---- forks and pickles ----------------------------------------------------------------------


def test_processes_hold_a_lock_one_at_a_time(page: Buffer, family: Family) -> None:
    numbers = memoryview(page)[64:72].cast("q")

    def work() -> None:
        lock = Lock(page)
        for _ in range(3000):
            with lock:
                numbers[0] += 1

    for _ in range(WORKERS):
        family.fork(work)
    family.join()
    assert numbers[0] == WORKERS * 3000
    numbers.release()


def test_of_many_who_make_the_same_all_have_the_same(page: Buffer, family: Family) -> None:
    start = Event(page)

    def work() -> None:
        start.wait(BOUND)
        for offset in range(128, PAGE - 128, 128):
            with Lock(page, offset):
                Counter(page, 64).add(1)
                Counter(page, offset + 64).add(1)
            Semaphore(page, PAGE - 64, 5)

    for _ in range(WORKERS):
        family.fork(work)
    start.set()
    family.join()
    locks = range(128, PAGE - 128, 128)
    assert Counter(page, 64).value == WORKERS * len(locks)
    assert {Counter(page, offset + 64).value for offset in locks} == {WORKERS}
    assert Semaphore(page, PAGE - 64).value == 5


def test_a_forked_child_does_not_hold_what_its_parent_does(page: Buffer, family: Family) -> None:
    lock, condition = Lock(page), Condition(page, 64)

    def child() -> None:
        with pytest.raises(KernelPanic):
            lock.release()
        with pytest.raises(KernelPanic):
            condition.notify()
        assert not lock.acquire(False)
        assert lock.acquire(timeout=BOUND)
        lock.release()
        assert condition.acquire(timeout=BOUND)  # and ends with it

    with condition:
        with lock:
            pid = family.fork(child)
            wait_until(lambda: sleeps(pid))
        wait_until(lambda: sleeps(pid))
    assert family.wait(pid) == 0
    with pytest.raises(OwnerDied):
        condition.acquire(timeout=BOUND)
    condition.recovered()
    condition.release()


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_all_of_them_travel(kernel: realmap.KernelHandle, method: str) -> None:
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "sharers.py"), method, kernel.path],
        capture_output=True, text=True, timeout=2 * BOUND,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    wait_until(lambda: not kernel.stats()["processes"], "their end")


# ---- deaths ---------------------------------------------------------------------------------


def test_who_dies_with_a_lock_leaves_it_to_one(page: Buffer, family: Family) -> None:
    lock, took, died = Lock(page), Event(page, 64), Counter(page, 128)

    def holder() -> None:
        lock.acquire()
        took.set()
        signal.pause()

    def waiter() -> None:
        try:
            lock.acquire(timeout=BOUND)
        except OwnerDied:
            died.add(1)
            lock.recovered()
        lock.release()

    victim = family.fork(holder)
    assert took.wait(BOUND)
    waiters = [family.fork(waiter) for _ in range(WORKERS)]
    wait_until(lambda: all(map(sleeps, waiters)))
    assert family.kill(victim)
    family.join()
    assert died.value == 1
    with lock:
        pass


@pytest.mark.parametrize("way", ["semaphore", "condition", "queue"])
def test_who_dies_asleep_takes_no_wake_up_with_him(page: Buffer, me: Process, family: Family, way: str) -> None:
    """The first in line is killed when he was woken, and before he has run: he shares a CPU with who wakes him, and
    only has it where nobody else wants it."""
    cpus = os.sched_getaffinity(0)
    cpu = {min(cpus)}
    tokens, condition, box = Semaphore(page, 0, 0), Condition(page, 64), Queue(me, slots=4, size=4)
    waits: dict[str, Callable[[], object]] = {
        "semaphore": lambda: tokens.acquire(timeout=BOUND),
        "condition": lambda: wait_once(condition),
        "queue": lambda: box.get(BOUND),
    }
    wakes: dict[str, Callable[[], object]] = {
        "semaphore": tokens.release,
        "condition": lambda: notify_once(condition),
        "queue": lambda: box.put(b"x"),
    }

    def idle() -> None:
        os.sched_setaffinity(0, cpu)
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        waits[way]()

    for _ in range(5):
        victim = family.fork(idle)
        wait_until(lambda victim=victim: sleeps(victim))
        heir = family.fork(waits[way])
        wait_until(lambda heir=heir: sleeps(heir))
        os.sched_setaffinity(0, cpu)
        wakes[way]()
        os.kill(victim, signal.SIGKILL)
        os.sched_setaffinity(0, cpus)
        with suppress(PermissionError):  # to end soon; it ends a bit later where that takes root
            os.sched_setscheduler(victim, os.SCHED_OTHER, os.sched_param(0))
        if not family.kill(victim):
            wakes[way]()  # it was quicker, and had what it waited for
        assert family.wait(heir) == 0


def wait_once(condition: Condition) -> None:
    try:
        condition.acquire()
    except OwnerDied:
        condition.recovered()
    try:
        assert condition.wait(BOUND)
    except OwnerDied:
        condition.recovered()
    condition.release()


def notify_once(condition: Condition) -> None:
    with condition:
        condition.notify()


def _locked_adds(page: Buffer, family: Family, seed: int, total: int) -> None:
    """What is written in three steps under a lock is whole whenever somebody takes it, or he is told; and he can mend
    it, since each worker notes first what it is about to do."""
    rng = random.Random(seed)
    numbers = memoryview(page)[64 : 64 + 8 * (WORKERS + 2)].cast("q")  # what each has begun; and the sum, twice
    deaths, told = Counter(page, 128), Counter(page, 192)

    def begun() -> int:
        return sum(numbers[:WORKERS])

    def take(lock: Lock) -> None:
        try:
            lock.acquire(timeout=BOUND)
        except OwnerDied:
            told.add(1)
            assert begun() - numbers[WORKERS + 1] in (0, 1)
            numbers[WORKERS] = numbers[WORKERS + 1] = begun()
            lock.recovered()
        assert begun() == numbers[WORKERS] == numbers[WORKERS + 1]

    def work(me: int) -> None:
        lock = Lock(page)
        while numbers[WORKERS] < total:
            take(lock)
            numbers[me] += 1
            numbers[WORKERS] += 1
            numbers[WORKERS + 1] += 1
            lock.release()

    workers = {number: family.fork(lambda number=number: work(number)) for number in range(WORKERS)}
    while numbers[WORKERS] < total:
        time.sleep(rng.uniform(0, 0.01))
        number = rng.randrange(WORKERS)
        if not family.kill(workers[number]):
            break  # it had ended: so will all
        deaths.add(1)
        workers[number] = family.fork(lambda number=number: work(number))
    family.join()
    lock = Lock(page)
    take(lock)
    lock.release()
    assert total <= numbers[WORKERS] <= total + WORKERS + 1
    assert told.value <= deaths.value
    numbers.release()


def _sent_and_got(me: Process, family: Family, seed: int, total: int) -> None:
    """Of what was put all comes out once, but for what a killed consumer had just taken; and what a killed producer was
    just putting, perhaps."""
    rng = random.Random(seed)
    box, page = Queue(me, slots=7, size=8), me.map(PAGE)
    book = me.map(2 * total)
    got = memoryview(book)
    begun, done = memoryview(page)[:16].cast("q"), memoryview(page)[64:80].cast("q")  # of each of two producers
    killed = {"put": 0, "get": 0}

    def put(number: int) -> None:
        while begun[number] < total:
            at = begun[number]
            begun[number] = at + 1
            box.put((number * total + at).to_bytes(8, "little"))
            done[number] += 1

    def get(_: int) -> None:
        while (at := int.from_bytes(box.get(BOUND), "little")) < 2 * total:
            got[at] += 1

    end = bytes([255]) * 8
    kinds = {"put": put, "get": get}
    living = {
        (kind, number): family.fork(lambda kind=kind, number=number: kinds[kind](number))
        for kind in kinds
        for number in range(2)
    }
    while min(begun) < total:
        time.sleep(rng.uniform(0, 0.01))
        kind, number = rng.choice(list(living))
        if not family.kill(living.pop((kind, number))) and kind == "put":
            continue  # it was done
        killed[kind] += 1
        living[kind, number] = family.fork(lambda kind=kind, number=number: kinds[kind](number))
    for number in range(2):
        if ("put", number) in living:
            assert family.wait(living.pop(("put", number))) == 0
    for _ in range(2):
        box.put(end, timeout=BOUND)
    family.join()
    assert box.qsize() == 0
    assert max(got) == 1
    assert 2 * total - sum(got) <= killed["put"] + killed["get"]
    # Who was just putting has either put it or not: nothing else of a producer's is missing.
    for number in range(2):
        assert sum(got[number * total : (number + 1) * total]) >= done[number] - killed["get"]
    for view in (got, begun, done):
        view.release()


@pytest.mark.parametrize("seed", [1, 2])
def test_a_lock_keeps_what_it_guards_whole_while_holders_are_killed(page: Buffer, family: Family, seed: int) -> None:
    _locked_adds(page, family, seed, 20_000)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_queue_loses_only_what_the_dead_had(me: Process, family: Family, seed: int) -> None:
    _sent_and_got(me, family, seed, 20_000)


@pytest.mark.slow
def test_locks_under_kills_for_long(page: Buffer, family: Family) -> None:
    _locked_adds(page, family, 3, scaled(FULL))


@pytest.mark.slow
def test_queues_under_kills_for_long(me: Process, family: Family) -> None:
    _sent_and_got(me, family, 3, scaled(FULL))


def test_a_producer_that_is_stopped_in_the_middle_keeps_nobody_once_it_is_killed(me: Process, family: Family) -> None:
    """It holds the queue's own lock, most likely: its messages take long to copy."""
    box, ready = Queue(me, slots=3, size=8 << 20), Event(me.map(64))

    def put() -> None:
        message = bytes(8 << 20)
        ready.set()
        while True:
            box.put(message)

    for _ in range(5):
        ready.clear()
        victim = family.fork(put)
        assert ready.wait(BOUND)
        for _ in range(3):
            assert box.get(BOUND) == bytes(8 << 20)
        family.kill(victim)
        while box.qsize():
            assert box.get(BOUND) == bytes(8 << 20)
        box.put(b"next", BOUND)
        assert box.get(BOUND) == b"next"


def test_counters_count_while_their_users_are_killed(page: Buffer, family: Family) -> None:
    counter, noted = Counter(page), memoryview(page)[64:88].cast("q")

    def work(number: int) -> None:
        while True:
            counter.add(1)
            noted[number] += 1

    victims = [family.fork(lambda number=number: work(number)) for number in range(WORKERS)]
    wait_until(lambda: min(noted) > 1000)
    assert all(map(family.kill, victims))
    assert 0 <= counter.value - sum(noted) <= WORKERS
    noted.release()


def test_a_lock_outlives_the_kernel(page: Buffer, family: Family) -> None:
    with realmap.boot() as kernel, kernel.connect() as me:
        own = me.map(PAGE)
        lock = Lock(own)
        os.kill(kernel.pid, signal.SIGKILL)

        def child() -> None:
            with lock:
                Counter(own, 64).add(1)

        with lock:
            pid = family.fork(child)
            Counter(own, 64).add(1)
        assert family.wait(pid) == 0
        assert Counter(own, 64).value == 2
