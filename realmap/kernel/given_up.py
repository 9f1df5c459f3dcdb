"""`GivenUp`: handlers at work that nobody waits for, or that lost the loop. Each has a thread, so they are bounded."""

from __future__ import annotations

from collections import Counter

from realmap.errors import LimitReached
from realmap.kernel.processes import UserProcess
from realmap.kernel.running import Running
from realmap.serving.registry import Syscall


class GivenUp:
    """How many there are, by whose they are. Only on the kernel's thread.

    By pid, so that connecting anew gives no new ones; and by uid where the connection has ended, so that a new process
    does not either. That refuses the handlers which did not come back, not the others: a bystander may be of this uid.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.of_pid: Counter[int] = Counter()
        self._of_uid: Counter[int] = Counter()

    def __len__(self) -> int:
        return self.of_pid.total()

    def check(self, process: UserProcess, syscall: Syscall) -> None:
        """LimitReached: the process may not call this now."""
        if self.of_pid[process.pid] >= self._limit:
            raise LimitReached("given_up", self._limit, why=f"process {process.pid} has {self._why}")
        if syscall.given_up and self._of_uid[process.uid] >= self._limit:
            why = f"processes of uid {process.uid} that have ended have {self._why}, {syscall.name!r} among them"
            raise LimitReached("given_up", self._limit, why=why)

    @property
    def _why(self) -> str:
        return f"{self._limit} handlers at work that nobody waits for, or that lost the loop, the limit (given_up)"

    def add(self, running: Running) -> None:
        """Its handler is one of them from now on. Again: nothing."""
        if not running.given_up:
            running.given_up = True
            running.syscall.given_up += 1
            self.of_pid[running.process.pid] += 1

    def add_orphan(self, running: Running) -> None:
        """The same, because its client is gone."""
        self.add(running)
        if not running.orphan:
            running.orphan = True
            self._of_uid[running.process.uid] += 1

    def discard(self, running: Running) -> None:
        if running.given_up:
            running.syscall.given_up -= 1
            _take(self.of_pid, running.process.pid)
        if running.orphan:
            _take(self._of_uid, running.process.uid)


def _take(counter: Counter[int], key: int) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
