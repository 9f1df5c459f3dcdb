"""Services that call services, the kernel, and themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import placed
import pytest
from conftest import BOUND, PAGE, wait_until
from serving import kernel

import realmap
from realmap import Call, KernelHandle, Process, ProcessKilled, UserBuffer
from realmap.system import SpawnedProcess

__all__ = ["kernel"]
CARRIERS = ("ring", "socket")


def serve_chain(me: Process, name: str, calls: str, threads: int) -> None:
    """Each asks the next one, until the number is 0."""

    @realmap.syscall(name=name)
    def chain(call: Call, number: int, data: UserBuffer) -> list[Any]:
        with data.mirror(realmap.k_r) as mirror:
            mine = hashlib.sha256(mirror).hexdigest()
        if not number:
            return [name, mine]
        with me.map(len(data)) as copy:
            copy[:] = data.copy_in()
            return [name, mine, *me.call(calls, number - 1, copy)]

    with suppress(realmap.KernelDied, ProcessKilled), me.serve(chain, threads=threads) as service:
        service.wait()


@pytest.fixture
def chained(kernel: KernelHandle, me: Process) -> Iterator[Callable[..., None]]:
    """Services that call one another."""
    made: list[SpawnedProcess] = []

    def start(name: str, calls: str, threads: int) -> None:
        made.append(kernel.spawn(serve_chain, name, calls, threads))
        wait_until(lambda: placed.servers_of(me, name, 1))

    yield start
    for each in made:
        each.kill()
        each.join()
    made.clear()


def test_services_call_services_and_the_kernel(me: Process, chained: Any) -> None:
    chained("first", "second", 1)
    chained("second", "third", 1)
    chained("third", "of_the_kernel", 1)
    buffer = me.map(5_000)
    digest = hashlib.sha256(buffer).hexdigest()
    assert me.call("first", 2, buffer, timeout=BOUND) == ["first", digest, "second", digest, "third", digest]
    last = me.call("first", 3, buffer.slice(3, 100), timeout=BOUND)
    assert (last[4], last[-2:]) == ("third", [0, 100])


def test_a_circle_that_would_wait_for_itself_is_an_error(me: Process, chained: Any) -> None:
    chained("around", "about", 1)
    chained("about", "around", 1)
    buffer = me.map(100)
    assert me.call("around", 1, buffer, timeout=BOUND)[::2] == ["around", "about"]
    with pytest.raises(realmap.LimitReached, match="wait for itself"):
        me.call("around", 2, buffer, timeout=BOUND)
    assert me.call("about", 1, buffer, timeout=BOUND)[::2] == ["about", "around"]


def test_a_circle_with_threads_enough(me: Process, chained: Any) -> None:
    chained("wide", "side", 3)
    chained("side", "wide", 3)
    assert me.call("wide", 5, me.map(100), timeout=BOUND)[::2] == ["wide", "side"] * 3
    with pytest.raises(realmap.LimitReached):
        me.call("wide", 6, me.map(100), timeout=BOUND)


def test_a_process_serves_and_calls_itself(me: Process) -> None:
    def down(call: Call, number: int, data: UserBuffer) -> int:
        data.copy_out(bytes([number]), number)
        return 1 + (me.call("down", number - 1, mine) if number else 0)

    mine = me.map(PAGE + 10)
    with me.serve(down, threads=4):
        assert me.call("down", 3, mine, timeout=BOUND) == 4
        assert mine[:5] == b"\0\1\2\3\0"
        with pytest.raises(realmap.LimitReached, match="wait for itself"):
            me.call("down", 4, mine, timeout=BOUND)
    with me.serve(down), pytest.raises(realmap.LimitReached):
        me.call("down", 1, mine, timeout=BOUND)
