"""What runs in the kernel process: the same loops that the C floor and the peers run, over a `UserBuffer`."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy

from realmap.kernel import Call, UserBuffer, syscall
from realmap.lab.bench.measure import timed
from realmap.pages import PAGE_SIZE
from realmap.rights import k_r

#: How many words `touch` reads, evenly spread.
WORDS = 8


def touch(memory: Any) -> int:
    """Reads a few 64-bit words of it."""
    with memoryview(memory) as view, view.cast("Q") as words:
        step = max(1, len(words) // WORDS)
        return sum(words[at] for at in range(0, len(words), step)[:WORDS])


def read(memory: Any) -> int:
    return int(numpy.frombuffer(memory, numpy.uint64).sum())


def write(memory: Any) -> None:
    """Writes all of it, something else each time."""
    numpy.frombuffer(memory, numpy.uint8).fill(time.monotonic_ns() & 0xFF)


def pages(memory: Any) -> None:
    numpy.frombuffer(memory, numpy.uint8)[::PAGE_SIZE] = time.monotonic_ns() & 0xFF


WORKS: dict[str, Callable[[Any], Any]] = {"touch": touch, "read": read, "write": write, "pages": pages}


@functools.lru_cache(1)
def _warm(length: int) -> Any:
    return numpy.zeros(length, numpy.uint8)


def _by_mirror(data: UserBuffer, work: str, populate: bool) -> Callable[[], None]:
    if work == "none":
        return lambda: data.mirror(populate=populate).drop()
    do = WORKS[work]

    def once() -> None:
        with data.mirror(populate=populate) as mirror:
            do(mirror)

    return once


def _by_copy(data: UserBuffer, work: str) -> Callable[[], object]:
    if work == "none":
        return data.copy_in
    if work == "write":
        memory = _warm(len(data))

        def once() -> None:
            write(memory)
            data.copy_out(memory)

        return once
    do = WORKS[work]
    return lambda: do(data.copy_in())


def _by_words(data: UserBuffer) -> Callable[[], object]:
    step = max(8, len(data) // WORDS // 8 * 8)
    places = range(0, len(data) - 7, step)[:WORDS]
    return lambda: sum(int.from_bytes(data.copy_in(8, at), "little") for at in places)


@syscall
def bench_reach(call: Call, data: UserBuffer, way: str, work: str, count: int) -> int:
    """Nanoseconds for `count` times reaching `data` by `way`, and doing `work` on it."""
    if way == "words":
        once: Callable[[], object] = _by_words(data)
    elif way == "copy":
        once = _by_copy(data, work)
    else:
        once = _by_mirror(data, work, way == "populate")
    return timed(once)(count)


@syscall
def bench_nop(call: Call) -> None:
    """Nothing."""


@syscall
def bench_take(call: Call, data: UserBuffer) -> int:
    return len(data.copy_in())


@syscall
def bench_sum(call: Call, data: UserBuffer) -> int:
    """The sum of `data` as 64-bit words, in place."""
    with data.mirror(k_r) as mirror:
        return read(mirror)


#: All of them, for `boot(syscalls=…)`.
HANDLERS: list[Callable[..., Any]] = [bench_reach, bench_nop, bench_take, bench_sum]
