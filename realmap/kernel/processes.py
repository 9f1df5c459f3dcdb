"""Who is connected, and what each process holds."""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Iterator

from realmap.memory.frames import FrameAllocator
from realmap.memory.process_memory import ProcessMemory


class UserProcess:
    """A user process as the kernel sees it: what `Call.process` is in a handler.

    `number` is its name in the books (a process that connects twice has two), `pid` and `uid` what
    Linux says of it, `memory` its `ProcessMemory`.
    """

    def __init__(self, number: int, pid: int, uid: int, frames: FrameAllocator) -> None:
        self.number = number
        self.pid = pid
        self.uid = uid
        self.memory = ProcessMemory(allocator=frames, owner=f"of process {number} (pid {pid})")
        self.alive = True
        #: What its forked children show; and whether it has any.
        self.secret = secrets.token_hex(16)
        self.forked = False
        #: Calls whose handlers have not ended yet.
        self.calls = 0
        #: Mappings whose frames are still to be taken, one after the other.
        self.coming = 0

    @property
    def facts(self) -> dict[str, int]:
        """What a record of `logging` about it carries."""
        return {"user": self.number, "user_pid": self.pid}

    @property
    def is_here(self) -> bool:
        """Whether it is this very process: case 1, its buffers are mapped in this address space."""
        return self.pid == os.getpid()

    def __repr__(self) -> str:
        return f"<process {self.number}, pid {self.pid}, {len(self.memory)} mappings{'' if self.alive else ', ended'}>"


class ProcessTable:
    """The processes by number."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._processes: dict[int, UserProcess] = {}

    def __len__(self) -> int:
        return len(self._processes)

    def __iter__(self) -> Iterator[UserProcess]:
        return iter(list(self._processes.values()))

    def add(self, pid: int, uid: int, frames: FrameAllocator) -> UserProcess:
        """Takes a process in."""
        process = UserProcess(next(self._numbers), pid, uid, frames)
        self._processes[process.number] = process
        return process

    def remove(self, process: UserProcess) -> None:
        """Takes it out; what it holds is still to be given back (`Books.reap`)."""
        del self._processes[process.number]
        process.alive = False
