"""Page frames: segments of shared memory in order, under one explicit refcount.

A reference is held by each mapping, each mirror and each outstanding handle; nobody else counts.
At zero the segments are closed, for good. Who holds one can be named (`holders`).

Counting needs no lock: the C core does it (_core/frames.c), each time as a whole. So a reference can be given up from a
destructor, at any moment, in any thread. What is in use of a limit is counted there as well (`Account`): a charge lives
exactly as long as what it was made for.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import SupportsIndex

from realmap._core import Account, Charge
from realmap._core import Frames as FramesCore
from realmap.errors import InvalidSize, MemoryFault, PhysicalMemoryExhaustion
from realmap.host import translate
from realmap.host.segment import Segment, checked_name
from realmap.host.signals import pass_on
from realmap.pages import HUGE_SIZE, PAGE_MASK, PAGE_SIZE, USIZE_MAX, align_up, usize

#: Part of a file: (descriptor, offset in it, length), in bytes.
Piece = tuple[int, int, int]
#: Where the segments of frames begin that have one: the same for all of them, as there may be very many.
ALONE = (0,)


def whole_pages(length: SupportsIndex, what: str) -> int:
    """`length` in bytes, checked: InvalidSize where it is zero, negative, or no multiple of the page size."""
    size = usize(length, what)
    if not size or size & PAGE_MASK:
        raise InvalidSize(size, why=f"{what} must be a multiple of the page size ({PAGE_SIZE}), above 0")
    return size


def in_words(who: Iterable[object]) -> str:
    """A holder of a reference, as it was noted with the frames: addresses in hex."""
    return " ".join(hex(part) if isinstance(part, int) else str(part) for part in who)


class OwnedFrames:
    """A process's private anonymous memory, `length` bytes: in the books, never shared, never mirrored.

    InvalidSize: `length` is not a number of whole pages above 0.
    """

    __slots__ = ("length",)

    def __init__(self, length: SupportsIndex) -> None:
        self.length = whole_pages(length, "length")

    def __repr__(self) -> str:
        return f"<OwnedFrames of {self.length} bytes>"


class SharedFrames(FramesCore):
    """A list of segments in order, and who refers to them. Made by `FrameAllocator.allocate`; or of a file that a
    process has mapped, which is charged to nobody.

    `length` is the sum of the segments, in bytes. Fresh frames have a refcount of 0, and go when
    they are collected without ever having been mapped.
    """

    __slots__ = ("__weakref__", "_charges", "_starts", "length", "recycles", "segments")

    def __init__(self, segments: Sequence[Segment], charge: Charge | None = None) -> None:
        self.segments = tuple(segments)
        #: Whether they are of a kind for a stock, and only the process that they were made for has ever had them.
        self.recycles = False
        self._starts: tuple[int, ...]
        if len(segments) == 1:  # the common case
            (only,) = segments
            self.length, self._starts = only.length, ALONE
            self._set(only.fd, only.huge)
        else:
            self.length = sum(segment.length for segment in segments)
            self._starts = tuple(itertools.accumulate((segment.length for segment in segments[:-1]), initial=0))
            self._set(-1, sum(segment.huge for segment in segments))
        #: What they are charged, as long as they are there.
        self._charges: object = charge

    def holders(self) -> list[str]:
        """Everyone who holds a reference, in words; `who_holds` is what was noted."""
        return [in_words(who) for who in self.who_holds()]

    @property
    def in_use(self) -> int:
        """How many references there are to them, without those of windows that are parked."""
        return sum(who[0] != "stock" for who in self.who_holds())

    def _free(self) -> None:
        """Called by the core when the last reference has gone, once."""
        for segment in self.segments:
            segment.close()
        self._charges = None

    def __del__(self) -> None:
        self._end()  # of those that nobody ever held

    def after_fork_in_child(self) -> None:
        """They are the parent's alone: nobody reads or maps them here any more."""
        self._grew()  # it has no descriptor of its own to show
        for segment in self.segments:
            segment.after_fork_in_child()

    def append(self, more: list[Segment], charge: Charge) -> None:
        """Grows by `more` segments (a heap's brk). What is mapped or mirrored of it stays as it is."""
        self._charges = self._charges, charge
        self.segments = (*self.segments, *more)
        for segment in more:
            self._starts = (*self._starts, self.length)
            self.length += segment.length
        self._grew()

    def index_of(self, offset: int) -> int:
        """Which segment the byte at `offset` is in, counted from 0."""
        return bisect_right(self._starts, offset) - 1

    def pieces(self, offset: int, length: int, most: int = USIZE_MAX) -> list[Piece]:
        """Where [offset, offset + length) lies, as parts of the segments' files: the first `most` of them. The caller
        has checked the range.
        """
        found: list[Piece] = []
        index = self.index_of(offset)
        while length and len(found) < most:
            segment = self.segments[index]
            inside = offset - self._starts[index]
            size = min(length, segment.length - inside)
            found.append((segment.fd, inside, size))
            offset, length, index = offset + size, length - size, index + 1
        return found

    def truncated_at(self, offset: int, length: int) -> int | None:
        """The first byte of [offset, offset + length) whose segment ends before it by now; None: they are all there.
        The page that a segment ends in is there, and shared, to its own end."""
        for fd, at, size in self.pieces(offset, length):
            there = align_up(os.fstat(fd).st_size)
            if there < at + size:
                return offset + max(0, there - at)
            offset += size
        return None

    def read(self, offset: int, length: int, address: int) -> bytes:
        """Copies `length` bytes out, without mapping.

        MemoryFault: a segment was truncated (`address` names the byte), or Linux cannot read it.
        """
        parts: list[bytes] = []
        for fd, at, size in self.pieces(offset, length):
            while size:
                why = "the segment under it was truncated"
                try:
                    data = os.pread(fd, size, at)  # at most 2 GiB a call: Linux cuts longer ones short
                except OSError as error:
                    pass_on(error)
                    data, why = b"", f"it cannot be read: {error.strerror}"
                if not data:
                    raise MemoryFault(address + sum(len(part) for part in parts), why=why)
                parts.append(data)
                at, size = at + len(data), size - len(data)
        return b"".join(parts)

    def write(self, offset: int, data: memoryview, address: int) -> None:
        """Copies `data` in, without mapping. MemoryFault: truncated.

        PhysicalMemoryExhaustion: no space (commit=False).
        """
        done = 0
        for fd, at, size in self.pieces(offset, len(data)):
            end = done + size
            while done < end:
                try:
                    if os.fstat(fd).st_size < at + end - done:
                        raise MemoryFault(address + done, why="the segment under it was truncated")
                    wrote = os.pwrite(fd, data[done:end], at)
                except OSError as error:
                    raise translate.frames_error(error, end - done) from None
                done, at = done + wrote, at + wrote

    def __repr__(self) -> str:
        state = "freed" if self.freed else f"refcount {self.refcount}"
        return f"<SharedFrames {self.serial}: {self.length} bytes in {len(self.segments)} segments, {state}>"


