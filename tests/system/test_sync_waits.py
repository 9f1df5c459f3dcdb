"""Waits of realmap.sync that do not end as hoped: signal handlers that raise, memory that goes."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

import pytest
from conftest import BOUND, PAGE, in_threads, wait_until
from held import held_elsewhere

import realmap
from realmap import Buffer, KernelPanic, OwnerDied, Process
from realmap.sync import Barrier, Condition, Event, Lock, Queue, Semaphore

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


@pytest.fixture
def page(me: Process) -> Buffer:
    return me.map(PAGE)


# ---- signal handlers ------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAITS)
def test_a_signal_handler_that_raises_ends_a_wait(page: Buffer, way: str) -> None:
    def stop(*_: object) -> None:
        raise Stop

    before = signal.signal(signal.SIGALRM, stop)
    try:
        with held_elsewhere(Lock(page, 192)):
            with pytest.raises(Stop):
                signal.setitimer(signal.ITIMER_REAL, 0.02)
                WAITS[way](page, BOUND)
    finally:
        signal.signal(signal.SIGALRM, before)
    page.unmap()  # nothing is held


@pytest.mark.parametrize("way", WAITS)
def test_a_signal_handler_does_not_lengthen_a_wait(page: Buffer, way: str) -> None:
    """It comes every few milliseconds, and uses what is waited for."""
    came: list[object] = []
    over = threading.Event()

    def use(_: int, frame: FrameType | None) -> None:
        came.append(Lock(page, 192).acquire(False))
        with pytest.raises(BufferError):
            page.unmap()
        if not over.is_set():  # the next one not before: where it gets no CPU they would nest, without end
            signal.setitimer(signal.ITIMER_REAL, 0.005)

    def end() -> None:
        over.set()
        signal.setitimer(signal.ITIMER_REAL, 0)

    before = signal.signal(signal.SIGALRM, use)
    try:
        with held_elsewhere(Lock(page, 192)):
            signal.setitimer(signal.ITIMER_REAL, 0.005)
            with contextlib.suppress(queue.Empty, queue.Full, threading.BrokenBarrierError):
                assert not WAITS[way](page, 0.3)
            end()
    finally:
        end()
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


def test_that_an_owner_died_comes_before_what_a_handler_raised(page: Buffer) -> None:
    condition, raised = Condition(page), threading.Event()

    def stop(*_: object) -> None:
        raised.set()
        raise Stop

    def die() -> None:
        condition.acquire()  # once the other one waits
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
        assert raised.wait(BOUND)  # and with it

    before = signal.signal(signal.SIGALRM, stop)
    thread = threading.Thread(target=die)
    try:
        condition.acquire()
        thread.start()
        with pytest.raises(OwnerDied):
            condition.wait(BOUND)
    finally:
        signal.signal(signal.SIGALRM, before)
        thread.join(BOUND)
    condition.recovered()
    condition.release()
    with condition:
        pass


def test_a_fork_in_a_wait_leaves_the_condition_as_it_was() -> None:
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=BOUND)
    assert (done.stdout, done.stderr) == ("fine\n", "")


FORKED = """
import os, signal, realmap
from realmap.sync import Condition
with realmap.boot() as kernel, kernel.connect() as me:
    condition, top = Condition(me.map(100)), os.getpid()
    signal.signal(signal.SIGALRM, lambda *_: os.fork())
    with condition:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        condition.wait(0.2)
    if os.getpid() != top:
        os._exit(0)
    os.wait()
    for _ in range(2):
        with condition:
            condition.notify_all()
    with condition:
        print("fine")
"""


# ---- threads and buffers that are not those that were --------------------------------------------


def test_a_later_thread_has_not_what_a_dead_one_held(page: Buffer) -> None:
    """Python gives the ident of a thread that has ended to the next one."""
    lock, other = Lock(page), Lock(page)
    in_threads(1, lambda _: lock.acquire())
    with pytest.raises(OwnerDied):
        other.acquire()
    other.recovered()

    def release(_: int) -> None:
        with pytest.raises(KernelPanic):
            lock.release()

    in_threads(1, release)
    other.release()
    with lock:
        pass


def test_a_condition_is_not_unmapped_while_its_lock_is_waited_for(me: Process, page: Buffer) -> None:
    lock, beside = Lock(page), me.map(PAGE)
    condition, waiting = Condition(beside, 0, Lock(page)), threading.Event()

    def wait() -> None:
        with condition:
            waiting.set()
            assert condition.wait(BOUND)

    thread = threading.Thread(target=wait)
    thread.start()
    assert waiting.wait(BOUND)
    with lock:
        Condition(beside, 0, lock).notify()
        end = time.monotonic() + 0.1  # by then it has woken, and wants its lock
        while time.monotonic() < end:
            with pytest.raises(BufferError):
                beside.unmap()
    thread.join(BOUND)
    beside.unmap()


def test_a_buffer_that_was_put_is_there_whatever_comes_then(kernel: realmap.KernelHandle, me: Process) -> None:
    class Interrupted(Queue):
        __slots__ = ()

        def _put_handle(self, *arguments: object) -> bool:
            super()._put_handle(*arguments)  # type: ignore[arg-type]
            raise Stop  # a signal handler's, as it returns

    sent = me.map(100)
    sent[:5] = b"hello"
    filled = Interrupted(me, slots=2, size=8)
    with pytest.raises(Stop):
        filled.put(sent)
    assert filled.get(BOUND)[:5] == b"hello"


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
