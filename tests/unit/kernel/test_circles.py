"""Circles of services: found in what servers tell of random graphs of calls, beside a model that runs them; broken."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import tried_with
from raw_client import RawServer, RawSession
from stage import Stage, run

from realmap import Kernel
from realmap.kernel import circles
from realmap.kernel.ports import Seat, Session
from realmap.wire import channel
from realmap.wire.news import Granted, Refused, Served

__all__ = ["run"]


@dataclass(eq=False)
class Made:
    """A call: at work (on a thread, or as a task), or waiting for a thread."""

    number: int
    seat: Seat
    parent: Made | None
    runs: bool
    task: bool = False
    waits: list[Made] = field(default_factory=list)
    session: Any = None


class World:
    """Services, and their calls. It goes on (`settle`) as far as it can: a call that waits for nothing ends."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.calls: list[Made] = []
        processes = [
            SimpleNamespace(number=at, pid=100 + at, sessions={}) for at in range(1, self.dice.randint(1, 4) + 1)
        ]
        self.seats = [
            Seat(at, self.dice.choice(processes), [f"name{at}"], self.dice.choice([1, 1, 1, 2, 3]), 64)  # type: ignore[arg-type]
            for at in range(1, self.dice.randint(1, 6) + 1)
        ]
        self._outside = SimpleNamespace(number=0, pid=99, sessions={})
        for _ in range(self.dice.randint(1, 12)):
            self._call(None)
        for _ in range(self.dice.randint(0, 40)):
            at_work = [call for call in self.calls if call.runs and len(call.waits) < self.dice.choice([1, 1, 1, 2])]
            if at_work:
                self._call(self.dice.choice(at_work))
        self.tell()

    def _call(self, parent: Made | None) -> None:
        seat, task = self.dice.choice(self.seats), self.dice.random() < 0.2
        call = Made(len(self.calls) + 1, seat, parent, task or self.has_room(seat), task)
        process: Any = self._outside if parent is None else parent.seat.process
        call.session = next((each for each in process.sessions.values() if each.seat is seat), None)
        if call.session is None:
            call.session = Session(1000 * seat.number + process.number, process, seat)
            process.sessions[call.session.number] = seat.sessions[call.session.number] = call.session
        self.calls.append(call)
        if parent is not None:
            parent.waits.append(call)

    def has_room(self, seat: Seat) -> bool:
        return sum(call.seat is seat and call.runs and not call.task for call in self.calls) < seat.threads

    def end(self, call: Made) -> None:
        """It is answered, or refused."""
        self.calls.remove(call)
        if call.parent is not None:
            call.parent.waits.remove(call)
        for other in self.calls:
            if other.seat is call.seat and not other.runs and self.has_room(call.seat):
                other.runs = True

    def settle(self) -> None:
        while ended := next((call for call in self.calls if call.runs and not call.waits), None):
            self.end(ended)
        self.tell()

    def tell(self) -> None:
        """As every server would."""
        for seat in self.seats:
            here = [call for call in self.calls if call.seat is seat]
            running = [(call.session.number, call.number, seat.names[0], 1.0 if call.runs else None) for call in here]
            waits = [
                (call.session.number, call.number, not call.task, wait.session.number, wait.number, wait.number)
                for call in here
                for wait in call.waits
            ]
            seat.served = Served({}, running, [], [], waits)
            seat.told += 1

    def ends(self, call: Made) -> set[Seat]:
        return set().union(*(self.ends(wait) if wait.runs else {wait.seat} for wait in call.waits))

    def circle(self, seat: Seat) -> set[Seat] | None:
        """The seats that its threads wait for, however far, where each of them waits for it. Of a settled world."""
        to = {
            each: set().union(
                *(self.ends(call) for call in self.calls if call.seat is each and call.runs and not call.task)
            )
            for each in self.seats
        }
        reached: dict[Seat, set[Seat]] = {}
        for each in self.seats:
            found: set[Seat] = set()
            todo = [each]
            while todo:
                more = to[todo.pop()] - found
                found |= more
                todo += more
            reached[each] = found
        if (
            self.has_room(seat)
            or seat not in reached[seat]
            or any(seat not in reached[other] for other in reached[seat])
        ):
            return None
        return reached[seat]


def test_what_is_found_is_what_never_goes_on() -> None:
    for seed in range(400):
        with tried_with(seed):
            look_for_circles(World(seed))


