"""Locks and queues between processes, beside the standard library's."""

from __future__ import annotations

import multiprocessing
import threading
import time
from typing import Any

from realmap.lab.bench.measure import Batch, Contender, timed
from realmap.lab.bench.run import Bench
from realmap.sync import Lock, Queue
from realmap.user.process import Process

SMALL, LARGE = 64, 1 << 20


def drain(me: Process, queue: Queue, answers: Queue) -> None:
    """Takes as many messages as the first says, and answers, again and again."""
    while count := int.from_bytes(queue.get()[:8], "little"):
        for _ in range(count):
            queue.get()
        answers.put(b"")


def _to(queue: Queue, answers: Queue, message: Any) -> Batch:
    def batch(count: int) -> int:
        queue.put(count.to_bytes(8, "little"))
        start = time.perf_counter_ns()
        for _ in range(count):
            queue.put(message)
        answers.get()
        return time.perf_counter_ns() - start

    return batch


def measure(bench: Bench) -> None:
    bench.say("sync")
    kernel, me = bench.kernel()
    with me.map(4096) as page:
        for work, once in (("acquire + release", "lock.acquire(); lock.release()"), ("with", "with lock: pass")):
            contenders = [
                Contender("multiprocessing.Lock", timed(once, lock=multiprocessing.Lock())),
                Contender("threading.Lock", timed(once, lock=threading.Lock()), "multiprocessing.Lock"),
                Contender("Lock", timed(once, lock=Lock(page)), "multiprocessing.Lock"),
                Contender("Lock, to threading's", timed(once, lock=Lock(page, 64)), "threading.Lock"),
            ]
            bench.race("sync", contenders, work=work)
    for size, slots in ((SMALL, 1024), (LARGE, 8)):
        queue, answers = Queue(me, slots=slots, size=size), Queue(me, slots=1, size=8)
        consumer = kernel.spawn(drain, queue, answers)
        theirs = bench.peer("simple_queue").batch("messages", size)
        contenders = [
            Contender("multiprocessing.SimpleQueue", theirs),
            Contender("Queue", _to(queue, answers, bytes(size)), "multiprocessing.SimpleQueue"),
        ]
        bench.race("sync", contenders, size, "one to one")
        queue.put(bytes(8))
        consumer.join(10)