class FrameAllocator(Account):
    """Makes frames, and keeps count of what is in use against a limit.

    `limit` in bytes, None for as much as the machine has; `parent` is charged as well (a process's
    quota under the kernel's). `segments`: how many there may be, each a descriptor. Safe for threads.

    >>> allocator = FrameAllocator(limit=1 << 20)
    >>> frames = allocator.allocate(5 * 4096, fragment=2 * 4096)
    >>> len(frames.segments), frames.refcount, allocator.used
    (3, 0, 20480)
    >>> allocator.allocate(1 << 20)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    realmap.errors.PhysicalMemoryExhaustion: the limit of 1048576 bytes for all (memory_limit) does not allow ...
    >>> del frames
    >>> allocator.used
    0
    """

    def __init__(
        self,
        limit: SupportsIndex | None = None,
        *,
        parent: FrameAllocator | None = None,
        segments: SupportsIndex | None = None,
        reserved: int | None = None,
    ) -> None:
        """`reserved`: the first descriptor that no segment may have; by default that of `parent`.

        InvalidSize: a negative limit. TypeError: no integer.
        """
        self._reserved: int = reserved or (parent._reserved if parent is not None else USIZE_MAX)
        self._limit = None if limit is None else usize(limit, "limit")
        self._segment_limit = USIZE_MAX if segments is None else usize(segments, "segments")
        self._has_parent = parent is not None
        #: Of it and of all that it is charged for: what is open, by a descriptor of it. What has gone is overwritten.
        self._opened: dict[int, weakref.ref[Segment | SharedFrames]] = {} if parent is None else parent._opened
        self._prepare(USIZE_MAX if self._limit is None else self._limit, self._segment_limit, parent)

    @property
    def limit(self) -> int | None:
        """Bytes of frames that there may be; None: as many as the machine has."""
        return self._limit

    def after_fork_in_child(self) -> None:
        for ref in list(self._opened.values()):
            if (found := ref()) is not None:
                found.after_fork_in_child()
        self._opened.clear()

    def _charged(self, length: int, count: int) -> Charge:
        charge = self._charge(length, count)
        if not isinstance(charge, Charge):  # it is the allocator whose limit does not allow it
            raise charge._refusal(length, count)
        return charge

    def _refusal(self, length: int, count: int) -> PhysicalMemoryExhaustion:
        if self._limit is not None and self.used + length > self._limit:
            whose = "each process (process_limit)" if self._has_parent else "all (memory_limit)"
            why = f"the limit of {self._limit} bytes for {whose} does not allow {length} more ({self.used} in use)"
        else:
            why = (
                f"the limit of {self._segment_limit} segments, which take one of the kernel's descriptors each, "
                f"does not allow {count} more ({self.segments} in use); use larger ones"
            )
        return PhysicalMemoryExhaustion(length, why=why)

    def allocate(
        self,
        length: SupportsIndex,
        fragment: SupportsIndex | None = None,
        *,
        name: str | None = None,
        commit: bool = True,
        huge: bool = False,
        cancelled: Callable[[], bool] | None = None,
    ) -> SharedFrames:
        """Frames of `length` bytes of zeros, in segments of `fragment` bytes (None: one segment).

        `name`: other programs can open the segment by it. `commit=False`: space is only taken at
        first touch (and a full /dev/shm is then a SIGBUS). `huge`: in huge pages, as far as Linux has
        any (`SharedFrames.huge` says how many bytes), committed in any case. `cancelled` is asked now and then.

        InvalidSize: `length` or `fragment` is no whole number of pages (with `huge`: of huge pages) above
        0, or a named one is fragmented. InvalidHandle: no usable name, or one that exists.
        PhysicalMemoryExhaustion: the limit, /dev/shm, the machine or the descriptors do not allow it.
        """
        size = whole_pages(length, "length")
        step = size if fragment is None else whole_pages(fragment, "fragment")
        if huge and (size % HUGE_SIZE or step % HUGE_SIZE):
            raise InvalidSize(
                size if size % HUGE_SIZE else step, why=f"huge frames come in multiples of {HUGE_SIZE} bytes"
            )
        if name is not None:
            name = checked_name(name)
            if step < size:
                raise InvalidSize(step, why="a named mapping is one segment: leave out fragment, or name")
        frames = SharedFrames(*self.make_segments(size, step, name, commit, huge, cancelled))
        self._opened[frames.segments[0].fd] = weakref.ref(frames)
        return frames

    def receive(self, descriptors: list[int], lengths: list[int]) -> SharedFrames:
        """Frames of segments that another process made: the first so many bytes of each. The descriptors are theirs
        from here on, and are closed where this fails.

        InvalidSize: they are not as many. PhysicalMemoryExhaustion: the limit does not allow it. OSError: one of them
        is no descriptor.
        """
        made: list[Segment] = []
        try:
            size, count = sum(lengths), len(descriptors)
            if count != len(lengths):
                raise InvalidSize(size, why=f"{len(lengths)} segments, and {count} descriptors of them")
            charge = self._charged(size, count)
            made.extend(map(Segment.received, descriptors, lengths))
            frames = SharedFrames(made, charge)
        except BaseException:
            for segment in made:
                segment.close()
            for fd in descriptors[len(made) :]:
                with contextlib.suppress(OSError):
                    os.close(fd)
            raise
        self._opened.update(dict.fromkeys(descriptors, weakref.ref(frames)))
        return frames

    def make_segments(
        self,
        size: int,
        step: int,
        name: str | None = None,
        commit: bool = True,
        huge: bool = False,
        cancelled: Callable[[], bool] | None = None,
    ) -> tuple[list[Segment], Charge]:
        """Segments of `step` bytes, `size` bytes in all, and the charge for them. All or none; errors as `allocate`."""
        count = -(-size // step)
        charge = self._charged(size, count)
        made: list[Segment] = []
        try:
            for start in range(0, size, step):
                part = min(step, size - start)
                segment = Segment(part, name=name, commit=commit, huge=huge, cancelled=cancelled, opened=self._opened)
                made.append(segment)
                if segment.fd >= self._reserved:
                    why = f"the kernel keeps its descriptors from {self._reserved} on for commands (its reserve)"
                    raise PhysicalMemoryExhaustion(size, why=f"{why}; unmap some, use larger ones, or raise ulimit -n")
        except BaseException:
            for segment in made:
                segment.close()
            del charge  # now, not when whoever is told has done with the traceback
            raise
        return made, charge
