"""Part C: users that connect, map and are killed at once, over and over; the kernel must not grow."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import served
from served import Served

import realmap

#: The kernel is looked at after so many cycles; one such lot goes by before anything is compared.
LOT = 250
#: What its resident memory may grow by after that, in all: an allocator's noise. Bytes.
GROWTH = 4 << 20


@dataclass
class Result:
    """What the cycles came to. `resident`: the kernel's memory after each lot, in bytes."""

    cycles: int = 0
    seconds: float = 0.0
    resident: list[int] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def _die(path: str, turn: int) -> None:
    """In the child: connects, maps one way or the other, and is killed."""
    try:
        me = realmap.connect(path)
        buffer = me.map((1 + turn % 5) * realmap.PAGE_SIZE, fragment=realmap.PAGE_SIZE if turn % 2 else None)
        buffer[0] = 1
        if turn % 3 == 0:
            me.call("digest", buffer)
        os.kill(os.getpid(), signal.SIGKILL)
    finally:
        os._exit(1)


def run(folder: Path, count: int, say: Callable[[str], None]) -> Result:
    """`count` cycles on one kernel."""
    kernel = Served(folder, spin=100.0)
    result = Result()
    before = (kernel.books(), served.descriptors(kernel.pid))
    lot = min(LOT, max(1, count // 4))
    linux = psutil.Process(kernel.pid)
    threads = linux.num_threads()
    begun = time.monotonic()
    try:
        for turn in range(count):
            child = os.fork()
            if not child:
                served.divert(folder / "cycles")
                _die(kernel.path, turn)
            _, status = os.waitpid(child, 0)
            result.cycles += 1
            if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
                result.failures.append(f"cycle {turn}: the user ended by itself ({status})")
            if (turn + 1) % lot == 0 or turn + 1 == count:
                result.failures += _look(kernel, before, f"after {turn + 1} cycles")
                result.resident.append(int(linux.memory_info().rss))
        if (now := linux.num_threads()) > threads:
            result.failures.append(f"the kernel has {now} threads, {threads} before")
        grown = result.resident[-1] - result.resident[0]
        if len(result.resident) > 1 and grown > GROWTH:
            result.failures.append(f"the kernel grew by {grown} bytes: {result.resident}")
    finally:
        result.seconds = time.monotonic() - begun
        kernel.end()
    for failure in result.failures:
        say(f"FAILED {failure}")
    return result


def _look(kernel: Served, before: tuple[dict[str, int], list[str]], when: str) -> list[str]:
    books, opened = before
    served.wait_until(lambda: kernel.books() == books and not served.opened_since(opened, kernel.pid))
    wrong = []
    if (now := kernel.books()) != books:
        wrong.append(f"{when}: {books} became {now}")
    if more := served.opened_since(opened, kernel.pid):
        wrong.append(f"{when}: {more} beside {opened}")
    if not (report := kernel.audit()):
        wrong.append(f"{when}: audit: {report}")
    return wrong + [f"{when}: a name is left: {name}" for name in served.names(kernel.pid)]
