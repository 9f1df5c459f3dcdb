"""What small services do: a gate that calls wait at, a number squared. With fixtures, for who imports them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from conftest import BOUND

import realmap
from realmap import Call, Process


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as made:
        yield made


class Gate:
    """A handler that is at work until it is let go; how many are, and were at a time."""

    def __init__(self) -> None:
        self.at_work = self.most = 0
        self._lock = threading.Lock()
        self._open = threading.Event()

    def open(self) -> None:
        self._open.set()

    def handler(self, call: Call) -> str:
        with self._lock:
            self.at_work += 1
            self.most = max(self.most, self.at_work)
        assert self._open.wait(BOUND)
        with self._lock:
            self.at_work -= 1
        return "through"


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.open()


def passing(me: Process, pool: ThreadPoolExecutor, count: int) -> list[Future[Any]]:
    return [pool.submit(me.call, "gate", timeout=BOUND) for _ in range(count)]


def gated(gate: Gate, blocking: bool) -> Callable[..., str]:
    return realmap.syscall(name="gate", blocking=blocking)(lambda call: gate.handler(call))


def square(call: Call, number: int) -> list[int]:
    return [number * number, os.getpid()]


def named(name: str) -> Callable[..., list[int]]:
    """`square` by another name: a function of its own, for a mark stays on what it is put on."""
    return realmap.syscall(name=name)(lambda call, number: square(call, number))
