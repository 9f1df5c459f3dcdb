"""Books and `books_model.Model` side by side: what is done to both, and how they are compared."""

from __future__ import annotations

import fcntl
import math
import os
import random
import resource
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from books_model import Model, Wrong
from books_nouns import Frames, Part, Person, Place, recycles
from conftest import PAGE, land_maps

from realmap.errors import KernelError, PhysicalMemoryExhaustion
from realmap.host import files
from realmap.kernel.books import Books
from realmap.kernel.limits import Limits
from realmap.kernel.services import SERVICES, Answer, Later
from realmap.memory.frames import SharedFrames
from realmap.memory.kernel_memory import KernelMemory
from realmap.memory.lands import USER_LAND
from realmap.pages import align_up
from realmap.serving import user_buffer
from realmap.serving.user_buffer import UserBuffer
from realmap.wire import messages
from realmap.wire.messages import MAX_DESCRIPTORS

#: Names in /dev/shm.
NAMES = [f"books-model.{os.getpid()}.{number}" for number in range(3)]


class Failed(Exception):
    """The step ended in the error that was right."""


@dataclass(eq=False)
class Coming:
    """An answer that takes long to make, and the frames that were made for it."""

    person: Person
    request: messages.Map
    work: Later
    frames: Frames | None = None
    real: SharedFrames | None = None


