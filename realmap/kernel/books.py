"""`Books`: what the kernel knows. No sockets, no threads, no clock: whoever has the loop changes and reads them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import SupportsIndex, TypeVar

from realmap.errors import LimitReached, PhysicalMemoryExhaustion
from realmap.kernel.budgets import Peers
from realmap.kernel.handles import Handles
from realmap.kernel.inheritance import Inheritance
from realmap.kernel.limits import Limits, first_reserved, segments_of
from realmap.kernel.observer import Observer
from realmap.kernel.ports import Ports
from realmap.kernel.processes import ProcessTable, UserProcess
from realmap.memory.frames import FrameAllocator, SharedFrames
from realmap.memory.kernel_memory import KernelMemory
from realmap.pages import usize
from realmap.serving.registry import Syscall

T = TypeVar("T")


class Books:
    """Who is there, what each has, and what it may have."""

    def __init__(
        self,
        syscalls: dict[str, Syscall],
        limits: Limits,
        memory: KernelMemory,
        memory_limit: SupportsIndex | None = None,
        process_limit: SupportsIndex | None = None,
    ) -> None:
        """`memory_limit`, `process_limit`: bytes of frames, in all and for each process. InvalidSize: below 0."""
        self.syscalls = syscalls
        self.limits = limits
        #: KernelLand, and every mirror in it.
        self.memory = memory
        self.frames = FrameAllocator(_limit(memory_limit, "memory_limit"), reserved=first_reserved(limits))
        #: Bytes of frames for each process; None: as many as there are.
        self.process_limit = _limit(process_limit, "process_limit")
        self.peers = Peers(limits)
        self.processes = ProcessTable()
        self.handles = Handles()
        self.ports = Ports()
        self.handles.look_for = self._look_for
        self.inheritance = Inheritance()
        #: Told of what happens; None while nobody looks.
        self.observer: Observer | None = None

    def admit(self, pid: int, uid: int) -> UserProcess:
        """Takes a process in. LimitReached: there are as many as there may be."""
        limit = self.limits.processes
        if len(self.processes) >= limit:
            raise LimitReached("processes", limit, why=f"the kernel serves {limit} processes already, its limit")
        frames = FrameAllocator(self.process_limit, parent=self.frames, segments=segments_of(self.limits))
        process = self.processes.add(pid, uid, frames, self.peers, self.limits.stock)
        process.memory.named = partial(self.handles.enter, process)
        return process

    def _look_for(self, name: str) -> None:
        for process in self.processes:
            process.memory.look_for(name)

    def give_way(self, process: UserProcess | None = None) -> bool:
        """Gives up the stock of a process; where it has none, everybody's. Whether there was any."""
        if process is not None and process.memory.stock.give_up():
            return True
        return sum(each.memory.stock.give_up() for each in self.processes) > 0

    def patiently(self, process: UserProcess, job: Callable[[], T]) -> T:
        """What `job` returns. Where it finds too little of something, stocks are given up before that is an error."""
        while True:
            try:
                return job()
            except PhysicalMemoryExhaustion:
                if not self.give_way(process):
                    raise

    def reap(self, process: UserProcess, now: float) -> bool:
        """Gives back what the process held. Mirrors in use, and pinned buffers, stay valid.

        Whether its memory stays for now: it had forked, and its children may come for that. `now`: as `Handles`.
        """
        self.handles.reap(process, now)
        self.processes.remove(process)
        process.memory.stock.clear()
        process.memory.named = None
        if process.forked and any(isinstance(mapping.frames, SharedFrames) for mapping in process.memory):
            with contextlib.suppress(LimitReached):  # its uid has too many of these: its children come too late
                process.user.take("inheritances")
                self.inheritance.add(process)
                return True
        process.memory.release_all()
        return False


def _limit(given: SupportsIndex | None, name: str) -> int | None:
    return None if given is None else usize(given, name)
