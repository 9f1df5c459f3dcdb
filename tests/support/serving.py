"""Processes that serve `placed.HANDLERS`, of a kernel that leaves that to them. Fixtures, for who imports them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import placed
import pytest
from conftest import wait_until

import realmap
from realmap import Call, KernelHandle, Process, UserBuffer
from realmap.system import SpawnedProcess


def of_the_kernel(call: Call, *args: Any) -> list[Any]:
    """What the kernel has itself."""
    return [len(each) if isinstance(each, UserBuffer) else each for each in args]


@pytest.fixture(scope="module")
def kernel(request: pytest.FixtureRequest) -> Iterator[KernelHandle]:
    """One that leaves the rest to others."""
    with realmap.boot(syscalls=[of_the_kernel], spin=0 if request.param == "socket" else 100) as handle:
        handle.stats()
        yield handle


@pytest.fixture
def spawn(kernel: KernelHandle, me: Process) -> Iterator[Callable[..., list[SpawnedProcess]]]:
    """So many processes that serve `placed.HANDLERS`."""
    made: list[SpawnedProcess] = []

    def start(count: int, threads: int = 2) -> list[SpawnedProcess]:
        there = kernel.stats()["seats"]
        new = [kernel.spawn(placed.serve, threads) for _ in range(count)]
        made.extend(new)
        wait_until(lambda: kernel.stats()["seats"] == there + count, "their service")
        return new

    yield start
    placed.kill_all(made)


def in_thread(act: Callable[[], object]) -> tuple[threading.Thread, list[Any]]:
    """What comes of it, once it has ended."""
    came: list[Any] = []

    def run() -> None:
        try:
            came.append(act())
        except Exception as error:
            came.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, came
