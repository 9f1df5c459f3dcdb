"""Many processes at once: everybody has its turn, and a loop is told once of many answers."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time

from conftest import BOUND, in_threads, wait_until
from raw_client import RawClient

import realmap
from realmap import KernelHandle, Process
from realmap._core import Bell, gather
from realmap.wire.client.waiter import Waiter

CLIENTS = 13


def test_a_talker_starves_nobody(kernel: KernelHandle) -> None:
    """While one client never stops asking, each of the others has as many answers as it asks for, one a turn."""
    talker, stop = kernel.connect(), threading.Event()
    talked = [0]

    def talk() -> None:
        while not stop.is_set():
            talker.call("nop")
            talked[0] += 1

    def work(seed: int) -> None:
        with kernel.connect() as me:
            for turn in range(100):
                assert me.call("echo", seed, turn, timeout=BOUND) == [seed, turn]

    thread = threading.Thread(target=talk)
    thread.start()
    try:
        in_threads(CLIENTS, work)
    finally:
        stop.set()
        thread.join(BOUND)
        talker.close()
    assert talked[0]


def test_one_message_of_each_in_a_pass() -> None:
    """Of three clients with four messages each, everyone's first is taken before anybody's second."""
    with realmap.Kernel(syscalls=[]) as kernel:
        clients = [RawClient(kernel.path) for _ in range(3)]
        done = threading.Event()
        taken: list[int] = []

        def look() -> None:  # on the loop: nobody else takes a message meanwhile
            rings, take = list(kernel.clients.rings), kernel.clients.take_from_ring
            for client in clients:
                for _ in range(4):
                    assert client.ring._send(b"\x94\x01\x00\xa3nop\x90", client.sock.fileno()) >= 0
            last = None
            while isinstance(found := gather(rings, last, 0), list):
                for last in found:
                    taken.append(rings.index(last))
                    take(last)
            done.set()

        kernel.loop.post(look)
        assert done.wait(BOUND)
        assert [sorted(taken[at : at + 3]) for at in range(0, 12, 3)] == [[0, 1, 2]] * 4
        for client in clients:
            client.ring._close()
            client.sock.close()


def test_a_loop_looks_once_for_many_answers(me: Process) -> None:
    """Fewer looks than answers: what has come by the time that the loop comes round is seen at once."""
    looks = [0]

    async def work() -> None:
        looks[0] = 0
        waiter, loop = Waiter.of(me._client), asyncio.get_running_loop()
        look = waiter._look

        def counted() -> None:
            looks[0] += 1
            look()

        waiter._bell = Bell(counted, loop.call_soon_threadsafe, loop.is_closed)
        answers = await asyncio.gather(*(me.acall("echo", number) for number in range(30)))
        assert answers == [[number] for number in range(30)]

    # A loop that gets the CPU after each answer sees them one by one.
    wait_until(lambda: asyncio.run(work()) or looks[0] < 30, "a look that found more than one")  # type: ignore[func-returns-value]


def test_a_long_answer_comes_however_busy_the_ring_is(me: Process) -> None:
    """It goes by the socket, which whoever reads for all has to look at, too."""
    ended = threading.Event()

    def work(number: int) -> None:
        if number:
            while not ended.is_set():
                me.call("nop")
            return
        began = time.monotonic()
        while (count := next(counted)) < 300 and time.monotonic() - began < BOUND:
            assert len(me.call("long_text", 6000)) == 6000
        ended.set()
        assert count == 300

    counted = itertools.count()
    in_threads(3, work)


def test_a_loop_that_ends_with_its_bell_rung_leaves_the_others_theirs(me: Process) -> None:
    first, answers = asyncio.new_event_loop(), []
    forgotten = first.create_task(me.acall("wait_for", "nobody"))
    first.run_until_complete(asyncio.sleep(0.05))
    watching = threading.Event()

    async def wait() -> None:
        asyncio.get_running_loop().call_later(0.05, watching.set)
        answers.append(await me.acall("wait_for", "the second loop"))

    thread = threading.Thread(target=asyncio.run, args=(wait(),))
    thread.start()
    assert watching.wait(BOUND)
    me.call("nop")  # rings the first one, which does not run
    first.close()
    me.call("nop")
    with Process(me.path) as other:
        other.call("go_by_name", "the second loop")
        thread.join(BOUND)
        other.call("go_by_name", "nobody")
    assert answers == ["the second loop"]
    forgotten._log_destroy_pending = False  # type: ignore[attr-defined]
