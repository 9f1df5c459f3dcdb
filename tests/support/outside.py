"""Blocks of a kernel that is not of the test's tree, and another process that does something with them. With fixtures,
for who imports them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from typing import TypeAlias

import pytest
from blocks import end, hear, start
from parked import stock

import realmap
from realmap import KernelHandle, Limits, ambient
from realmap.shared_memory import SharedMemory
from realmap.user import travel

SIZE = 3333
#: Has another process do something with the block of a name; what that says.
Other: TypeAlias = Callable[[str, str], str]
LOOP = """
held = []
def attach(name):
    block = SharedMemory(name)
    said = bytes(block.buf[:4]).decode()
    block.close()
    return said
def hold(name):
    held.append(SharedMemory(name))
    return bytes(held[-1].buf[:4]).decode()
def drop(name):
    block = held.pop()
    said = bytes(block.buf[:4]).decode()
    block.close()
    return said
def unlink(name):
    block = SharedMemory(name)
    block.close()
    block.unlink()
    return "unlinked"
def make(name):
    SharedMemory(name, create=True, size=10).unlink()
    return "made"
def again(name):
    for _ in range(2):  # the second one as all later ones
        block = SharedMemory(create=True, size=10)
        if _:
            block.buf[:4] = b"here"
            return block.name
        block.close()
        block.unlink()
    return block.name
for line in sys.stdin:
    what, name = line.split()
    try:
        print(globals()[what](name), flush=True)
    except OSError as error:
        print(type(error).__name__, flush=True)
"""


@pytest.fixture
def limits() -> Limits:
    return Limits()


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch, limits: Limits) -> Iterator[KernelHandle]:
    """A kernel that is not the tree's; a window is parked for the next block."""
    with realmap.boot(limits=limits) as kernel:
        monkeypatch.setenv(ambient.VARIABLE, kernel.path)
        made().unlink()
        assert stock(kernel) == (0, 0)  # it is mapped yet
        yield kernel
        travel.own_process_of(kernel.path).close()


@pytest.fixture
def other(outside: KernelHandle) -> Iterator[Other]:
    process = start(LOOP, "realmap", env=dict(os.environ))
    yield lambda what, name: say(process, what, name)
    assert end(process, "") == ("", "")


def say(process: subprocess.Popen[str], what: str, name: str) -> str:
    assert process.stdin is not None
    process.stdin.write(f"{what} {name}\n")
    process.stdin.flush()
    return hear(process)


def made(text: bytes = b"here") -> SharedMemory:
    block = SharedMemory(create=True, size=SIZE)
    assert bytes(block.buf) == bytes(SIZE)
    block.buf[: len(text)] = text
    return block


def address_of(block: SharedMemory) -> int:
    assert block._buffer is not None
    return block._buffer.address


def messages() -> int:
    """How many numbers the connection has given to messages, this question's own included."""
    return ambient.process()._own_client.next_id()


def gone(block: SharedMemory) -> int:
    """Where it was."""
    address = address_of(block)
    block.close()
    block.unlink()
    return address


def sums(kernel: KernelHandle) -> tuple[int, int, int]:
    """Handles, mappings, and what is kept; the books agree with Linux."""
    ambient.process().query(realmap.memory.USER_LAND.start)  # what was only told before has been heard
    stats = kernel.stats()
    assert kernel.audit()
    return stats["handles"], stats["mappings"], stats["stock"]
