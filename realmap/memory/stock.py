"""`Stock`: what a process has unmapped and may use again: small mappings, whose windows it has parked where they are.

    unmap ──▶ kept ◀──▶ used again, and parked again, without asking; a mapping as any other once it is looked for
               └──────▶ given up, those parked first: the frames are gone, its addresses once they are unmapped

Only frames that one process has ever had are kept; and what it has attached, as long as the handle stays by which that
was done. What is in the stock is in nobody's memory: no call reaches it. What is used again may have a name, which is
looked for here as well, and may outlast its mapping.
Which of the two sides has a window is a word that both see (`Words`; _core/places.c).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import NamedTuple, Protocol

from realmap.errors import InvalidSize
from realmap.memory.frames import SharedFrames
from realmap.memory.mapping import Lasting, Mapping

#: Places for windows, each of which takes one of the kernel's descriptors. As in the C core.
PLACES = 16


class Words(Protocol):
    """What the two sides say to one another of each place."""

    def _say(self, place: int, keeps: bool, /) -> None:
        """The window there is kept, or is to be unmapped."""

    def _see(self, name: bytes = ..., /) -> int:
        """The places whose windows are used again, as bits, and, `PLACES` bits above, those of what has a name; nothing
        is said of them any more. With a `name`: of that one alone.
        """

    def _named(self, place: int, /) -> tuple[bytes, int, bool]:
        """Its name, its length in bytes, and whether it outlives its maker, as its process says."""

    def _reclaim(self, place: int, /) -> bool:
        """Has one unmapped that was kept; False: its process uses it again."""

    def _is_gone(self, place: int, /) -> bool:
        """Whether its process has not unmapped yet what is not kept."""


class Parked:
    """A window that its process has parked, and the frames behind it; None where they are not kept."""

    __slots__ = ("address", "end", "frames", "handle", "inode", "length", "offset", "rights", "serial", "type")

    frames: SharedFrames | None

    def __init__(self, mapping: Mapping) -> None:
        self.address, self.length = mapping.address, mapping.length
        self.end = self.address + self.length
        self.type, self.rights, self.serial = mapping.type, mapping.rights, mapping.serial
        self.frames = None
        #: By which it was attached; None: they are its process's own.
        self.handle = mapping.handle
        frames, self.offset = mapping.frames, mapping.phys_offset
        self.inode = frames.segments[0].inode if isinstance(frames, SharedFrames) else 0


class Name(NamedTuple):
    """What a process calls what it uses again."""

    text: str
    #: Bytes, as they were asked for.
    length: int
    #: Whether it outlives its maker.
    lasts: bool


class Stock:
    """The parked windows of a process: at most `most` bytes of them are kept, 0 for none."""

    def __init__(self, most: int, below: int) -> None:
        """`below`: no descriptor from there on is kept open for it."""
        self.most = most
        self._below = below
        #: None: its process cannot be told, and parks nothing.
        self._words: Words | None = None
        #: The places whose windows are used again, as bits; once.
        self.see: Callable[..., int] = int
        #: By place, those parked first at the beginning. Those that are not kept as well, until they are unmapped.
        self._windows: dict[int, Parked] = {}
        #: How many of them are kept.
        self.count = 0
        #: How many of these have frames of their process's own, and how many bytes these are.
        self.segments = self.bytes = 0

    def join(self, words: Words) -> None:
        """Its process says there what it does."""
        self._words, self.see = words, words._see

    def windows(self) -> list[Parked]:
        if self.count < len(self._windows) and self._words is not None:
            for place, parked in list(self._windows.items()):
                if parked.frames is None and not self._words._is_gone(place):
                    del self._windows[place]
        return list(self._windows.values())

    def require(self, place: int) -> None:
        """InvalidSize: it is no place, or not a free one."""
        if place in self._windows:
            self.windows()
        if self._words is None or place >= PLACES or place in self._windows:
            raise InvalidSize(place, why="there is no such place to park a window in, or one is parked there")

    def enter(self, place: int, mapping: Mapping) -> bool:
        """A mapping that is in no books any more is parked in a free place; whether its frames are kept.

        It is released in any case. Those parked first are given up for it where they are too many.
        """
        frames, length = mapping.frames, mapping.length
        parked = self._windows[place] = Parked(mapping)
        if not isinstance(frames, SharedFrames) or length > self.most or not self._may_keep(parked, frames):
            mapping.release()
            return False
        frames.hold(parked, "stock", mapping.address, mapping.owner)
        mapping.release()  # what was kept of its mirrors goes with it
        if not self._may_keep(parked, frames):  # a call works on it
            frames.let_go(parked)
            return False
        for oldest in list(self._windows):
            if self._kept_bytes() + length <= self.most:
                break
            self._give_up(oldest)
        parked.frames = frames
        self.count += 1
        if parked.handle is None:
            self.segments += 1
            self.bytes += length
        return True

    def _may_keep(self, parked: Parked, frames: SharedFrames) -> bool:
        if parked.handle is not None:
            return parked.handle.stays
        return frames.recycles and frames.refcount == 1 and frames._fd < self._below

    def _kept_bytes(self) -> int:
        return sum(each.length for each in self._windows.values() if each.frames is not None)

    def say(self, place: int) -> None:
        """Tells its process what has become of a window, once all is done that it should find done."""
        assert self._words is not None
        self._words._say(place, self._windows[place].frames is not None)

    def take(self, seen: int) -> list[tuple[Parked, SharedFrames, bool, Name | None]]:
        """What its process uses again, of these places: its frames, held until `let_go` of each, whether it is mapped,
        and its name.
        """
        found = []
        for place, parked in list(self._windows.items()):
            is_mapped, is_named = seen >> place & 1, seen >> place + PLACES & 1 and parked.handle is None
            if parked.frames is not None and (is_mapped or is_named):
                found.append(
                    (parked, parked.frames, bool(is_mapped), self._name_of(place, parked) if is_named else None)
                )
                self._remove(place, parked)
                if not is_mapped:  # its window is to be unmapped yet
                    parked.frames, self._windows[place] = None, parked
        return found

    def _name_of(self, place: int, parked: Parked) -> Name | None:
        """None: what its process has written there is no name."""
        assert self._words is not None
        text, length, lasts = self._words._named(place)
        try:
            return Name(text.decode(), length, lasts) if 0 < length <= parked.length else None
        except UnicodeDecodeError:
            return None

    def _remove(self, place: int, parked: Parked) -> None:
        del self._windows[place]
        self._discount(parked)

    def _discount(self, parked: Parked) -> None:
        self.count -= 1
        if parked.handle is None:
            self.segments -= 1
            self.bytes -= parked.length

    def overlap(self, start: int, end: int) -> int | None:
        """Where a window ends that has a byte of [start, end)."""
        for parked in self.windows() if self._windows else ():
            if parked.address < end and start < parked.end:
                return parked.end
        return None

    def give_up(self) -> bool:
        """Gives all of it up, its pages at once; whether there was anything."""
        return sum(self._give_up(place) for place in list(self._windows)) > 0

    def _give_up(self, place: int) -> bool:
        parked = self._windows[place]
        frames = parked.frames
        if frames is None or self._words is None or not self._words._reclaim(place):
            return False
        if parked.handle is None:
            with contextlib.suppress(OSError):  # its process has the pages mapped until it looks
                os.ftruncate(frames._fd, 0)
        parked.frames = None
        self._discount(parked)
        frames.let_go(parked)
        return True

    def places_of(self, handle: Lasting) -> list[int]:
        """Where what was attached by a handle is kept."""
        return [at for at, each in self._windows.items() if each.handle is handle and each.frames is not None]

    def retire(self, place: int, *, force: bool) -> bool:
        """Nobody uses again what was kept there; False: its process does already, unless that is of no matter."""
        parked = self._windows.get(place)
        if parked is None or parked.frames is None or self._give_up(place):
            return True
        if force:
            self._release(place, parked)
        return force

    def withdraw(self) -> None:
        """Nothing of it is used again from here on, but for what is used already."""
        for place, parked in list(self._windows.items()):
            if parked.frames is not None and self._words is not None and self._words._reclaim(place):
                self._release(place, parked)

    def clear(self) -> None:
        """Its process has unmapped them all, or has ended."""
        self.withdraw()
        for place, parked in list(self._windows.items()):
            self._release(place, parked)
        self._windows.clear()

    def _release(self, place: int, parked: Parked) -> None:
        if parked.frames is not None:
            self._remove(place, parked)
            parked.frames.let_go(parked)
