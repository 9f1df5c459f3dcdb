"""Ports: which processes serve which names, who has a session with whom, and what is granted. Plain books.

    seat      one `serve` of a process: its names, and how many calls it takes
    session   a caller and a seat; what they say to each other the kernel never sees
    grant     the server of a session may map the frames of one mapping of the caller: a reference to them, until the
              caller unmaps that, or the session ends

Several seats of a name are a pool. Rights only ever narrow: a server gets no more than the caller has.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Container, Iterator
from dataclasses import dataclass, field
from typing import Any

from realmap._core import Durations
from realmap.errors import (
    InvalidAddress,
    InvalidMemState,
    InvalidSize,
    KernelError,
    LimitReached,
    ServerDied,
    UnknownSyscall,
)
from realmap.kernel.processes import UserProcess
from realmap.memory.frames import SharedFrames
from realmap.memory.mapping import Mapping
from realmap.wire import messages
from realmap.wire.news import Served

#: Names of one seat at most, and characters of a name.
NAMES, LONGEST = 1024, 200
#: Calls of a seat at a time, and that wait: a larger number is none that anybody means.
MOST = 1 << 31
#: What is counted of all servers of a name ends here, whatever they say.
COUNTED = (1 << 63) - 1
#: Of so many names it is known what servers did that have ended: those of which one has ended last.
REMEMBERED = 256


@dataclass(eq=False, slots=True)
class Grant:
    """The server of a session may map the frames of this mapping."""

    session: Session
    mapping: Mapping
    frames: SharedFrames
    #: Its pieces, each a descriptor of the server's.
    count: int
    ended: bool = False
    #: How many pieces of it its server was told of; where in the frames the next one is, and bytes from there on.
    told: int = 0
    offset: int = field(init=False)
    left: int = field(init=False)
    #: What takes the answer to who asked, once that were all.
    waiting: list[Callable[[Any], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.offset, self.left = self.mapping.phys_offset, self.mapping.length
        self.session.seat.process.peer.lent[self.session.process.pid] += self.count
        self.frames.hold(self, "lent", self.mapping.address, self.mapping.owner, f"to {self.session.seat.label}")

    def end(self) -> None:
        """It holds on no longer. Again: nothing."""
        if not self.ended:
            self.ended = True
            pid, lent = self.session.process.pid, self.session.seat.process.peer.lent
            lent[pid] -= self.count
            if not lent[pid]:
                del lent[pid]
            self.session.process.peer.give_back("grants")
            self.frames.let_go(self)


@dataclass(slots=True)
class Total:
    """What was called by one name, so far, of so many servers, as they say; those that have ended are counted on."""

    servers: int = 0
    calls: int = 0
    failed: int = 0
    durations: Durations = field(default_factory=Durations)

    def add(self, calls: int, failed: int, counts: list[int]) -> None:
        self.calls = min(self.calls + calls, COUNTED)
        self.failed = min(self.failed + failed, COUNTED)
        with contextlib.suppress(ValueError):  # more than can be counted
            self.durations.add(counts)


@dataclass(eq=False, slots=True)
class Session:
    """A caller (`process`), and the seat that it calls."""

    number: int
    process: UserProcess
    seat: Seat
    #: By the serials of the mappings.
    grants: dict[int, Grant] = field(default_factory=dict)
    ended: bool = False
    #: Whether the server was told of it.
    told: bool = False


@dataclass(eq=False, slots=True)
class Seat:
    """A process that serves these names."""

    number: int
    process: UserProcess
    names: list[str]
    threads: int
    queue: int
    #: So many it holds at most of what one process lends to it.
    descriptors: int = 256
    sessions: dict[int, Session] = field(default_factory=dict)
    #: Whether it takes no new ones.
    closing: bool = False
    #: Which of all sessions was its last.
    picked: int = 0
    #: What it says of itself.
    served: Served = field(default_factory=lambda: Served({}, [], []))
    #: And how often it has said so.
    told: int = 0

    @property
    def label(self) -> str:
        return f"process {self.process.number} (pid {self.process.pid})"

    def running(self) -> list[tuple[Session, str, float | None]]:
        """Calls that it said to be at work (since when, in seconds of the monotonic clock), or waiting (None)."""
        told, there = self.served.running, self.sessions
        return [(there[number], name, began) for number, _, name, began in told if number in there]


class Ports:
    """Everybody who serves, by name, and all sessions."""

    def __init__(self) -> None:
        self._seats: dict[int, Seat] = {}
        self._by_name: dict[str, list[Seat]] = {}
        #: What those did that have ended, at most `REMEMBERED` names; the last one is of who has ended last.
        self._past: dict[str, Total] = {}
        self._seat_numbers, self._session_numbers = itertools.count(1), itertools.count(1)
        #: Told of each grant that ends before its session does.
        self.revoked: Callable[[Grant], None] = Grant.end
        #: Told whether somebody traces from now on: servers say then when each call began and ended.
        self.traced: Callable[[bool], None] = lambda on: None

    def __iter__(self) -> Iterator[Seat]:
        return iter(list(self._seats.values()))

    def is_served(self, name: str) -> bool:
        return name in self._by_name

    def rivals(self, seat: Seat) -> list[Seat]:
        """All others that serve one of its names."""
        found = {each: None for name in seat.names for each in self._by_name.get(name, ())}
        found.pop(seat, None)
        return list(found)

    # ---- seats ------------------------------------------------------------------------------

    def serve(self, process: UserProcess, request: messages.Serve, syscalls: Container[str]) -> Seat:
        """A seat for a process. `syscalls`: names that the kernel itself has.

        KernelError: a name is one of them, or none. InvalidSize: a number. LimitReached: it has too many seats.
        """
        names = request.names
        if not 0 < len(names) <= NAMES:
            raise InvalidSize(len(names), why=f"a service has 1 to {NAMES} names")
        if not 0 < request.threads <= MOST or not 0 <= request.queue <= MOST:
            wrong = request.queue if 0 < request.threads <= MOST else request.threads
            raise InvalidSize(wrong, why=f"a service has at least one thread, and a queue of 0 or more; at most {MOST}")
        for name in names:
            if not 0 < len(name) <= LONGEST:
                raise KernelError(why=f"the name of a service has 1 to {LONGEST} characters: {name[:LONGEST]!r}")
            if name in syscalls:
                raise KernelError(why=f"the kernel has a syscall {name!r} already: serve it by another name")
        if len(set(names)) < len(names):
            raise KernelError(why=f"a name is served twice: {max(names, key=names.count)!r}")
        process.peer.take("seats")
        seat = Seat(next(self._seat_numbers), process, names, request.threads, request.queue, request.descriptors)
        self._seats[seat.number] = process.seats[seat.number] = seat
        for name in names:
            self._by_name.setdefault(name, []).append(seat)
        return seat

    def withdraw(self, seat: Seat) -> None:
        """It takes no new sessions from now on. Again: nothing."""
        if not seat.closing:
            seat.closing = True
            for name in seat.names:
                self._by_name[name].remove(seat)
                if not self._by_name[name]:
                    del self._by_name[name]
                if name in seat.served.names and seat.served.names[name][0]:
                    past = self._past.pop(name, Total())
                    past.add(*seat.served.names[name])
                    self._past[name] = past
            for name in list(self._past)[:-REMEMBERED]:
                del self._past[name]

    def end(self, seat: Seat) -> None:
        """It is no more; its sessions have ended. Again: nothing."""
        self.withdraw(seat)
        if self._seats.pop(seat.number, None) is not None:
            del seat.process.seats[seat.number]
            seat.process.peer.give_back("seats")

    def totals(self) -> dict[str, Total]:
        """What was called so far, by name, also of those that nobody serves any more."""
        found: dict[str, Total] = {}
        for name in dict.fromkeys((*self._by_name, *self._past)):
            seats = self._by_name.get(name, [])
            total = found[name] = Total(len(seats))
            if (past := self._past.get(name)) is not None:
                total.add(past.calls, past.failed, past.durations.counts())
            for seat in seats:
                if name in seat.served.names:
                    total.add(*seat.served.names[name])
        return found

    # ---- sessions ---------------------------------------------------------------------------

    def choose(self, name: str, but: Collection[int], load: Callable[[Seat], float]) -> Seat:
        """Who gets the next session: who has the least to do (`load`), then the fewest sessions, then in turn.

        UnknownSyscall: nobody serves it, but these.
        """
        found = [seat for seat in self._by_name.get(name, ()) if seat.number not in but]
        if not found:
            others = "no other process" if self.is_served(name) else "neither the kernel nor any process"
            raise UnknownSyscall(name[:LONGEST], why=f"{others} serves {name[:LONGEST]!r}")
        return min(found, key=lambda seat: (load(seat), len(seat.sessions), seat.picked))

    def open(self, process: UserProcess, seat: Seat) -> Session:
        """A session. LimitReached: the caller has as many as it may."""
        process.peer.take("sessions")
        number = seat.picked = next(self._session_numbers)
        session = seat.sessions[number] = process.sessions[number] = Session(number, process, seat)
        return session

    def find(self, process: UserProcess, number: int) -> Session:
        """A session of this caller. ServerDied: it has none such, or it has ended."""
        session: Session | None = process.sessions.get(number)
        if session is None:
            raise ServerDied("", 0, False, why=f"process {process.pid} has no session {number}, or it has ended")
        return session

    def close(self, session: Session) -> None:
        """It ends, and all that was granted in it. Again: nothing."""
        if not session.ended:
            session.ended = True
            del session.seat.sessions[session.number], session.process.sessions[session.number]
            session.process.peer.give_back("sessions")
            for grant in session.grants.values():
                grant.end()

    # ---- grants -----------------------------------------------------------------------------

    def lend(self, session: Session, address: int) -> Grant:
        """Grants the mapping there, or has done so already.

        InvalidAddress: nothing is mapped there. InvalidMemState: private memory. LimitReached: the caller has granted
        as many as it may, or all its server holds of them would take more descriptors than that lets one caller have.
        """
        process = session.process
        mapping = process.memory.mapping_at(address)
        if mapping is None:
            raise InvalidAddress(address, why="nothing is mapped there")
        frames = mapping.frames
        if not isinstance(frames, SharedFrames):
            raise InvalidMemState(address, mapping.type, why="private memory cannot be lent")
        grant = session.grants.get(mapping.serial)
        if grant is None:
            first, last = mapping.phys_offset, mapping.phys_offset + mapping.length - 1
            count = frames.index_of(last) + 1 - frames.index_of(first)
            _require_few(session.seat, process, count)
            process.peer.take("grants")
            frames.recycles = False  # the server may keep them
            grant = session.grants[mapping.serial] = Grant(session, mapping, frames, count)
        return grant

    def unmapped(self, process: UserProcess, serial: int) -> None:
        """The caller has unmapped, or moved, a mapping: what was granted of it ends."""
        for session in list(process.sessions.values()) if process.sessions else ():
            grant = session.grants.pop(serial, None)
            if grant is not None:
                self.revoked(grant)


def _require_few(seat: Seat, process: UserProcess, count: int) -> None:
    """LimitReached: its server would have more descriptors of what this process lends than it lets one caller have."""
    lent, limit = seat.process.peer.lent[process.pid], seat.descriptors
    if lent + count > limit:
        has = f"process {seat.process.pid} has {lent} descriptors of what process {process.pid} lends, {limit} at most"
        remedy = "unmap some, lend larger segments, or let that process open more (ulimit -n)"
        raise LimitReached("descriptors", limit, why=f"{has}, and this takes {count}: {remedy}")
