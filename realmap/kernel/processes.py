"""Who is connected, and what each process holds."""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING

from realmap.host import files
from realmap.host.liveness import Peer
from realmap.kernel.workers import Share, Workers
from realmap.memory.frames import FrameAllocator
from realmap.memory.process_memory import ProcessMemory

if TYPE_CHECKING:
    from realmap.kernel.connection import Connection


class UserProcess:
    """A user process as the kernel sees it: what `Call.process` is in a handler.

    `number` is its name in the books (a process that connects twice has two), `pid` and `uid` what
    Linux says of it, `memory` its `ProcessMemory`.
    """

    def __init__(
        self, number: int, peer: Peer, connection: Connection, frames: FrameAllocator, workers: Workers, running: int
    ) -> None:
        self.number = number
        self.pid, self.uid, self.pidfd = peer
        self.connection = connection
        self.memory = ProcessMemory(allocator=frames, owner=f"of process {number} (pid {self.pid})")
        self.alive = True
        #: What its forked children show; and whether it has any.
        self.secret = secrets.token_hex(16)
        self.forked = False
        #: Calls whose handlers have not ended yet.
        self.calls = 0
        #: What of it runs on worker threads: its calls, and the taking of large frames, one after the other.
        self.share = Share(workers, running)
        self.frames_share = Share(workers, 1)

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

    def add(
        self, peer: Peer, connection: Connection, frames: FrameAllocator, workers: Workers, running: int
    ) -> UserProcess:
        """Takes a process in; its pidfd is the table's from now on. `running`: its share of the workers."""
        process = UserProcess(next(self._numbers), peer, connection, frames, workers, running)
        self._processes[process.number] = process
        return process

    def reap(self, process: UserProcess) -> None:
        """Gives back everything that the process held. Mirrors in use, and pinned buffers, stay valid.

        Again: nothing.
        """
        if self._processes.pop(process.number, None) is None:
            return
        process.alive = False
        process.share.cancel()
        process.frames_share.cancel()
        if not process.forked:  # else its children may come for what it had
            process.memory.release_all()
        files.close(process.pidfd)
