"""The ring by itself, and what a client can do with its end of it."""

from __future__ import annotations

import contextlib
import mmap
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
from realmap._core import (
    AWAKE,
    ON_SOCKET,
    ON_WORD,
    OVERLOADED,
    RING_BYTES,
    SAME_CPU,
    SpinBudget,
    fall_asleep,
    gather,
    wake_owed,
    wake_up,
)
from realmap.wire.ring import LONGEST, RingEnd

FULL_WAKES = 2_000_000
SLOTS = 32


def ring_pair() -> tuple[RingEnd, RingEnd]:
    kernel, fd = RingEnd.create()
    user = RingEnd.join(fd)
    os.close(fd)
    return kernel, user


@pytest.fixture
def pair() -> Iterator[tuple[RingEnd, RingEnd]]:
    kernel, user = ring_pair()
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
                message = rng.randbytes(rng.choice((0, 1, 17, 60, 61, LONGEST)))
                assert giver._send(message, -1) == AWAKE
                sent.append(message)
            elif sent:
                assert taker._pop() == sent.pop(0)
            else:
                assert taker._pop() is None


def test_what_does_not_fit_is_not_taken(pair: tuple[RingEnd, RingEnd]) -> None:
    kernel, user = pair
    assert user._send(bytes(LONGEST + 1), -1) == -1
    assert [user._send(b"x", -1) for _ in range(SLOTS + 1)] == [AWAKE] * SLOTS + [-1]
    assert [kernel._pop() for _ in range(SLOTS + 1)] == [b"x"] * SLOTS + [None]
    assert user._send(b"again", -1) == AWAKE
    with pytest.raises(TypeError):
        user._send("text", -1)  # type: ignore[arg-type]


def test_sleeping_and_waking(pair: tuple[RingEnd, RingEnd]) -> None:
    kernel, user = pair
    assert fall_asleep([kernel]) is True
    assert [user._send(b"x", -1), user._send(b"y", -1)] == [ON_SOCKET, AWAKE], "one wakes it, once"
    assert fall_asleep([kernel]) is False, "with a message there, nobody sleeps"
    kernel._pop()
    kernel._pop()
    assert fall_asleep([kernel]) is True
    wake_up([kernel])
    assert user._send(b"z", -1) == AWAKE


def test_all_that_have_a_message_are_found_from_behind_the_last_one_on(pair: tuple[RingEnd, RingEnd]) -> None:
    kernel, user = pair
    ends = [pair, *[ring_pair() for _ in range(2)]]
    rings = [end[0] for end in ends]
    assert gather(rings, None, 1000) in (-1, OVERLOADED)
    for _, each in ends:
        each._send(b"x", -1)
    found = [gather(rings, last, 0) for last in (None, *rings)]
    assert found == [rings, [*rings[1:], rings[0]], [rings[2], *rings[:2]], rings]
    rings[1]._pop()
    assert gather(rings, rings[0], 0) == [rings[2], rings[0]]
    assert gather([rings[1]], rings[2], 0) == -1, "the last one is not in the list any more"
    assert gather([], None, 1000) == -1
    for nonsense in ((rings[0],), [1], None):
        with pytest.raises(TypeError):
            gather(nonsense, None, 0)  # type: ignore[type-var]
    thread = threading.Timer(0.02, kernel._send, (b"late", -1))
    thread.start()
    while (late := gather([user], None, int(BOUND * 1e9))) == OVERLOADED:
        pass  # others wanted the CPU
    assert late == [user]
    thread.join()
    for end in ends[1:]:
        for ring in end:
            ring._close()


def test_a_closed_ring_says_so(pair: tuple[RingEnd, RingEnd]) -> None:
    kernel, _ = pair
    kernel._close()
    kernel._close()
    uses = (
        lambda: kernel._send(b"x", -1),
        kernel._pop,
        lambda: gather([kernel], None, 0),
        lambda: fall_asleep([kernel]),
    )
    for use in uses:
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
    rng = random.Random(7)
    lies = 0
    for _ in range(100):
        kernel, fd = RingEnd.create()
        user = RingEnd.join(fd)
        with mmap.mmap(fd, RING_BYTES) as memory:
            user._send(b"x" * 20, -1)
            for _ in range(rng.randrange(1, 4)):
                at = rng.choice((0, 64, 128, 192, rng.randrange(RING_BYTES - 4)))
                memory[at : at + 4] = rng.randbytes(4)
            try:
                for _ in range(40):
                    kernel._pop()
                kernel._send(b"answer", -1)
            except ValueError as error:
                lies += "lie" in str(error)
        os.close(fd)
        kernel._close()
        user._close()
    assert lies > 15


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
                said = user._send(b"wake", theirs.fileno())
                seen += said == ON_SOCKET
                if said < 0:
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
                hostile.ring._send(rng.randbytes(rng.randrange(LONGEST)), -1)
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


