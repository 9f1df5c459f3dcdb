"""Who is connected, and what each process holds."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

from realmap.errors import LimitReached
from realmap.kernel.budgets import Peer, Peers
from realmap.memory.frames import FrameAllocator
from realmap.memory.process_memory import ProcessMemory


class UserProcess:
    """A user process as the kernel sees it: what `Call.process` is in a handler.

    `number` is its name in the books (a process that connects twice has two), `pid` and `uid` what
    Linux says of it, `memory` its `ProcessMemory`.
    """

    def __init__(
        self, number: int, pid: int, uid: int, frames: FrameAllocator, peer: Peer, user: Peer, stock: int = 0
    ) -> None:
        self.number = number
        #: What it has, with all other connections of its pid; and what is left of its uid's processes that have ended.
        self.peer, self.user = peer, user
        self.pid = pid
        self.uid = uid
        self.memory = ProcessMemory(allocator=frames, owner=f"of process {number} (pid {pid})", stock=stock)
        self.alive = True
        #: What its forked children show; and whether it has any.
        self.secret = os.urandom(16).hex()
        self.forked = False
        #: Calls whose handlers have not ended yet.
        self.calls = 0
        #: The handles that it made, or that it attached by name (`handles.Shared`).
        self.handles: dict[Any, None] = {}
        #: What it serves, and calls: by number (`ports.Seat`, `ports.Session`).
        self.seats: dict[int, Any] = {}
        self.sessions: dict[int, Any] = {}
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

    def begin_call(self, size: int) -> None:
        """A blocking call of so many bytes is to come. LimitReached: there are too many, or too large ones."""
        self.peer.take("calls")
        try:
            self.peer.take("undecoded", size)
        except LimitReached:
            self.peer.give_back("calls")
            raise
        self.calls += 1

    def end_call(self, size: int) -> None:
        self.calls -= 1
        self.peer.give_back("calls")
        self.peer.give_back("undecoded", size)

    def __repr__(self) -> str:
        return f"<process {self.number}, pid {self.pid}, {len(self.memory)} mappings{'' if self.alive else ', ended'}>"


class ProcessTable:
    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._processes: dict[int, UserProcess] = {}

    def __len__(self) -> int:
        return len(self._processes)

    def __iter__(self) -> Iterator[UserProcess]:
        return iter(list(self._processes.values()))

    def add(self, pid: int, uid: int, frames: FrameAllocator, peers: Peers, stock: int) -> UserProcess:
        """Takes a process in. `stock`: bytes of parked windows that are kept for it."""
        process = UserProcess(next(self._numbers), pid, uid, frames, peers.process(pid), peers.user(uid), stock)
        self._processes[process.number] = process
        return process

    def remove(self, process: UserProcess) -> None:
        """Takes it out; what it holds is still to be given back (`Books.reap`)."""
        del self._processes[process.number]
        process.alive = False
