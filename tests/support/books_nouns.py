"""What `books_model.Model` is made of: processes, their mappings, frames, handles, mirrors, in dicts and ints."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

from realmap.errors import InvalidAddress, InvalidSize, KernelError
from realmap.kernel.processes import UserProcess
from realmap.memory.cross_process import CrossProcessMapping
from realmap.memory.frames import SharedFrames
from realmap.memory.lands import USER_LAND
from realmap.memory.stock import PLACES
from realmap.pages import PAGE_SIZE, USIZE_MAX, align_up
from realmap.rights import MemoryType
from realmap.wire import messages
from realmap.wire.messages import NAMED, RECYCLED

HEAP_START = USER_LAND.end - USER_LAND.length // 4


@dataclass(eq=False)
class Frames:
    """Frames, whose they are, and what was written there: 8 bytes at each of these offsets, zeros elsewhere."""

    size: int
    segments: int
    payer: Person
    name: str | None
    real: weakref.ref[SharedFrames]
    serial: int
    huge: int
    #: An answer that is to come has them.
    coming: bool = False
    #: Whether they are of a kind for the stock, and nobody else ever had them.
    recycles: bool = False
    written: dict[int, bytes] = field(default_factory=dict)


@dataclass(eq=False)
class Place:
    """A mapping; one that is `gone` from the books stays while a call has pinned it."""

    address: int
    length: int
    frames: Frames | None
    start: int
    kind: int
    rights: int
    #: Which one it is: what a forked child knows it by.
    serial: int = 0
    gone: bool = False
    #: When the kernel was asked to keep it, where it is parked: those asked first come first.
    asked: int = 0
    #: By which it was attached, and may be attached again.
    handle: Handle | None = None

    @property
    def end(self) -> int:
        return self.address + self.length


class Words:
    """What a process and the kernel say of each place, without the C core."""

    def __init__(self) -> None:
        self.state = ["free"] * PLACES

    def change(self, place: int, before: str, after: str) -> bool:
        if self.state[place] != before:
            return False
        self.state[place] = after
        return True

    def _say(self, place: int, keeps: bool, /) -> None:
        self.state[place] = "kept" if keeps else "gone"

    def _see(self, name: bytes | None = None, /) -> int:
        """Nothing here has a name."""
        return 0 if name else sum(self.change(place, "used", "free") << place for place in range(PLACES))

    def _reclaim(self, place: int, /) -> bool:
        return self.change(place, "kept", "gone")

    def _is_gone(self, place: int, /) -> bool:
        return self.state[place] == "gone"


@dataclass(eq=False)
class Person:
    """A process, or what it left. `stock`: what it has parked, by place."""

    real: UserProcess
    places: dict[int, Place] = field(default_factory=dict)
    forked: bool = False
    coming: int = 0
    stock: dict[int, Place] = field(default_factory=dict)
    words: Words = field(default_factory=Words)

    def kept(self) -> list[Place]:
        """What of its stock was not given up."""
        return [each for each in self.parked() if each.frames is not None]

    def parked(self) -> list[Place]:
        return sorted(self.stock.values(), key=lambda each: each.asked)

    def give_up(self) -> bool:
        """Whether there was anything."""
        kept = self.kept()
        for place in kept:
            place.frames = None
        return bool(kept)

    def at(self, address: int) -> Place | None:
        return next((each for each in self.places.values() if each.address <= address < each.end), None)

    def is_hole(self, start: int, length: int) -> bool:
        return not any(each.address < start + length and start < each.end for each in self.places.values())

    def is_free(self, start: int, length: int) -> bool:
        stock = any(each.address < start + length and start < each.end for each in self.stock.values())
        return self.is_hole(start, length) and not stock

    def has_room(self, size: int, alignment: int = PAGE_SIZE) -> bool:
        """Whether so many bytes fit anywhere between its mappings."""
        at = USER_LAND.start
        for place in sorted([*self.places.values(), *self.stock.values()], key=lambda each: each.address):
            if align_up(at, alignment) + size <= place.address:
                return True
            at = place.end
        return align_up(at, alignment) + size <= HEAP_START

    def parts(self, address: int, length: int) -> list[Part] | type[KernelError]:
        """Where in its mappings a range lies, or the error that is right."""
        if not USER_LAND.start <= address < USER_LAND.end:
            return InvalidAddress
        if not length or address + length > USIZE_MAX + 1:
            return InvalidSize
        found: list[Part] = []
        while length:
            place = self.at(address)
            if place is None:
                return InvalidAddress
            inside = min(length, place.end - address)
            found.append((place, address - place.address, inside))
            address, length = address + inside, length - inside
        return found


#: (mapping, offset in it, length), in bytes.
Part = tuple[Place, int, int]


@dataclass(eq=False)
class Handle:
    """What is shared under a token or a name."""

    token: str
    frames: Frames
    start: int
    length: int
    kind: int
    rights: int
    maker: Person | None
    keep: float
    uses: int | None
    until: float | None
    holders: set[Person] = field(default_factory=set)

    @property
    def is_named(self) -> bool:
        return self.token.startswith(NAMED)


def recycles(request: messages.Map, size: int) -> bool:
    """Whether it is of a kind that is recycled."""
    special = request.fragment is not None or request.name is not None or request.huge
    return MemoryType(request.kind).is_counted and size <= RECYCLED and not special


@dataclass(eq=False)
class Mirror:
    """A live mirror, of these parts."""

    real: CrossProcessMapping
    parts: list[Part]
    rights: int
