"""The ring by itself, and what a client can do with its end of it."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import select
import socket
import threading
import time
from collections.abc import Iterator

import psutil
import pytest
import syscalls
from conftest import BOUND, in_threads, scaled, wait_until
from raw_client import RawClient

import realmap
from realmap import InvalidSize, KernelHandle, Process
from realmap._core import OVERLOADED, RING_BYTES, SAME_CPU, SpinBudget, fall_asleep, spin, wake_up
from realmap.wire.ring import LONGEST, RingEnd

FULL_WAKES = 2_000_000
SLOTS = 32


@pytest.fixture
def pair() -> Iterator[tuple[RingEnd, RingEnd]]:
    kernel, fd = RingEnd.create()
    user = RingEnd.join(fd)
    os.close(fd)
    yield kernel, user
    kernel._close()
    user._close()


def test_messages_arrive_in_order_both_ways(pair: tuple[RingEnd, RingEnd]) -> None:
    kernel, user = pair
    rng = random.Random(3)
    for giver, taker in ((user, kernel), (kernel, user)):
        sent: list[bytes] = []
        for _ in range(2000):
            if len(sent) < SLOTS and rng.random() < 0.6:
                message = rng.randbytes(rng.choice((0, 1, 17, LONGEST)))
                assert giver._push(message) == 1
                sent.append(message)
            elif sent:
                assert taker._pop() == sent.pop(0)
            else:
                assert taker._pop() is None


def test_what_does_not_fit_is_not_taken(pair: tuple[RingEnd, RingEnd]) -> None:
    kernel, user = pair
    assert user._push(bytes(LONGEST + 1)) == 0
    assert [user._push(b"x") for _ in range(SLOTS + 1)] == [1] * SLOTS + [0]
    assert [kernel._pop() for _ in range(SLOTS + 1)] == [b"x"] * SLOTS + [None]
    assert user._push(b"again") == 1
    with pytest.raises(TypeError):
        user._push("text")  # type: ignore[arg-type]


def test_sleeping_and_waking(pair: tuple[RingEnd, RingEnd]) -> None:
    kernel, user = pair
    assert fall_asleep([kernel]) is True
    assert [user._push(b"x"), user._push(b"y")] == [2, 1], "one wakes it, once"
    assert fall_asleep([kernel]) is False, "with a message there, nobody sleeps"
    kernel._pop()
    kernel._pop()
    assert fall_asleep([kernel]) is True
    wake_up([kernel])
    assert user._push(b"z") == 1


def test_spinning_finds_from_where_it_is_told(pair: tuple[RingEnd, RingEnd]) -> None:
    kernel, user = pair
    other, fd = RingEnd.create()
    other_user = RingEnd.join(fd)
    os.close(fd)
    rings = [kernel, other]
    assert spin(rings, 0, 1000) == -1
    user._push(b"x")
    assert [spin(rings, start, 0) for start in (0, 1, 2, 7)] == [0] * 4
    other_user._push(b"y")
    assert [spin(rings, start, 0) for start in (0, 1, 2)] == [0, 1, 0]
    assert spin([], 0, 1000) == -1
    for nonsense in ((rings[0],), [1], None):
        with pytest.raises(TypeError):
            spin(nonsense, 0, 0)  # type: ignore[arg-type]
    thread = threading.Timer(0.02, kernel._push, (b"late",))
    thread.start()
    while (found := spin([user], 0, int(BOUND * 1e9))) == OVERLOADED:
        pass  # others wanted the CPU
    assert found == 0
    thread.join()


def test_a_closed_ring_says_so(pair: tuple[RingEnd, RingEnd]) -> None:
    kernel, _ = pair
    kernel._close()
    kernel._close()
    for use in (lambda: kernel._push(b"x"), kernel._pop, lambda: spin([kernel], 0, 0), lambda: fall_asleep([kernel])):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_the_memory_of_a_ring_cannot_be_truncated() -> None:
    kernel, fd = RingEnd.create()
    for size in (0, RING_BYTES - 1, RING_BYTES + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    os.close(fd)
    small = os.memfd_create("small")
    os.ftruncate(small, 100)
    with pytest.raises(ValueError, match="small"):
        RingEnd.join(small)
    os.close(small)
    with pytest.raises(OSError, match="Bad file"):
        RingEnd.join(9999)
    kernel._close()


def test_indices_that_lie_are_found_out() -> None:
    import mmap

    rng = random.Random(7)
    lies = 0
    for _ in range(300):
        kernel, fd = RingEnd.create()
        user = RingEnd.join(fd)
        with mmap.mmap(fd, RING_BYTES) as memory:
            user._push(b"x" * 20)
            for _ in range(rng.randrange(1, 4)):
                at = rng.choice((0, 64, 128, 192, rng.randrange(RING_BYTES - 4)))
                memory[at : at + 4] = rng.randbytes(4)
            try:
                for _ in range(40):
                    kernel._pop()
                kernel._push(b"answer")
            except ValueError as error:
                lies += "lie" in str(error)
        os.close(fd)
        kernel._close()
        user._close()
    assert lies > 50


def wakes(count: int) -> int:
    """`count` sleeps of a consumer, each ended by a producer in another process; how many were missed."""
    kernel, fd = RingEnd.create()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if not child:
        try:
            user = RingEnd.join(fd)
            ours.close()
            seen = 0
            while seen < count:
                said = user._push(b"wake")
                if said == 2:
                    theirs.send(b"!")
                    seen += 1
                elif said == 0:
                    os.sched_yield()
        finally:
            os._exit(0)
    os.close(fd)
    theirs.close()
    poll = select.poll()
    poll.register(ours, select.POLLIN)
    slept = missed = 0
    rings = [kernel]
    while slept < count:
        while kernel._pop() is not None:
            pass
        if fall_asleep(rings):
            slept += 1
            if not poll.poll(BOUND * 1000):
                missed += 1
                break
            ours.recv(1)
            wake_up(rings)
    ours.close()
    os.kill(child, 9)
    os.waitpid(child, 0)
    kernel._close()
    return missed


def test_no_wake_up_is_lost() -> None:
    assert wakes(5_000) == 0


@pytest.mark.slow
def test_no_wake_up_is_lost_full_count() -> None:
    count = scaled(FULL_WAKES)
    start = time.monotonic()
    assert wakes(count) == 0
    print(f"{count} sleeps and wakes, 0 lost, {time.monotonic() - start:.0f} s")


# ---- budgets ------------------------------------------------------------------------------


def test_a_budget_halves_where_it_does_not_pay_and_comes_back() -> None:
    budget = SpinBudget(100_000, 2)
    seen = [budget.now(1)]
    for _ in range(8):
        budget.spun(-1, 1)
        seen.append(budget.now(1))
    assert seen[:3] == [100_000, 50_000, 25_000]
    assert seen[-1] == 0
    budget.slept(10_000_000)
    assert budget.now(1) == 0
    budget.slept(50_000)
    assert budget.now(1) == 100_000
    budget.spun(-1, 1)
    budget.spun(SAME_CPU, 1)
    assert budget.now(1) == 50_000, "who is waited for could not say anything: that says nothing of spinning"
    budget.spun(0, 1)
    assert budget.now(1) == 100_000
    assert SpinBudget(0, 2).now(1) == 0
    alone = SpinBudget(100_000, 1)
    alone.slept(50_000)
    assert alone.now(1) == 0, "on one CPU, who is waited for could not run"


def test_no_spinning_while_others_want_the_cpus() -> None:
    shortest, longest = 10_000_000, 1_280_000_000
    clock = 2 * longest
    budget, pauses = SpinBudget(100_000, 2), []
    for _ in range(10):
        budget.spun(OVERLOADED, clock)
        start = clock
        while not budget.now(clock):
            clock += 1_000_000
        pauses.append(clock - start)
    assert pauses[:3] == [shortest, 2 * shortest, 4 * shortest]
    assert pauses[-1] == longest
    clock += 10 * longest
    budget.spun(OVERLOADED, clock)
    assert budget.now(clock + shortest - 1) == 0
    assert budget.now(clock + shortest) == 100_000, "long after the last time it is short again"


@pytest.mark.parametrize(
    ("value", "error"), [(-1, InvalidSize), (float("nan"), InvalidSize), (1e9, InvalidSize), ("1", TypeError)]
)
def test_spins_that_are_none(value: object, error: type[Exception]) -> None:
    for make in (realmap.boot, realmap.Kernel):
        with pytest.raises(error):
            make(spin=value)  # type: ignore[call-overload]


# ---- a kernel with rings ------------------------------------------------------------------


def test_a_client_that_scribbles_hurts_only_itself(kernel: KernelHandle, me: Process) -> None:
    rng = random.Random(11)
    for _ in range(40):
        with RawClient(kernel.path) as hostile:
            for _ in range(rng.randrange(1, 6)):
                hostile.ring._push(rng.randbytes(rng.randrange(LONGEST)))
            with contextlib.suppress(BrokenPipeError):  # an awake kernel has read it, and sent the client away already
                hostile.sock.send(b"\4")
            hostile.sock.settimeout(BOUND)
            with contextlib.suppress(ConnectionError):
                while hostile.sock.recv(1 << 17):
                    pass
        assert me.call("echo", 1) == [1]


def test_calls_go_by_the_ring(me: Process) -> None:
    """Not one system call of the socket for a short call: both sides are awake, as they are between two calls."""
    assert me._own_client.endpoint.has_ring

    def silent() -> bool:
        """Whether some calls in a row went without one sleep of this thread."""
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
        for _ in range(5):  # more of them nobody is let do on a loaded machine
            assert me.call("echo", "short") == ["short"]
        return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw == before

    wait_until(silent, "calls by the ring alone")


def test_who_sleeps_is_sent_the_message_itself(pair: tuple[RingEnd, RingEnd]) -> None:
    """Not a bell and then the message: one system call, and one less to look for it."""
    kernel, user = pair
    bell, waker = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fd = waker.fileno()
    assert kernel._offer(b"awake", fd)
    assert user._pop() == b"awake"
    assert fall_asleep([user])
    assert (kernel._offer(b"asleep", fd), kernel._takes(10)) == (False, False)
    assert user._pop() is None
    assert kernel._send(b"all the same", fd)
    assert bell.recv(10) == b"\4"
    wake_up([user])
    assert (kernel._offer(b"again", fd), kernel._takes(10)) == (True, True)
    assert (kernel._takes(LONGEST), kernel._takes(LONGEST + 1)) == (True, False)
    assert [user._pop(), user._pop()] == [b"all the same", b"again"]
    bell.close()
    waker.close()


def test_nobody_spins_on_the_cpu_of_who_is_waited_for(pair: tuple[RingEnd, RingEnd]) -> None:
    allowed = os.sched_getaffinity(0)
    kernel, user = pair
    try:
        os.sched_setaffinity(0, {min(allowed)})
        kernel._offer(b"heard here", -1)
        assert user._pop() == b"heard here"
        before = time.monotonic_ns()
        assert spin([user], 0, 10**9) == SAME_CPU
        assert time.monotonic_ns() - before < 10**9
        if len(allowed) > 1:
            os.sched_setaffinity(0, {max(allowed)})
            assert spin([user], 0, 1000) in (-1, OVERLOADED)
    finally:
        os.sched_setaffinity(0, allowed)


def test_an_idle_kernel_sleeps(kernel: KernelHandle) -> None:
    users = [kernel.connect() for _ in range(8)]
    for user in users:
        user.call("nop")
    process = psutil.Process(kernel.pid)
    wait_until(lambda: process.status() == psutil.STATUS_SLEEPING)
    switches = process.num_ctx_switches().voluntary
    busy = sum(process.cpu_times()[:2])
    threading.Event().wait(1.0)
    assert process.num_ctx_switches().voluntary - switches < 20, "it is not woken"
    assert sum(process.cpu_times()[:2]) - busy <= 0.02
    for user in users:
        user.close()
    wait_until(lambda: kernel.stats()["processes"] == 0)


@pytest.mark.process
def test_many_clients_at_once() -> None:
    with realmap.boot(syscalls=syscalls.ALL) as kernel:

        def work(seed: int) -> None:
            with kernel.connect() as me:
                for turn in range(300):
                    assert me.call("echo", seed, turn) == [seed, turn]

        in_threads(8, work)
