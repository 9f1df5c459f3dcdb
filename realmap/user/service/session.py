"""`Session`: one caller of a service: its line, what it has granted, and which of its calls wait."""

from __future__ import annotations

import os
import socket
from collections import Counter, deque
from collections.abc import Sequence

import msgspec

from realmap.errors import LimitReached
from realmap.memory.frames import FrameAllocator
from realmap.memory.grants import Grants
from realmap.rights import rights_of, type_of
from realmap.serving.line import Line
from realmap.serving.registry import Syscall
from realmap.serving.syscalls import Call
from realmap.serving.user_buffer import UserBuffer
from realmap.wire import channel, messages
from realmap.wire.news import Granted, Opened
from realmap.wire.ring import RingEnd

#: Bytes that a caller has not read, or not sent to their end, at most; then its session ends.
LIMITS = {"unread": 32 << 20, "half_sent": 8 << 20}


class Work(msgspec.Struct, frozen=True, eq=False):  # a Struct because it is made in C: one for every call
    """A call that has arrived, and when (monotonic, ns). `pinned`: whether its buffers are."""

    session: Session
    call: Call
    syscall: Syscall
    request: messages.Call
    buffers: Sequence[UserBuffer]
    pinned: bool
    came: int


class Budget:
    """What one caller has of its server."""

    def __init__(self) -> None:
        self._used: Counter[str] = Counter()

    def take(self, what: str, amount: int = 1) -> None:
        """LimitReached: it would be more than it may."""
        if self._used[what] + amount > LIMITS[what]:
            raise LimitReached(what, LIMITS[what], why=f"a session may have {LIMITS[what]} bytes {what}")
        self._used[what] += amount

    def give_back(self, what: str, amount: int = 1) -> None:
        self._used[what] -= amount


class Caller:
    """The process that calls: `Call.process` in a service. `number` is its name in the kernel's books."""

    def __init__(self, opened: Opened, held: FrameAllocator) -> None:
        """`held`: what is lent takes its segments."""
        self.number, self.pid, self.uid = opened.number, opened.pid, opened.uid
        self.alive = True
        #: What it has lent, as far as this service knows: found as in its `ProcessMemory`.
        self.memory = Grants(f"of process {self.number} (pid {self.pid})", held)

    @property
    def is_here(self) -> bool:
        return self.pid == os.getpid()

    @property
    def facts(self) -> dict[str, int]:
        return {"user": self.number, "user_pid": self.pid}

    def __repr__(self) -> str:
        return f"<process {self.number}, pid {self.pid}, {len(self.memory)} lent{'' if self.alive else ', ended'}>"


class Session(Line):
    """Only on the thread that has the service's loop."""

    __slots__ = ("_coming", "caller", "number", "waiting")

    def __init__(self, opened: Opened, descriptors: list[int], held: FrameAllocator) -> None:
        """`held`: as of `Caller`. Takes the descriptor of the socket out.

        OSError: no memory, or it has not come (none was left).
        """
        if not descriptors:
            raise OSError("no descriptors are left")
        ring = RingEnd.serve(descriptors[1]) if len(descriptors) > 1 else None
        super().__init__(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, descriptors.pop(0)), Budget())
        if ring is not None:  # without one everything takes the socket
            self.ring, ring.owner = ring, None
        self.number = opened.session
        self.caller = Caller(opened, held)
        #: Its calls that wait for a thread.
        self.waiting: deque[Work] = deque()
        self._coming: dict[int, tuple[list[tuple[int, int]], list[int]]] = {}

    def enter(self, granted: Granted, descriptors: list[int]) -> None:
        """What its caller lends, or the next part of that.

        LimitReached: it takes more descriptors than one caller may have. KernelError: Linux has no room for it.
        """
        pieces, fds = self._coming.setdefault(granted.serial, ([], []))
        pieces += granted.pieces
        fds += descriptors
        descriptors.clear()
        held = self.caller.memory.allocator
        if held.segments + len(fds) > held._segment_limit:
            why = f"{held.segments} descriptors are in use of what process {self.caller.pid} has lent, unmapped or not"
            limit = held._segment_limit
            raise LimitReached("descriptors", limit, why=f"{why}; its limit is {limit}: wait for its calls to end")
        if len(pieces) == granted.count:
            del self._coming[granted.serial]
            kind, rights = type_of(granted.kind), rights_of(granted.rights)
            self.caller.memory.enter(granted.address, granted.length, kind, rights, pieces, fds, granted.serial)

    def leave(self, serial: int) -> None:
        """Its caller has unmapped that, maybe before all of it had come."""
        _, descriptors = self._coming.pop(serial, ([], []))
        channel.close_all(descriptors)
        self.caller.memory.leave(serial)

    def shut(self) -> None:
        """The caller sees the end of it, even where somebody else has an end of its socket as well."""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.close()

    def close(self) -> None:
        """Nothing more is heard of its caller."""
        super().close()
        self.caller.alive = False
        self.caller.memory.clear()
        for _, descriptors in self._coming.values():
            channel.close_all(descriptors)
        self._coming.clear()
