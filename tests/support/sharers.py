"""Two processes that share each of realmap.sync, by a pickle: METHOD KERNEL. test_sync_processes.py runs it."""

from __future__ import annotations

import multiprocessing
import sys

import realmap
from realmap.sync import Barrier, Condition, Counter, Event, Lock, Queue, Semaphore


def answer(lock: Lock, condition: Condition, event: Event, tokens: Semaphore, barrier: Barrier, told: Queue) -> None:
    """Uses each of them, and waits for the other side in between; says in the queue how it went."""
    hits = Counter(lock.buffer, 64 * 10)
    barrier.wait(60)
    for _ in range(500):
        with lock:
            hits.add(1)
    with condition:
        condition.wait_for(lambda: hits.value == 1000, 60)
        condition.notify_all()
    event.wait(60)
    tokens.release(2)
    told.put(b"done")
    told.put(lock.buffer)


def share(method: str, kernel: str) -> None:
    """The same beside a process of that kind of multiprocessing's. Ends without a word."""
    with realmap.connect(kernel) as me:
        page = me.map(4096)
        lock, event, barrier = Lock(page), Event(page, 128), Barrier(page, 256, parties=2)
        condition, tokens, told = Condition(page, 64, lock), Semaphore(page, 192, 0), Queue(me, slots=2, size=4)
        hits = Counter(page, 64 * 10)
        items = lock, condition, event, tokens, barrier, told
        child = multiprocessing.get_context(method).Process(target=answer, args=items)
        child.start()
        barrier.wait(60)
        for _ in range(500):
            with lock:
                hits.add(1)
        with condition:
            condition.notify_all()
            condition.wait_for(lambda: hits.value == 1000, 60)
            condition.notify_all()
        event.set()
        for _ in range(2):
            assert tokens.acquire(timeout=60)
        assert told.get(60) == b"done"
        with told.get(60) as same:
            same[100] = 7
            assert page[100] == 7
        child.join(60)
        assert child.exitcode == 0


if __name__ == "__main__":
    share(*sys.argv[1:])