def look_for_circles(world: World) -> None:
    early = [seat for seat in world.seats if circles.find(seat)]
    world.settle()
    assert all(not world.has_room(seat) for seat in early)
    while world.calls:
        found = {seat: circles.find(seat) for seat in world.seats}
        for seat, circle in found.items():
            expected = world.circle(seat)
            assert (None if circle is None else {wait.seat for wait in circle.waits}) == expected
        circle = next(filter(None, found.values()))  # else it would never end
        numbers = {wait.call[1] for wait in circle.waits}
        last = max((call for call in world.calls if call.number in numbers), key=lambda call: call.number)
        assert circle.waits[-1].call == (last.session.number, last.number) and not last.runs
        assert f"{last.seat.names[0]!r} would wait for itself" in circle.why
        world.end(last)
        world.settle()


def test_the_model_has_circles_of_every_kind() -> None:
    sizes = set()
    for seed in range(400):
        world = World(seed)
        world.settle()
        sizes |= {len(circle.waits) for seat in world.seats if (circle := circles.find(seat))}
    assert {1, 2, 3, 4} <= sizes


def test_a_circle_is_sure_once_all_have_told_of_it_again() -> None:
    for seed in range(100):
        world = World(seed)
        world.settle()
        for seat in filter(circles.find, world.seats):
            looks, before = circles.Looks(), circles.find(seat)
            for each in world.seats:
                now = circles.find(seat)
                assert now is not None and before is not None and now.waits == before.waits
                assert now.is_sure(before) == all(
                    other.number not in before.told or other.told > before.told[other.number] for other in world.seats
                )
                assert now.is_sure(before) or looks.again(seat) is None
                each.told += 1
            assert looks.again(seat) == circles.find(seat)
            assert looks.again(seat) is None, "it is looked for anew"


def test_of_so_many_calls_no_circle_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any server may tell of hundreds, several times a second, and the kernel's loop reads no more than this."""
    world = next(each for each in map(World, range(400)) if each.settle() or any(map(circles.find, each.seats)))
    seat = next(filter(circles.find, world.seats))
    monkeypatch.setattr(circles, "CALLS", 2)
    assert circles.find(seat) is None


class Knot(contextlib.ExitStack):
    """Two servers with a thread each: a call of "name" waits for one of "other", where it is the same."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.stage = self.enter_context(Stage(kernel, threads=1))
        self.other = self.enter_context(RawServer(self.stage.caller, "other"))
        self.back = self.enter_context(RawSession(self.stage.host, "other"))
        _, fds = self.other.hear()
        channel.close_all(fds)

    def tell(self, *, first: int = 1, second: int = 2, waits: list[Any] | None = None) -> None:
        """Each server tells once: 5 is at work, 6 waits there. `first`, `second`: since when those two wait; `waits`:
        what the first one tells of that instead.
        """
        to, back = self.stage.session.number, self.back.number
        waits = [(to, 5, True, back, 6, first)] if waits is None else waits
        self.stage.server.tell(Served({}, [(to, 5, "name", 1.0), (to, 6, "name", None)], [], [], waits))
        self.other.tell(
            Served({}, [(back, 5, "other", 1.0), (back, 6, "other", None)], [], [], [(back, 5, True, to, 6, second)])
        )


def test_the_last_call_of_a_circle_is_refused_once_all_have_told_of_it_twice(run: Callable[..., Kernel]) -> None:
    with Knot(run()) as knot:
        knot.tell()
        knot.tell(second=3)  # another call than before
        knot.tell(second=3, waits=[])
        knot.tell()
        knot.stage.session.lend(knot.stage.address)
        assert isinstance(knot.stage.hear(), Granted)  # and nothing before it
        knot.tell()
        refused = knot.stage.hear()
        assert isinstance(refused, Refused) and (refused.session, refused.id) == (knot.stage.session.number, 6)
        for words in ("'name' would wait for itself", "'other' of process", "'name' of process", "more threads"):
            assert words in refused.why
        for _ in range(2):
            knot.tell(first=9)
        (refused, _) = knot.other.hear()
        assert isinstance(refused, Refused) and (refused.session, refused.id) == (knot.back.number, 6)


def test_a_server_that_lies_about_what_it_waits_for(run: Callable[..., Kernel]) -> None:
    """Of sessions that there are not, of itself, of somebody else's, of more than anybody has."""
    with Knot(run()) as knot:
        to, back = knot.stage.session.number, knot.back.number
        for waits in (
            [(to, 5, True, 99, 6, 1)],
            [(to, 5, True, -1, 2**63, 2**62 - 1)],
            [(to, 5, True, to, 5, 1)],
            [(to, 5, True, to, 6, 1)],
            [(to, 5, False, back, 6, 1)],
            [(to, 5, True, back, 6, 1), (to, 5, True, back, 5, 1), (to, 5, True, back, 7, 1)],
            [(to, id, True, back, id, 1) for id in range(500)],
        ):
            for _ in range(3):
                knot.tell(waits=waits)
        knot.stage.session.lend(knot.stage.address)
        assert isinstance(knot.stage.hear(), Granted)
