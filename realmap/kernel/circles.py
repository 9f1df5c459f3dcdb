"""Circles of services: each thread of each of them waits for a call that waits for a thread of another one.

    a thread of seat A ── its call is at work at B, and waits ── for a call that waits for a thread of seat C,
                                                                 each of whose threads waits … for one of seat A

Every server tells what it waits for a few times a second, each at another moment. So a circle is believed once each of
its servers has told of it twice: what holds before and after a moment held then, for all of them. A call that would be
given up later, by a timeout, waits as any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

from realmap.kernel.ports import LONGEST, Seat, Session

#: Seats that are looked at for one circle at most, what is read of their calls (so the loop is not held), and the seats
#: that its error names.
MOST, CALLS, NAMED = 64, 8192, 8
#: A call: the number of its session, and its own there.
Key: TypeAlias = tuple[int, int]


class Wait(NamedTuple):
    """A call that waits for a thread of a seat, and since when its caller waits for it (monotonic, ns)."""

    since: int
    call: Key
    seat: Seat
    name: str


class Circle(NamedTuple):
    """Its waits, the last one last; and how often each of its seats, by number, had told of itself."""

    waits: list[Wait]
    told: dict[int, int]

    def is_sure(self, before: Circle) -> bool:
        """Whether all of its seats have told of it since it was found `before`, with the same waits."""
        return all(before.told.get(number, times) < times for number, times in self.told.items())

    @property
    def why(self) -> str:
        """In words: why the last call is refused."""
        names = {each.seat: f"{each.name[:LONGEST]!r} of {each.seat.label}" for each in self.waits}
        said = ", ".join(list(names.values())[:NAMED]) + (", …" if len(names) > NAMED else "")
        last = self.waits[-1].name[:LONGEST]
        why = f"{last!r} would wait for itself: each thread of these services waits for another of them: {said}"
        return f"{why}; serve with more threads, or do not call back"


class _Told:
    """What a server said last, by call."""

    def __init__(self, seat: Seat) -> None:
        #: Since when it is at work, or None: it waits for a thread; and its name.
        self.calls = {(session, id): (since, name) for session, id, name, since in seat.served.running}
        self.waits: dict[Key, list[tuple[Key, int]]] = {}
        #: Those at work that take a thread, and wait.
        self.threads: set[Key] = set()
        for session, id, takes_thread, of_session, of_id, since in seat.served.waits:
            self.waits.setdefault((session, id), []).append(((of_session, of_id), since))
            if takes_thread:
                self.threads.add((session, id))


class _Known(dict[Seat, _Told]):
    """Of every seat that was looked at."""

    def __init__(self) -> None:
        self._read = 0

    def __missing__(self, seat: Seat) -> _Told:
        if len(self) == MOST:
            raise _May
        self.count(len(seat.served.running) + len(seat.served.waits))
        told = self[seat] = _Told(seat)
        return told

    def count(self, calls: int) -> None:
        """_May: that is more than is read."""
        self._read += calls
        if self._read > CALLS:
            raise _May


class _May(Exception):
    """A thread may go on by itself, as far as is known."""


def find(first: Seat) -> Circle | None:
    """The circle that a seat is in, as it seems. None: one of its threads may go on, or it waits for others' circle."""
    known, to = _Known(), dict[Seat, set[Seat]]()
    waits: set[Wait] = set()
    todo = [first]
    try:
        while todo:
            seat = todo.pop()
            if seat not in to:
                found = set(_waits_of(seat, known))
                waits |= found
                to[seat] = {each.seat for each in found}
                todo += to[seat]
    except _May:
        return None
    back: set[Seat] = set()  # who waits for the first one
    while more := [seat for seat in to if seat not in back and (first in to[seat] or to[seat] & back)]:
        back.update(more)
    if len(back) < len(to):
        return None
    return Circle(sorted(waits), {seat.number: seat.told for seat in known})


class Looks:
    """For the circle that a seat is in, each time that it has told of itself."""

    def __init__(self) -> None:
        self._found: Circle | None = None

    def again(self, seat: Seat) -> Circle | None:
        """The circle, once it is sure; it is looked for anew then."""
        found, before = find(seat), self._found
        if found is None or before is None or found.waits != before.waits:
            self._found = found
        elif found.is_sure(before):
            self._found = None
            return found
        return None


def _waits_of(seat: Seat, known: _Known) -> Iterator[Wait]:
    """What the threads of a seat wait for, through calls at work elsewhere. _May: one of them may go on."""
    threads = known[seat].threads
    if len(threads) < seat.threads:
        raise _May
    todo, seen = [(seat, call) for call in threads], set(threads)
    while todo:
        at, call = todo.pop()
        waits = known[at].waits.get(call)
        if not waits:
            raise _May
        known.count(len(waits))
        for key, since in waits:
            session: Session | None = at.process.sessions.get(key[0])
            if session is None or key not in known[session.seat].calls:  # it is on its way, or has been answered
                raise _May
            began, name = known[session.seat].calls[key]
            if began is None:
                yield Wait(since, key, session.seat, name)
            elif key not in seen:
                seen.add(key)
                todo.append((session.seat, key))
