"""Part B: SIGKILL at named points of the protocol, and what is left of it.

A point is a system call of one process on one path: the process dies as it makes the call, which is
not done any more. So "before X" is X itself, and "after X" the call that comes next.
"""

from __future__ import annotations

import os
import re
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

import served
import strace
from paths import PATHS
from puppet import Cleanup, Order, Puppet
from served import Served

import realmap


class Point(NamedTuple):
    """`who` dies as it makes the call `call` for the `nth` time on `path`; `sign` is how strace must have seen it.

    The owner is the user whose path it is; its reader is the kernel. `reaping`: the call comes while the kernel
    reaps the owner, which is killed for it.
    """

    name: str
    who: str
    path: str
    call: str
    nth: int = 1
    sign: str = ""
    spin: float = 0.0
    reaping: bool = False


_OURS = r"/dev/shm/realmap\."
POINTS = [
    Point("user before connect", "owner", "connect", "connect"),
    Point("user after connect, before hello", "owner", "connect", "sendmsg", sign="hello"),
    Point("user after hello, before the welcome", "owner", "connect", "recvmsg"),
    Point("user with the ring's descriptor, before its mmap", "owner", "connect", "mmap", sign="MAP_SHARED", spin=100),
    Point("user after its request to map", "owner", "map", "recvmsg"),
    Point("user with the descriptor, before mmap", "owner", "map", "mmap", sign="MAP_FIXED_NOREPLACE"),
    Point("user after mmap, before close of the descriptor", "owner", "map", "close"),
    Point("user between two mmaps of one mapping", "owner", "map-fragments", "mmap", 3, sign="MAP_FIXED_NOREPLACE"),
    Point("user before the second batch of descriptors", "owner", "map-many", "sendmsg", 2),
    Point("user while its call runs", "owner", "call-blocking", "recvmsg"),
    Point("user in the middle of a message in parts", "owner", "call-long", "sendmsg", 3, sign=r'"\\2'),
    Point("user after munmap, before it tells the kernel", "owner", "unmap", "sendmsg"),
    Point("user after it told of the munmap", "owner", "unmap", "recvmsg"),
    Point("user in close, with buffers unmapped", "owner", "close", "close"),
    Point("kernel before it accepts", "kernel", "connect", "accept4"),
    Point("kernel after accept, before it knows who", "kernel", "connect", "getsockopt"),
    Point("kernel before the welcome", "kernel", "connect", "sendto", sign="welcome"),
    Point("kernel between making a ring and sealing it", "kernel", "connect", "ftruncate", spin=100),
    Point("kernel before shm_open of a segment", "kernel", "map", "openat", sign=_OURS),
    Point("kernel between shm_open and shm_unlink", "kernel", "map", "unlink", sign=_OURS),
    Point("kernel between shm_unlink and fallocate", "kernel", "map", "fallocate"),
    Point("kernel after fallocate, before the answer", "kernel", "map", "sendmsg", sign="SCM_RIGHTS"),
    Point("kernel between two segments of one mapping", "kernel", "map-fragments", "unlink", 3, sign=_OURS),
    Point("kernel before the link of a name", "kernel", "map-named", "link"),
    Point("kernel between the link of a name and fallocate", "kernel", "map-named", "fallocate"),
    Point("kernel before the mmap of a mirror", "kernel", "call-mirror", "mmap", sign="MAP_FIXED_NOREPLACE"),
    Point("kernel in a call, with its mirror mapped", "kernel", "call-mirror", "munmap", sign="0x3"),
    Point("kernel while it sends the answer", "kernel", "call-mirror", "sendto"),
    Point("kernel while it sends an answer in parts", "kernel", "call-long", "sendto", 3, sign=r'"\\2'),
    Point("kernel while a worker mirrors", "kernel", "call-blocking", "clock_nanosleep"),
    Point("kernel after an unmap, before the segment's close", "kernel", "unmap", "close"),
    Point("kernel as it begins to reap", "kernel", "map-fragments", "epoll_ctl", sign="EPOLL_CTL_DEL", reaping=True),
    Point("kernel in the middle of reaping", "kernel", "map-fragments", "close", 3, reaping=True),
]
BY_NAME = {point.name: point for point in POINTS}


@dataclass
class Tally:
    """What became of a point."""

    point: str
    rounds: int = 0
    #: Rounds in which the process died exactly there; where it did not, the path had gone another way.
    hits: int = 0
    #: Empty names that a killed kernel left and the next one swept.
    swept: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


class Named(Protocol):
    """A point at which somebody is killed."""

    @property
    def name(self) -> str: ...


P = TypeVar("P", bound=Named)


class Rounds(ABC, Generic[P]):
    """Kills, round after round. A kernel that is not the victim lives on."""

    _say: Callable[[str], None]

    @abstractmethod
    def _round(self, point: P, tally: Tally) -> list[str]:
        """One of them: what went wrong."""

    @abstractmethod
    def end(self) -> None:
        """Ends what lives on. Again: nothing."""

    def point(self, point: P, rounds: int) -> Tally:
        """All rounds of one point."""
        tally = Tally(point.name)
        begun = time.monotonic()
        for turn in range(rounds):
            try:
                wrong = self._round(point, tally)
            except (RuntimeError, realmap.KernelError, OSError) as error:
                wrong = [f"the harness: {type(error).__name__}: {error}"]
            tally.rounds += 1
            if wrong:
                tally.failures.append(f"round {turn}: " + "; ".join(wrong))
                self._say(f"FAILED {point.name}: {tally.failures[-1]}")
                self.end()
        tally.seconds = time.monotonic() - begun
        return tally