def test_who_waits_for_its_socket_is_rung_once(pair: tuple[RingEnd, RingEnd]) -> None:
    """However many messages come until it has looked: a loop is woken once for all of them."""
    kernel, user = pair
    bell, waker = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    bell.setblocking(False)
    assert fall_asleep([user])
    sent = [str(number).encode() for number in range(SLOTS)]
    assert [kernel._send(each, waker.fileno()) for each in sent] == [ON_SOCKET] + [AWAKE] * (SLOTS - 1)
    assert bell.recv(10) == b"\4"
    with pytest.raises(BlockingIOError):
        bell.recv(10)
    assert kernel._takes(0) is True
    assert kernel._takes(1) is False
    assert [user._pop() for _ in sent] == sent
    assert (kernel._takes(LONGEST), kernel._takes(LONGEST + 1)) == (True, False)
    bell.close()
    waker.close()


@pytest.mark.parametrize("end", ["says so", "closes"])
def test_who_sleeps_on_its_word_is_woken_by_what_comes_by_the_socket(kernel: KernelHandle, end: str) -> None:
    """A long answer does not fit the ring; the end of a connection says nothing there."""
    with kernel.connect() as me:
        if end == "says so":
            for _ in range(20):
                assert me.call("echo", "x" * 5000) == ["x" * 5000]
            return
        thread = threading.Timer(0.1, me.close)
        thread.start()
        with pytest.raises(realmap.ProcessKilled):
            me.call("sleep", BOUND)
        thread.join()


def test_who_sleeps_on_its_word_is_woken_once() -> None:
    """Without a bell: it has said so, and of several messages one wakes it."""
    kernel, fd = RingEnd.create()
    user = RingEnd.join(fd)
    with mmap.mmap(fd, RING_BYTES) as memory:
        asleep = RING_BYTES // 2 + 2 * 64
        memory[asleep] = ON_WORD
        assert [kernel._send(b"x", -1) for _ in range(3)] == [ON_WORD, AWAKE, AWAKE]
        assert memory[asleep] == AWAKE
        memory[asleep] = ON_WORD
        kernel._mailed()
        assert memory[asleep] == AWAKE, "and what comes by the socket does"
        memory[asleep] = ON_SOCKET
        kernel._mailed()
        assert memory[asleep] == ON_SOCKET, "who waits for that has it, and may wait anew by now"
        for _ in range(3):
            memory[asleep] = ON_WORD
            assert kernel._send(b"y", -1) == ON_WORD, "it woke by itself, and sleeps again"
    wake_owed()
    os.close(fd)
    kernel._close()
    user._close()


def test_nobody_spins_on_the_cpu_of_who_is_waited_for(pair: tuple[RingEnd, RingEnd]) -> None:
    allowed = os.sched_getaffinity(0)
    kernel, user = pair
    try:
        os.sched_setaffinity(0, {min(allowed)})
        kernel._send(b"heard here", -1)
        assert user._pop() == b"heard here"
        before = time.monotonic()
        assert gather([user], None, int(BOUND * 1e9)) == SAME_CPU
        assert time.monotonic() - before < BOUND
        if len(allowed) > 1:
            os.sched_setaffinity(0, {max(allowed)})
            assert gather([user], None, 1000) in (-1, OVERLOADED)
    finally:
        os.sched_setaffinity(0, allowed)


def test_an_idle_kernel_sleeps(kernel: KernelHandle) -> None:
    users = [kernel.connect() for _ in range(8)]
    for user in users:
        user.call("nop")
    process = psutil.Process(kernel.pid)
    wait_until(lambda: process.status() == psutil.STATUS_SLEEPING)

    def sleeps() -> bool:
        switches = process.num_ctx_switches().voluntary
        busy = sum(process.cpu_times()[:2])
        threading.Event().wait(1.0)
        return process.num_ctx_switches().voluntary - switches < 20 and sum(process.cpu_times()[:2]) - busy <= 0.02

    wait_until(sleeps, "a second in which it is not woken")
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