class Beside:
    """Does the same to the books and to the model, and compares."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        limits = Limits(
            processes=rng.choice((2, 5)),
            mappings=rng.choice((3, 12, 40)),
            segments=rng.choice((10, 150)),
            calls=2,
            handles=rng.choice((3, 30)),
            stock=rng.choice((0, 7 * PAGE, 200 * PAGE, 200 * PAGE)),
        )
        quotas = rng.choice((None, 300 * PAGE)), rng.choice((None, 60 * PAGE))
        land = rng.choice((24 * PAGE, 200 * PAGE, 1 << 40))
        memory = KernelMemory(length=land, lazy_unmap=rng.choice((0, 0, 30 * PAGE)))
        self.books = Books({}, limits, memory, *quotas)
        self.books.inheritance.came = lambda dead, pid: self.came.append((dead.number, pid))
        self.model = Model(limits, *quotas)
        self.came: list[tuple[int, int]] = []
        #: Of each process what its books told of.
        self.told: dict[Person, dict[int, int]] = {}
        self.later: list[Coming] = []
        self.calls: list[tuple[UserBuffer, list[Part]]] = []
        #: What processes use again, by place, and nobody has looked.
        self.used: dict[tuple[Person, int], Place] = {}
        #: How many descriptors can still be had, until the next one fails; None: enough.
        self.left: int | None = None
        self.errors = 0
        self.before = open_segments()
        self.what = ""

    # ---- tools ------------------------------------------------------------------------------

    @contextmanager
    def right(self, *wrong: Wrong) -> Iterator[None]:
        """What is done in it ends as one of these say; after an error, everything is as it was."""
        try:
            yield
        except KernelError as error:
            assert type(error) in wrong, f"{self.what}: {error!r} in place of {wrong}"
            self.errors += 1
            del error
            self.compare_sums()
            raise Failed from None
        assert None in wrong, f"{self.what}: nothing in place of {wrong}"

    def compare_sums(self) -> None:
        model, books = self.model, self.books
        model.forget()
        assert (books.frames.used, books.frames.segments) == model.used(), self.what
        assert (len(books.handles), books.memory.live) == (len(model.handles), len(model.mirrors)), self.what
        sizes = [len(person.places) for person in model.people]
        assert [len(process.memory) for process in books.processes] == sizes, self.what

    def ask(self, person: Person, request: Any, wrong: Wrong = None) -> Any:
        """The value of an answer, or what makes it later."""
        self.what = f"{request} of process {person.real.number}"
        allowed = (wrong,) if self.left is None else (wrong, PhysicalMemoryExhaustion)
        with self.right(*allowed), self.given_up(), self.descriptors():
            answer = self.books.patiently(
                person.real, lambda: SERVICES[type(request)](self.books, person.real, request)
            )
        return answer if answer is None or isinstance(answer, Later) else self.received(person, answer)

    @contextmanager
    def descriptors(self) -> Iterator[None]:
        """Only so many can be had in it."""
        if self.left is None:
            yield
            return
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + self.left, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    @contextmanager
    def given_up(self) -> Iterator[None]:
        """Where descriptors may be short, stocks may go at any moment."""
        try:
            yield
        finally:
            for person in self.model.people if self.left is not None else ():
                for at, place in person.stock.items():
                    if person.words.state[at] == "gone":
                        place.frames = None

    def received(self, person: Person, answer: Answer) -> Any:
        """What came is the user's to close, and a description of its own."""
        value, descriptors = answer
        ours = {each.fd for process in self.books.processes for each in segments(process.memory)}
        assert not ours & set(descriptors)
        self.modes = {fcntl.fcntl(each, fcntl.F_GETFL) & os.O_ACCMODE for each in descriptors}
        self.count = len(descriptors)
        for descriptor in descriptors:
            files.close(descriptor)
        return value

    def brought(self, place: Place, first: int = 0) -> None:
        """Whether the descriptors of the last answer were those of a mapping from its segment `first` on."""
        real = place.frames.real() if place.frames is not None else None
        count = len(real.pieces(place.start, place.length)) - first if real is not None else 0
        assert self.count == max(0, min(count, MAX_DESCRIPTORS)), self.what
        assert self.modes <= {os.O_RDWR if place.rights & 2 else os.O_RDONLY}, self.what

    def person(self) -> Person:
        """One of them, or a new one."""
        if not self.model.people:
            self.admit()
        return self.rng.choice(self.model.people)

    def place(self, person: Person) -> Place:
        """One of its mappings, or one that never was."""
        if person.places and self.rng.random() < 0.95:
            return self.rng.choice(list(person.places.values()))
        address = USER_LAND.start + self.rng.randrange(-3, 9) * PAGE
        return person.places.get(address) or Place(address, PAGE, None, 0, 0, 0)

    def span(self, length: int) -> tuple[int, int]:
        """(offset, length) of a part of so many bytes; sometimes of none, or beyond."""
        rng = self.rng
        offset = rng.choice((0, 0, rng.randrange(length), rng.randrange(length)))
        return offset, rng.choice((length - offset, rng.randrange(length - offset + 1), rng.randrange(length + 9)))

    def entered(
        self, person: Person, address: int, length: int, frames: Frames | None, start: int, *what: int
    ) -> Place:
        assert person.is_free(address, length), self.what
        place = person.places[address] = Place(address, length, frames, start, *what)
        return place

    def noted(self, person: Person, request: messages.Map, real: SharedFrames, coming: bool = False) -> Frames:
        frames = Frames(
            real.length,
            len(real.segments),
            person,
            request.name,
            weakref.ref(real),
            real.serial,
            real.huge,
            coming,
            recycles(request, real.length),
        )
        self.model.frames.append(frames)
        return frames

    @contextmanager
    def buffer(self) -> Iterator[tuple[UserBuffer, list[Part]]]:
        """A buffer argument of a call: one that is at work, or one of this moment."""
        if self.calls and self.rng.random() < 0.3:
            yield self.rng.choice(self.calls)
            return
        buffer, parts = self.resolved()
        try:
            yield buffer, parts
        finally:
            user_buffer.end(buffer, pinned=False)

    def resolved(self) -> tuple[UserBuffer, list[Part]]:
        person = self.person()
        place = self.place(person)
        offset, length = self.span(place.length)
        if self.rng.random() < 0.1:
            length += self.rng.randrange(3 * PAGE)  # into the next mapping, or a hole
        address = place.address + offset
        parts = person.parts(address, length)
        self.what = f"a buffer of {length} bytes at {address:#x}"
        with self.right(None if isinstance(parts, list) else parts):
            buffer = UserBuffer(person.real, self.books.memory, None, address, length)
        assert isinstance(parts, list)
        return buffer, parts

    def slot(self, parts: list[Part]) -> tuple[Place, Frames, int, int] | None:
        """Where 8 bytes may be written: in which mapping, which frames, at which byte of them, and of all parts."""
        index = self.rng.randrange(len(parts))
        place, offset, length = parts[index]
        first = place.start + offset
        for slot in (align_up(first + self.rng.randrange(length), PAGE), align_up(first, PAGE), align_up(first, 16)):
            if slot + 8 <= first + length and place.frames is not None:
                return place, place.frames, slot, sum(part[2] for part in parts[:index]) + slot - first
        return None

    # ---- counting ---------------------------------------------------------------------------

    def recount(self) -> None:
        model, books = self.model, self.books
        model.forget()
        for person in model.people:
            len(person.real.memory)  # who looks finds what is used again
        while model.gone:
            real = model.gone.pop().real()
            assert real is None or real.freed, (self.what, real and real.holders())
        references = model.references()
        for frames in model.frames:
            real = frames.real()
            assert real is not None
            kinds = [str(who[0]) for who in real.who_holds()]
            for kind in ("mapping", "handle", "mirror", "stock"):
                assert kinds.count(kind) == references[frames, kind], (self.what, real.holders())
            assert real.refcount == len(kinds)
        assert (books.frames.used, books.frames.segments) == model.used()
        for person in (*model.people, *model.inheritances):
            allocator = person.real.memory.allocator
            assert (allocator.used, allocator.segments) == model.used(person)
            there = {mapping.address: mapping.length for mapping in person.real.memory}
            assert there == {place.address: place.length for place in person.places.values()} == self.told[person]
            assert len(there) + person.coming <= model.limits.mappings
            stock = person.real.memory.stock
            parked = [(each.address, each.frames is not None) for each in stock.windows()]
            assert parked == [(each.address, each.frames is not None) for each in person.parked()], self.what
            kept = person.kept()
            own = [each.length for each in kept if each.handle is None]
            assert (stock.count, stock.segments, stock.bytes) == (len(kept), len(own), sum(own))
        assert [each.real for each in model.people] == list(books.processes)
        assert [each.real for each in model.inheritances] == list(books.inheritance)
        assert {each.name for each in books.handles} == set(model.handles)
        for shared in books.handles:
            handle = model.handles[shared.name]
            assert (shared.uses, shared.until, shared.keep) == (handle.uses, handle.until, handle.keep) or (
                math.isinf(handle.keep) and math.isinf(shared.keep)
            )
            assert shared.maker is (handle.maker.real if handle.maker is not None else None)
            assert shared.holders == {each.real for each in handle.holders}
        land = books.memory
        assert land.mirrors() == sorted((each.real for each in model.mirrors), key=lambda each: each._base)
        assert land._kept_bytes <= land._budget
        alive = {frames.serial for frames in model.frames}
        assert {window.serial for window in land.kept_windows()} <= alive

    def look(self) -> None:
        """What Linux says of it."""
        self.model.forget()
        assert open_segments() == self.before + self.model.used()[1], self.what
        named = {name for name in NAMES if os.path.exists(f"/dev/shm/{name}")}
        assert named == {frames.name for frames in self.model.frames if frames.name}
        windows = [(each.base, each.span) for each in self.books.memory.kept_windows()]
        windows += [(each.real._base, each.real._span) for each in self.model.mirrors]
        assert sum(entry.length for entry in land_maps()) == sum(span for _, span in windows)


def segments(memory: Any) -> list[Any]:
    """Every segment behind the mappings of a process."""
    frames = [mapping.frames for mapping in memory]
    return [segment for each in frames if isinstance(each, SharedFrames) for segment in each.segments]


def open_segments() -> int:
    """How many descriptors this process has of segments. Others come and go."""
    found = 0
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found += os.readlink(f"/proc/self/fd/{descriptor}").startswith("/dev/shm/")
    return found