class Killer(Rounds[Point]):
    """By strace, at a system call."""

    def __init__(self, folder: Path, seed: int, say: Callable[[str], None]) -> None:
        self._folder = folder
        self._log = folder / "strace"
        self._seed = seed
        self._say = say
        self._kernel: Served | None = None
        self._spin = 0.0
        self._other: realmap.Process | None = None
        self._canary: realmap.Buffer | None = None
        self._content = b""

    def _serve(self, spin: float) -> Served:
        """A kernel with a bystander: another user, whose bytes nobody may touch."""
        if self._kernel is None or self._spin != spin:
            self.end()
            self._kernel, self._spin = Served(self._folder, spin=spin), spin
            self._other = realmap.connect(self._kernel.path)
            self._canary = self._other.map(3 * realmap.PAGE_SIZE, fragment=realmap.PAGE_SIZE)
            self._content = os.urandom(len(self._canary))
            self._canary[:] = self._content
        return self._kernel

    def _round(self, point: Point, tally: Tally) -> list[str]:
        kernel = self._serve(point.spin)
        books, opened = kernel.books(), served.descriptors(kernel.pid)
        owner = Puppet(self._folder)
        try:
            owner.prepare(Order(point.path, kernel.path, point.spin, self._seed))
            victim = kernel.pid if point.who == "kernel" else owner.pid
            if point.reaping:
                owner.go()
                owner.acted()
            inject = f"{point.call}:signal=KILL:when={point.nth}"
            with strace.Trace(victim, self._log, calls=point.call, inject=inject) as trace:
                if point.reaping:
                    os.kill(owner.pid, signal.SIGKILL)
                else:
                    owner.go()
                dead = kernel if point.who == "kernel" else owner
                died = served.wait_until(lambda: dead.ended is not None or (not point.reaping and owner.acted(0)))
                died = died and served.wait_until(lambda: dead.ended is not None, 5.0)
            seen = trace.calls()
            if died and seen and re.search(point.sign, seen[-1].name + seen[-1].text):
                tally.hits += 1
            wrong = [] if died or point.who == "kernel" else [f"the owner is not dead: {seen[-2:]}"]
            if point.who == "kernel":
                return wrong + self._kernel_is_dead(kernel, owner, point, tally, died)
            return wrong + self._kernel_lives(kernel, books, opened)
        finally:
            owner.end()

    def _kernel_lives(self, kernel: Served, books: dict[str, int], opened: list[str]) -> list[str]:
        """After the death of an owner: everything of it is gone, the bystander has what it had."""
        if kernel.ended is not None:
            return [f"the kernel died too (exit status {kernel.ended})"]
        wrong = []
        served.wait_until(lambda: kernel.books() == books and not served.opened_since(opened, kernel.pid))
        if (now := kernel.books()) != books:
            wrong.append(f"books: {books} became {now}")
        if more := served.opened_since(opened, kernel.pid):
            wrong.append(f"kernel's descriptors: {more} beside {opened}")
        if not (report := kernel.audit()):
            wrong.append(f"audit: {report}")
        wrong += [f"a name is left: {name}" for name in served.names(kernel.pid)]
        assert self._other is not None and self._canary is not None
        if self._canary[:] != self._content or self._other.call("echo", 1) != 1:
            wrong.append("the bystander's bytes have changed")
        return wrong

    def _kernel_is_dead(self, kernel: Served, owner: Puppet, point: Point, tally: Tally, died: bool) -> list[str]:
        """After the death of the kernel: its users are told and keep their bytes; the next one sweeps."""
        wrong = [] if died else ["the kernel is not dead"]
        if not point.reaping:
            if not owner.acted():
                return [*wrong, "the owner hangs"]
            report = owner.undo(Cleanup([], []))
            if report is None:
                return [*wrong, "the owner hangs, or has died"]
            outcome = report.outcome
            if not (outcome.right or (outcome.ours and outcome.error in ("KernelDied", "ProcessKilled"))):
                wrong.append(f"the owner was told {outcome}")
            # That no normal path follows is in order: there is no kernel.
            wrong += [line for line in report.left if "a normal path afterwards failed: KernelDied" not in line]
        assert self._canary is not None
        if self._canary[:] != self._content:
            wrong.append("the bystander's bytes have changed")
        left = served.names(kernel.pid)
        full = [name for name in left if os.stat(f"/dev/shm/{name}").st_size]
        wrong += [f"a name that is not empty: {name}" for name in full if os.stat(f"/dev/shm/{name}").st_nlink < 2]
        self.end()
        successor = Served(self._folder, spin=0.0)  # it sweeps as it starts
        swept = not served.names(kernel.pid)
        tally.swept += len(left) if swept else 0
        successor.end()
        if not swept:
            wrong.append(f"the next kernel does not sweep {left}")
        if os.path.exists(f"/dev/shm/hostile.{owner.pid}"):
            wrong.append("a named segment is left")
        wrong += [f"{path} is left" for path in (kernel.path, kernel.path + ".lock") if os.path.exists(path)]
        return wrong

    def end(self) -> None:
        """Ends the kernel and the bystander. Again: nothing."""
        if self._canary is not None:
            self._canary.unmap()
        if self._other is not None:
            self._other.close()
        if self._kernel is not None:
            self._kernel.end()
        self._kernel = self._other = self._canary = None


assert all(point.path in PATHS for point in POINTS)
