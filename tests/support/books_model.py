"""What the books ought to say, in dicts and ints, for `test_books_model.py`, and which error is right."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from books_nouns import Frames, Handle, Mirror, Part, Person, Place

from realmap.errors import (
    AccessDenied,
    InvalidAddress,
    InvalidHandle,
    InvalidMemState,
    InvalidRights,
    InvalidSize,
    KernelError,
    LimitReached,
    PhysicalMemoryExhaustion,
    ProcessKilled,
    VirtualMemoryExhaustion,
)
from realmap.kernel.handles import FOR_EVER
from realmap.kernel.limits import Limits, segments_of
from realmap.memory.kernel_memory import KernelMemory
from realmap.memory.lands import GUARD
from realmap.pages import HUGE_SIZE, PAGE_SIZE, USIZE_MAX, align_down, align_up
from realmap.rights import MemoryType
from realmap.wire import messages
from realmap.wire.messages import NAMED

#: The error that is right; None: none.
Wrong = type[KernelError] | None
#: More than /dev/shm has.
ENDLESS = 1 << 42


class Model:
    """All of it."""

    def __init__(self, limits: Limits, memory_limit: int | None, process_limit: int | None) -> None:
        self.limits = limits
        self.memory_limit, self.process_limit = memory_limit, process_limit
        self.now = 1000.0
        self.asked = 0
        self.people: list[Person] = []
        self.inheritances: list[Person] = []
        self.frames: list[Frames] = []
        self.gone: list[Frames] = []
        self.handles: dict[str, Handle] = {}
        self.mirrors: list[Mirror] = []
        #: Of calls that are at work, each the mappings that it has pinned.
        self.pinned: list[list[Part]] = []

    # ---- counts -----------------------------------------------------------------------------

    def places(self) -> Iterator[Place]:
        """Each mapping that holds a reference."""
        for person in (*self.people, *self.inheritances):
            yield from person.places.values()
        yield from {place: None for parts in self.pinned for place, _, _ in parts if place.gone}

    def references(self) -> Counter[tuple[Frames, str]]:
        """How many of each kind hold which frames."""
        found: Counter[tuple[Frames, str]] = Counter()
        for place in self.places():
            if place.frames is not None:
                found[place.frames, "mapping"] += 1
        for person in self.people:
            for place in person.kept():
                assert place.frames is not None
                found[place.frames, "stock"] += 1
        for handle in self.handles.values():
            found[handle.frames, "handle"] += 1
        for mirror in self.mirrors:
            for frames in {place.frames for place, _, _ in mirror.parts}:
                assert frames is not None
                found[frames, "mirror"] += 1
        return found

    def refcount(self, frames: Frames) -> int:
        return sum(count for (which, _), count in self.references().items() if which is frames)

    def used(self, payer: Person | None = None) -> tuple[int, int]:
        """Bytes and segments in use, by one process or in all."""
        mine = [each for each in self.frames if payer is None or each.payer is payer]
        return sum(each.size for each in mine), sum(each.segments for each in mine)

    def forget(self) -> None:
        """Takes out the frames that nobody holds any more: they ought to be gone."""
        held = {frames for frames, _ in self.references()} | {each for each in self.frames if each.coming}
        self.gone += [each for each in self.frames if each not in held]
        self.frames = [each for each in self.frames if each in held]

    # ---- changes ----------------------------------------------------------------------------

    def end_handle(self, handle: Handle) -> None:
        del self.handles[handle.token]
        self.retire(handle)

    def ends_after(self, handle: Handle) -> None:
        """It was made to outlive something, for some time, and that ends now."""
        if 0 < handle.keep < FOR_EVER:
            handle.until = min(self.now + handle.keep, math.inf if handle.until is None else handle.until)
            self.retire(handle)

    def retire(self, handle: Handle) -> None:
        """What was attached by it, and is parked, is not used again."""
        for person in self.people:
            for place in person.kept():
                if place.handle is handle:
                    place.frames = None

    def find(self, token: str) -> Handle | None:
        """A handle that is good; one whose time is over goes."""
        handle = self.handles.get(token)
        if handle is not None and handle.until is not None and handle.until <= self.now:
            self.end_handle(handle)
            return None
        return handle

    def leave_place(self, person: Person, place: Place) -> None:
        del person.places[place.address]
        place.gone = True

    def give_way(self, person: Person) -> bool:
        """Its stock is given up, or else everybody's; whether there was any."""
        return person.give_up() or sum(each.give_up() for each in self.people) > 0

    def park(self, person: Person, place: Place, at: int) -> None:
        """It was unmapped, and is parked."""
        frames = place.frames
        keeps = (
            frames is not None
            and place.length <= self.limits.stock
            and (
                frames.recycles and not any(which is frames for which, _ in self.references())
                if place.handle is None
                else self.handles.get(place.handle.token) is place.handle and place.handle.until is None
            )
        )
        for oldest in person.kept() if keeps else ():
            if sum(each.length for each in person.kept()) + place.length <= self.limits.stock:
                break
            oldest.frames = None
        kept = frames if keeps else None
        parked = Place(place.address, place.length, kept, place.start, place.kind, place.rights, place.serial)
        parked.handle = place.handle
        parked.asked = self.asked = self.asked + 1
        person.stock[at] = parked

    def reap(self, person: Person) -> bool:
        """Whether its memory stays for its children."""
        for handle in list(self.handles.values()):
            concerned = handle.maker is person or person in handle.holders
            handle.holders.discard(person)
            if handle.maker is person:
                handle.maker = None
            if not concerned or handle.maker is not None or handle.holders:
                continue
            if not handle.keep:
                self.end_handle(handle)
            self.ends_after(handle)
        self.people.remove(person)
        person.stock.clear()
        if person.forked and any(place.frames for place in person.places.values()):
            self.inheritances.append(person)
            return True
        self.clear(person)
        return False

    def clear(self, person: Person) -> None:
        for place in list(person.places.values()):
            self.leave_place(person, place)

    def adopt(self, person: Person, secret: str, places: list[tuple[int, int, int]]) -> list[bool]:
        """Which of them a child inherits."""
        donor = next((each for each in (*self.people, *self.inheritances) if each.real.secret == secret), None)
        if donor is not None and secret:
            person.give_up()
        found = []
        for address, length, serial in places:
            place = donor.places.get(address) if donor is not None else None
            room = len(person.places) + person.coming < self.limits.mappings
            same = place is not None and (place.length, place.serial) == (length, serial)
            good = same and room and person.is_free(address, length)
            if good and place is not None:
                copy = Place(address, length, place.frames, place.start, place.kind, place.rights, serial)
                person.places[address] = copy
                if place.frames is not None:
                    place.frames.recycles = False
            found.append(good)
        return found

    # ---- which error is right ---------------------------------------------------------------

    def room_error(self, person: Person) -> Wrong:
        if person.coming >= self.limits.calls:
            return LimitReached
        if len(person.places) + len(person.kept()) + person.coming >= self.limits.mappings:
            person.give_up()
        return VirtualMemoryExhaustion if len(person.places) + person.coming >= self.limits.mappings else None

    def map_error(self, person: Person, request: messages.Map) -> Wrong:
        """Before any frames are taken."""
        kind = MemoryType(request.kind)
        if not 0 <= request.rights < 16:
            return InvalidRights
        if not kind.has_frames:
            return InvalidMemState
        if request.rights < 8 or not request.rights & 7:
            return AccessDenied
        if (full := self.room_error(person)) is not None:
            return full
        size = align_up(request.length, HUGE_SIZE if request.huge else PAGE_SIZE)
        if request.length <= 0 or size > USIZE_MAX:
            return InvalidSize
        if kind.is_counted:
            return None
        if request.fragment is not None or request.name is not None or request.huge:
            return InvalidMemState
        return None if person.has_room(size) else VirtualMemoryExhaustion

    def frames_error_in_need(self, person: Person, request: messages.Map, size: int) -> Wrong:
        """The same, where stocks are given up for it."""
        while (wrong := self.frames_error(person, request, size)) is PhysicalMemoryExhaustion and self.give_way(person):
            pass
        return wrong

    def frames_error(self, person: Person, request: messages.Map, size: int) -> Wrong:
        """Of taking the frames."""
        step = size if request.fragment is None else request.fragment
        if step <= 0 or step % (HUGE_SIZE if request.huge else PAGE_SIZE):
            return InvalidSize
        if request.name is not None and "/" in request.name:
            return InvalidHandle
        if request.name is not None and step < size:
            return InvalidSize
        self.forget()
        (mine, segments), (everybodys, _) = self.used(person), self.used()
        if (
            mine + size > (USIZE_MAX if self.process_limit is None else self.process_limit)
            or segments + -(-size // step) > segments_of(self.limits)
            or everybodys + size > (USIZE_MAX if self.memory_limit is None else self.memory_limit)
        ):
            return PhysicalMemoryExhaustion
        if request.name is not None and any(each.name == request.name for each in self.frames):
            return InvalidHandle
        too_much = size >= (ENDLESS if request.commit or request.huge else 1 << 63)
        return PhysicalMemoryExhaustion if too_much else None

    def enter_error(self, person: Person, size: int, huge: int) -> Wrong:
        """Of entering a mapping of frames that are there."""
        if not person.real.alive:
            return ProcessKilled
        return None if person.has_room(size, HUGE_SIZE if huge else PAGE_SIZE) else VirtualMemoryExhaustion

    def share_error(self, person: Person, request: messages.Share) -> Wrong:
        if request.name is not None and NAMED + request.name in self.handles:
            return InvalidHandle
        place = person.at(request.address)
        if place is None:
            return InvalidAddress
        if place.frames is None:
            return InvalidMemState
        if not 0 < request.length <= place.end - request.address:
            return InvalidSize
        if not 0 <= request.rights < 16:
            return InvalidRights
        if request.rights & ~place.rights or not request.rights & 7:
            return AccessDenied
        if request.uses is not None and request.uses < 1:
            return InvalidSize
        if request.seconds is not None and not 0 < request.seconds < FOR_EVER:
            return InvalidSize
        if not request.keep >= 0:
            return InvalidSize
        made = [each for each in self.handles.values() if each.maker and each.maker.real.pid == person.real.pid]
        if len(made) + 1 + len(person.kept()) > self.limits.handles:
            person.give_up()
        return LimitReached if len(made) >= self.limits.handles else None

    def attach_error(self, person: Person, request: messages.Attach) -> Wrong:
        if (full := self.room_error(person)) is not None:
            return full
        handle = self.find(request.token)
        if handle is None:
            return InvalidHandle
        length = handle.length - request.offset if request.length is None else request.length
        if request.offset < 0 or length <= 0 or request.offset + length > handle.length:
            return InvalidSize
        rights = handle.rights if request.rights is None else request.rights
        if not 0 <= rights < 16:
            return InvalidRights
        if rights & ~handle.rights or not rights & 7:
            return AccessDenied
        start, end = self.attached(handle, request.offset, length)
        huge = handle.frames.huge
        return None if person.has_room(end - start, HUGE_SIZE if huge else PAGE_SIZE) else VirtualMemoryExhaustion

    def attached(self, handle: Handle, offset: int, length: int) -> tuple[int, int]:
        """The whole pages of its frames that attaching a part of it shows."""
        unit = HUGE_SIZE if handle.frames.huge else PAGE_SIZE
        at = handle.start + offset
        return align_down(at, unit), min(align_up(at + length, unit), handle.frames.size)

    def mirror_error(self, parts: list[Part], rights: int, land: KernelMemory) -> Wrong:
        asked = rights & 3
        private = any(place.frames is None for place, _, _ in parts)
        if any(asked & ~place.rights for place, _, _ in parts):
            return AccessDenied
        if private:
            return InvalidMemState
        if rights not in (1, 2, 3):
            return InvalidRights if not asked else AccessDenied
        return None if self._fits(parts, land) else VirtualMemoryExhaustion

    def _fits(self, parts: list[Part], land: KernelMemory) -> bool:
        """Whether a hole of KernelLand takes a mirror, with a page that stays free towards each neighbour."""
        span, residue = self.span(parts)
        modulus = HUGE_SIZE if span >= HUGE_SIZE else 1
        at = land.start
        for base, size in sorted((each.real._base, each.real._span) for each in self.mirrors):
            if at + ((residue - at) & (modulus - 1)) + span <= base - GUARD:
                return True
            at = base + size + GUARD
        return at + ((residue - at) & (modulus - 1)) + span <= land.land.end

    def span(self, parts: list[Part]) -> tuple[int, int]:
        """The bytes of whole pages that a mirror of them takes, and where its first one is in its segment."""
        total = 0
        place, offset, length = parts[0]
        start = place.start + offset
        first = align_down(start)
        for place, offset, length in parts:
            at = place.start + offset
            total += align_up(at + length) - align_down(at)
        frames = parts[0][0].frames
        assert frames is not None
        if len(parts) == 1 and frames.huge:
            first = max(align_down(start, HUGE_SIZE), place.start)
            total = min(align_up(start + length, HUGE_SIZE), place.start + place.length) - first
        real: Any = frames.real()
        return total, real.pieces(first, 1)[0][1]
