"""Antagonists that work on processes: forks, CPUs, stops, signals, limits, a death for want of memory."""

from __future__ import annotations

import mmap
import os
import random
import resource
import signal
import time
from contextlib import suppress

from realmap.host import forks
from realmap.host.liveness import wait_death
from realmap.lab.stress.actor import WrongBytes
from realmap.lab.stress.antagonists.antagonist import Antagonist, Bytes, InCgroup, OnUsers, Target
from realmap.lab.stress.board import Held
from realmap.lab.workload import pattern
from realmap.pages import PAGE_SIZE

#: How long a user that was starved may take to need more memory. Seconds.
PATIENCE = 2.0


class Forks(Antagonist):
    """Forks many at once, which write to what they have copied, beside a mirror that the kernel keeps."""

    name = "forks"
    rest = 0.02

    def begin(self, rng: random.Random) -> None:
        self._bytes = Bytes(self.target, 32 * PAGE_SIZE + 33, rng)
        self._private = mmap.mmap(-1, 64 * PAGE_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._private[:] = self._expected = pattern(rng.getrandbits(32), len(self._private))

    def step(self, rng: random.Random) -> bool:
        self._bytes.keep(1)
        seeds = [rng.getrandbits(32) for _ in range(rng.randint(1, 8))]
        children = [self._fork(seed) for seed in seeds]
        self._private[:] = self._expected = pattern(rng.getrandbits(32), len(self._private))
        failed = [code for code in (os.waitpid(child, 0)[1] for child in children) if code]
        if failed:
            raise WrongBytes(f"wrong bytes in {len(failed)} of {len(children)} forked children")
        if self._private[:] != self._expected:
            raise WrongBytes("wrong bytes in private memory after forks")
        self._bytes.drop(1, "forks")
        offset, length = self._bytes.range(rng)
        self._bytes.fill(offset, length, rng)
        return True

    def _fork(self, seed: int) -> int:
        """A child that verifies what it inherited, and writes to its own copies."""
        child = forks.fork()
        if not child:
            right = False
            try:
                right = self._private[:] == self._expected
                self._private[:] = data = pattern(seed, len(self._private))
                right = right and self._private[:] == data
            finally:
                os._exit(not right)
        return child


class Affinity(Antagonist):
    """Moves threads of users (and of a kernel of the run's own) from CPU to CPU."""

    name = "affinity"

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self._before = os.sched_getaffinity(0)

    def available(self) -> str | None:
        """Whether there is more than one CPU."""
        return None if len(self._before) > 1 else "one CPU only: allow this process another (taskset, cpuset)"

    def step(self, rng: random.Random) -> bool:
        cpus = rng.sample(sorted(self._before), rng.randint(1, len(self._before)))
        if self.target.own and not rng.randrange(4):
            return _set_affinity(rng.choice(_threads(self.target.kernel)), cpus)
        with self.target.board.held(rng) as user:
            threads = _threads(user.pid) if user is not None else []
            return bool(threads) and _set_affinity(rng.choice(threads), cpus)

    def close(self) -> None:
        for pid in [*self.target.board.pids(), *([self.target.kernel] if self.target.own else [])]:
            for thread in _threads(pid):
                _set_affinity(thread, self._before)


def _threads(pid: int) -> list[int]:
    with suppress(FileNotFoundError, ProcessLookupError):
        return sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))
    return []


def _set_affinity(thread: int, cpus: list[int] | set[int]) -> bool:
    with suppress(ProcessLookupError):
        os.sched_setaffinity(thread, cpus)
        return True
    return False


class Stops(OnUsers):
    """Stops users in the midst of anything, for up to 20 ms."""

    name = "stops"

    def work_on(self, user: Held, rng: random.Random) -> bool:
        signal.pidfd_send_signal(user.pidfd, signal.SIGSTOP)
        try:
            time.sleep(rng.random() / 50)
        finally:
            signal.pidfd_send_signal(user.pidfd, signal.SIGCONT)
        return True

    def close(self) -> None:
        for pid in self.target.board.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


class Signals(OnUsers):
    """Sends users bursts of SIGUSR1, for which each has a handler."""

    name = "signals"

    def work_on(self, user: Held, rng: random.Random) -> bool:
        for _ in range(rng.randint(1, 64)):
            signal.pidfd_send_signal(user.pidfd, signal.SIGUSR1)
            time.sleep(rng.random() / 10_000)
        return True


class Limits(OnUsers):
    """Takes users' limit of descriptors down to about what they have, for up to 20 ms."""

    name = "limits"

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self._before = resource.getrlimit(resource.RLIMIT_NOFILE)  # every user has inherited it

    def work_on(self, user: Held, rng: random.Random) -> bool:
        with suppress(FileNotFoundError, PermissionError):  # one that ends is root's
            most = max(0, len(os.listdir(f"/proc/{user.pid}/fd")) + rng.randint(-2, 4))
            self._limit(user.pid, min(most, self._before[0]))
            try:
                time.sleep(rng.random() / 50)
            finally:
                self._limit(user.pid, self._before[0])
            return True
        return False

    def _limit(self, pid: int, soft: int) -> None:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, self._before[1]))

    def close(self) -> None:
        for pid in self.target.board.pids():
            with suppress(ProcessLookupError):
                self._limit(pid, self._before[0])


class Oom(OnUsers, InCgroup):
    """Has a user killed for want of memory, in a memory cgroup that is far too small."""

    name = "oom"
    rest = 0.5
    most = 64 << 10  # too few to live on

    def work_on(self, user: Held, rng: random.Random) -> bool:
        kills = self.group.kills
        self.target.board.doom(user)
        with suppress(ProcessLookupError):
            self.group.enter(user.pid)
            wait_death(user.pidfd, PATIENCE)
            signal.pidfd_send_signal(user.pidfd, signal.SIGKILL)  # also where Linux has killed a child of it instead
            wait_death(user.pidfd, None)
        return self.group.kills > kills
