"""Step after step, to the books and to a plain model of them: for `test_books_model.py`."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from typing import Any

from books_at_work import AtWork
from books_beside import NAMES, Coming, Failed
from books_model import Wrong
from books_nouns import Handle, Person, Place
from conftest import PAGE, land_maps

from realmap.errors import (
    AccessDenied,
    InvalidAddress,
    InvalidHandle,
    InvalidSize,
    LimitReached,
)
from realmap.kernel.services import LONG_BYTES, LONG_COUNT, Later
from realmap.memory.frames import SharedFrames
from realmap.memory.lands import USER_LAND
from realmap.memory.stock import PLACES
from realmap.pages import HUGE_SIZE, align_up
from realmap.rights import MemoryType, u_r, u_rw, u_rx, u_w
from realmap.wire import messages
from realmap.wire.messages import NAMED, RECYCLED

#: How often each of them comes.
STEPS = {
    "admit": 2,
    "reap": 0.5,
    "fork": 0.5,
    "adopt": 3,
    "nobody_comes": 0.5,
    "leave": 0.5,
    "map": 14,
    "go_on": 3,
    "more": 3,
    "unmap": 9,
    "use_again": 9,
    "move": 3,
    "query": 6,
    "share": 14,
    "attach": 12,
    "revoke": 2,
    "time_passes": 1,
    "begin_call": 3,
    "end_call": 4,
    "mirror": 9,
    "drop": 9,
    "touch": 12,
    "copy": 8,
}


class Driver(AtWork):
    """One method for each kind of step."""

    def admit(self) -> None:
        full = len(self.model.people) >= self.model.limits.processes
        pid = self.rng.choice((1, 2, os.getpid()))  # what is not mapped here is mirrored, as any other
        self.what = "admit"
        with self.right(LimitReached if full else None):
            person = Person(self.books.admit(pid, 0))
            person.real.memory.stock.join(person.words)
            told = self.told[person] = {}

            def tell(mapping: Any, comes: bool) -> None:
                if comes:
                    told[mapping.address] = mapping.length
                else:
                    del told[mapping.address]

            person.real.memory.told = tell
            self.model.people.append(person)

    def map(self) -> None:
        rng, person = self.rng, self.person()
        length = rng.choice((rng.randrange(1, 5 * PAGE), rng.randrange(1, 30 * PAGE), PAGE))
        kind, rights, fragment, name, commit, huge = MemoryType.HEAP, int(u_rw), None, None, True, False
        odd = rng.randrange(60)
        if odd < 8:
            kind = rng.choice(list(MemoryType))
        elif odd < 16:
            rights = rng.choice((0, 1, 8, int(u_r), int(u_w), int(u_rx), 77))
        elif odd < 26:
            fragment = rng.choice((PAGE, PAGE, 2 * PAGE, 3 * PAGE, 0, 100, -PAGE))
        elif odd < 32:
            name, fragment = rng.choice((*NAMES, "a/b")), rng.choice((None, None, PAGE))
        elif odd < 36:
            commit = False
        elif odd < 38:
            length, commit = rng.choice((0, -5, 5 << 40, 5 << 40, 1 << 63, 1 << 64)), rng.random() < 0.2
        elif odd == 38 and rng.random() < 0.1:
            length, huge = rng.choice((1, HUGE_SIZE, HUGE_SIZE + PAGE)), True
        elif odd == 39 and rng.random() < 0.1:
            length = rng.choice((LONG_BYTES, LONG_BYTES + 1))
        elif odd < 44:
            length, fragment = 70 * PAGE, PAGE
        request = messages.Map(1, length, int(kind), rights, fragment, name, commit, huge)
        size = align_up(length, HUGE_SIZE if huge else PAGE)
        wrong = self.model.map_error(person, request)
        is_long = size > LONG_BYTES or huge or size // (fragment or size or 1) > LONG_COUNT
        if wrong is None and kind.is_counted and not is_long:
            wrong = self.model.frames_error_in_need(person, request, size) or self.model.enter_error(person, size, 0)
        got = self.ask(person, request, wrong)
        if isinstance(got, Later):
            assert is_long
            person.coming += 1
            person.real.coming += 1
            self.later.append(Coming(person, request, got))
        else:
            self.mapped(person, request, size, got)

    def mapped(self, person: Person, request: messages.Map, size: int, got: Any) -> None:
        address, length, count, huge, serial = got
        mapping = person.real.memory.mapping_at(address)
        assert mapping is not None
        assert (length, mapping.length) == (size, size)
        frames = None
        if isinstance(mapping.frames, SharedFrames):
            assert (count, huge) == (len(mapping.frames.segments), mapping.frames.huge)
            frames = next((each for each in self.model.frames if each.serial == mapping.frames.serial), None)
            frames = frames or self.noted(person, request, mapping.frames)
        self.brought(self.entered(person, address, size, frames, 0, request.kind, request.rights, serial))

    def go_on(self) -> None:
        """What was to be done later is done, or answered."""
        if not self.later:
            return
        coming = self.rng.choice(self.later)
        person, request = coming.person, coming.request
        size = align_up(request.length, HUGE_SIZE if request.huge else PAGE)
        self.what = f"later, {request}"
        if coming.real is None:
            try:
                with self.right(self.model.frames_error(person, request, size)):
                    coming.real = coming.work.work()
                coming.frames = self.noted(person, request, coming.real, True)
            finally:
                if coming.real is None:
                    self.end_coming(coming)
            return
        try:
            with self.right(self.model.enter_error(person, size, coming.real.huge)):
                answer = coming.work.end(coming.real)
        finally:
            self.end_coming(coming)
        self.mapped(person, request, size, self.received(person, answer))

    def end_coming(self, coming: Coming) -> None:
        self.later.remove(coming)
        coming.person.coming -= 1
        coming.person.real.coming -= 1
        if coming.frames is not None:
            coming.frames.coming = False

    def more(self) -> None:
        person = self.person()
        place = self.place(person)
        first = self.rng.choice((0, 1, 64, 1 << 63))
        self.ask(person, messages.More(1, place.address, first), self.starts(person, place))
        if place.frames is not None:
            place.frames.recycles = False
        self.brought(place, first)

    def starts(self, person: Person, place: Place) -> Wrong:
        return None if place.address in person.places else InvalidAddress

    def unmap(self) -> None:
        person = self.person()
        place = self.place(person)
        length = place.length if self.rng.random() < 0.95 else place.length + PAGE
        wrong = self.starts(person, place) or (None if length == place.length else InvalidSize)
        free = [at for at, state in enumerate(person.words.state) if state == "free"]
        at = self.rng.choice(free) if free and self.rng.random() < 0.7 else -1
        self.ask(person, messages.Unmap(1, place.address, length, at), wrong)
        self.model.leave_place(person, place)
        if at >= 0:
            self.model.park(person, place, at)
        if not any(each.frames is place.frames for each in person.places.values()):
            for handle in self.model.handles.values():
                if handle.maker is person and handle.frames is place.frames:
                    self.model.ends_after(handle)
        if at >= 0:
            kept = person.stock[at].frames is not None
            assert person.words.state[at] == ("kept" if kept else "gone"), self.what

    def use_again(self) -> None:
        """A process uses what it has parked, or parks again what it has so used, and says nothing."""
        person = self.person()
        for at, place in list(person.stock.items()):
            if person.words.state[at] == "gone" and self.rng.random() < 0.5:
                person.words.state[at] = "free"  # it has unmapped it
                del person.stock[at]
            elif person.words.change(at, "kept", "used"):
                del person.stock[at]
                self.used[person, at] = person.places[place.address] = place
                break
        for (who, at), place in list(self.used.items()):
            if who is person and self.rng.random() < 0.5:
                del self.used[who, at]
                if person.words.change(at, "used", "kept"):
                    del person.places[place.address]
                    person.stock[at] = place

    def move(self) -> None:
        person = self.person()
        place = self.place(person)
        start = place.address + self.rng.randrange(-2, 3) * PAGE
        end = start + self.rng.randrange(4) * PAGE
        address = self.ask(person, messages.Move(1, place.address, start, end), self.starts(person, place))
        self.model.leave_place(person, place)
        moved = self.entered(
            person, address, place.length, place.frames, place.start, place.kind, place.rights, place.serial
        )
        moved.handle = place.handle
        assert address != place.address or place.length > 1 << 40  # whose only room may be its own

    def query(self) -> None:
        person = self.person()
        place = self.place(person)
        address = place.address + self.rng.randrange(-1, place.length + 1)
        inside = USER_LAND.holds(address)
        info = self.ask(person, messages.Query(1, address), None if inside else InvalidAddress)
        found = person.at(address)
        if found is None:
            assert (info.type, info.rights, info.refcount) == (MemoryType.UNMAPPED, 0, 0)
            assert info.address <= address < info.address + info.length
            assert person.is_hole(info.address, info.length)
        else:
            held = self.model.references()
            count = sum(held[found.frames, kind] for kind in ("mapping", "mirror", "handle")) if found.frames else 0
            wanted = (found.address, found.length, found.kind, found.rights, found.start, count)
            assert (info.address, info.length, info.type, info.rights, info.phys_offset, info.refcount) == wanted

    def share(self) -> None:
        rng, person = self.rng, self.person()
        place = self.place(person)
        offset, length = self.span(place.length)
        request = messages.Share(
            1,
            place.address + offset,
            length,
            rng.choice((*[place.rights] * 9, int(u_r), int(u_rw), 0, 8, 99)),
            rng.choice((*[None] * 6, 1, 1, 2, 0)),
            rng.choice((*[None] * 9, 1.0, 20.0, 0.0, 1e9, math.nan)),
            rng.choice((*[0.0] * 8, 5.0, 5.0, math.inf, -1.0, math.nan)),
            rng.choice((*[None] * 4, "one", "two")),
        )
        token = self.ask(person, request, self.model.share_error(person, request))
        assert token not in self.model.handles
        assert request.name is None or token == NAMED + request.name
        found = person.at(request.address)
        assert found is not None
        assert found.frames is not None
        self.model.handles[token] = Handle(
            token,
            found.frames,
            found.start + request.address - found.address,
            length,
            found.kind,
            request.rights,
            person,
            request.keep,
            request.uses,
            None if request.seconds is None else self.model.now + request.seconds,
        )

    def token(self) -> str:
        known = list(self.model.handles)
        return self.rng.choice(known) if known and self.rng.random() < 0.95 else self.rng.choice(("no", NAMED + "no"))

    def attach(self) -> None:
        rng, person, token = self.rng, self.person(), self.token()
        handle = self.model.handles.get(token)
        offset, length = self.span(handle.length if handle is not None else PAGE)
        rights = rng.choice((*[None] * 8, int(u_r), int(u_rw), 0, 99))
        request = messages.Attach(1, token, offset, rng.choice((None, length)), rights)
        got = self.ask(person, request, self.model.attach_error(person, request))
        assert handle is not None
        asked = handle.length - offset if request.length is None else length
        start, end = self.model.attached(handle, offset, asked)
        address, size, _, huge, serial, lead, bytes_, given, pieces, again = got
        allowed = handle.rights if rights is None else rights
        real = handle.frames.real()
        assert real is not None
        assert (size, lead, bytes_, given) == (end - start, handle.start + offset - start, asked, allowed)
        assert (huge, pieces) == (real.huge, [list(piece[1:]) for piece in real.pieces(start, end - start)])
        handle.frames.recycles = False
        place = self.entered(person, address, size, handle.frames, start, handle.kind, allowed, serial)
        if handle.uses is None and handle.until is None and handle.frames.segments == 1:
            place.handle = handle
        assert again == (place.handle is not None and size <= min(RECYCLED, self.model.limits.stock))
        self.brought(place)
        if handle.is_named:
            handle.holders.add(person)
        if handle.uses is not None:
            handle.uses -= 1
            if not handle.uses:
                self.model.end_handle(handle)

    def revoke(self) -> None:
        person, token = self.person(), self.token()
        handle = self.model.find(token)
        wrong: Wrong = InvalidHandle if handle is None else None
        if handle is not None and handle.maker is not person and not handle.keep and not handle.is_named:
            wrong = AccessDenied
        self.ask(person, messages.Revoke(1, token), wrong)
        assert handle is not None
        self.model.end_handle(handle)

    def leave(self) -> None:
        person = self.person()
        self.ask(person, messages.Leave(1))
        for handle in self.model.handles.values():
            if handle.maker is person and handle.is_named:
                handle.keep = math.inf

    def time_passes(self) -> None:
        self.model.now += self.rng.choice((0.5, 1.0, 5.0, 30.0))
        if self.rng.random() < 0.7:
            self.books.handles.expire(self.model.now)
            for token in list(self.model.handles):
                self.model.find(token)

    def fork(self) -> None:
        person = self.person()
        inherits = self.rng.random() < 0.5
        assert self.ask(person, messages.Forked(0, inherits)) is None
        person.forked = person.forked or inherits
        person.stock.clear()
        person.words.state = ["free"] * PLACES

    def adopt(self) -> None:
        rng, person = self.rng, self.person()
        donor = rng.choice((*self.model.people, *self.model.inheritances))
        places = [self.place(donor) for _ in range(rng.randrange(4))]
        odd = (0, 0, 0, 0, 1)
        asked = [
            (place.address, place.length + PAGE * rng.choice(odd), place.serial + rng.choice(odd)) for place in places
        ]
        secret = rng.choice((donor.real.secret, donor.real.secret, donor.real.secret, "", "no"))
        self.came.clear()
        wanted = self.model.adopt(person, secret, asked)
        more = rng.random() < 0.2
        assert self.ask(person, messages.Adopt(1, secret, asked, more)) == wanted, self.what
        comes = not more and donor in self.model.inheritances and secret == donor.real.secret
        assert self.came == ([(donor.real.number, person.real.pid)] if comes else [])

    def reap(self) -> None:
        if not self.model.people:
            return
        person = self.rng.choice(self.model.people)
        self.what = f"the end of process {person.real.number}"
        assert self.books.reap(person.real, self.model.now) == self.model.reap(person), self.what
        assert not person.real.alive

    def nobody_comes(self) -> None:
        if self.model.inheritances:
            dead = self.model.inheritances.pop(self.rng.randrange(len(self.model.inheritances)))
            self.books.inheritance.end(dead.real)
            self.model.clear(dead)

    def steps(self, count: int, short: bool) -> None:
        """So many of them, counted anew now and then, and everything given back at the end.

        `short`: now and then there are no descriptors left.
        """
        names, weights = list(STEPS), list(STEPS.values())
        for number in range(count):
            (name,) = self.rng.choices(names, weights)
            if short and name in ("map", "attach", "more") and self.rng.random() < 0.05:
                self.left = self.rng.randrange(self.rng.choice((3, 60)))
            with suppress(Failed):
                getattr(self, name)()
            if self.left is not None:
                self.left = None
                self.look()
            if not number % 20:
                self.recount()
            if not number % 500:
                self.look()
        self.finish()

    def finish(self) -> None:
        """Everything is given back."""
        while self.later:
            with suppress(Failed):
                self.go_on()
        while self.model.mirrors:
            self.drop()
        while self.calls:
            self.end_call()
        while self.model.people:
            self.reap()
        while self.model.inheritances:
            self.nobody_comes()
        self.books.handles.clear()
        self.model.handles.clear()
        self.recount()
        self.look()
        assert (self.books.frames.used, self.books.frames.segments, land_maps()) == (0, 0, [])
