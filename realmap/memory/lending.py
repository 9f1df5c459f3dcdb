"""Lending: a range of a caller's memory, mapped into a server that must not see a byte beside it.

                     first byte          last byte
the caller's   ──┤▒▒▒▒▓▓▓▓│▓▓▓▓▓▓▓▓│▓▓▓▓▓▓▓▓│▓▓▒▒▒▒▒▒├──   ▓ the range   ▒ its neighbours
                      copied    lent     lent  copied
the server's   ──┤0000▓▓▓▓│▓▓▓▓▓▓▓▓│▓▓▓▓▓▓▓▓│▓▓000000├──   one window, congruent modulo the page

A page of which the range covers all bytes is lent: mapped where it is, without a copy. Of any other page, the bytes of
the range are copied into a *scratch page* of ours, which is mapped in its place. When the window is dropped, and may be
written, what was changed there is copied back, from the first changed byte to the last.

So an edge is a copy for as long as its window lives: what the caller or another window writes there meanwhile is not
seen, and what is written here is seen by others when it is dropped. Each window has edges of its own; of two that
change the same edge, the one dropped last wins, between the first byte that it has changed and the last. Whole pages
are shared at once, as those of a mirror.

How others use it: a `LentLand` in the place of the `KernelMemory` that a `UserBuffer` is given. `mirror`, `array` and
`access` then make a `LentMapping`, which is a `CrossProcessMapping` in all that can be asked of it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self, SupportsIndex

from realmap._core import Lock
from realmap.errors import KernelError, KernelPanic, MemoryFault
from realmap.host.translate import frames_error
from realmap.memory.cross_process import CrossProcessMapping, mirror_prot
from realmap.memory.frames import FrameAllocator, Piece, SharedFrames
from realmap.memory.kernel_memory import KernelMemory
from realmap.memory.lands import LENT_LAND
from realmap.memory.mapping import Mapping
from realmap.pages import HUGE_SIZE, PAGE_MASK, PAGE_SIZE, align_down, align_up, demand
from realmap.rights import MappingAccessRights

#: So many scratch pages are made at once. Those of one set are given back to Linux together.
SCRATCH_PAGES = 32
ZEROS = bytes(PAGE_SIZE)


class Stretch(NamedTuple):
    """A part of a range that is lent, in whole pages, or copied, within one page. Offset and length in bytes."""

    offset: int
    length: int
    lent: bool


def plan(offset: int, length: int) -> list[Stretch]:
    """How [offset, offset + length) of frames is shown: at most an edge, whole pages, and an edge, in this order."""
    end = offset + length
    first = min(align_up(offset), end)
    last = max(align_down(end), first)
    cuts = [(offset, first, False), (first, last, True), (last, end, False)]
    return [Stretch(low, high - low, lent) for low, high, lent in cuts if low < high]


class _Scratch(NamedTuple):
    """A set of scratch pages: their frames, and those that are free, by number. They are all zeros."""

    frames: SharedFrames
    free: list[int]


class _Edge:
    """A part of a page that was copied into a scratch page. It holds its frames until that is given back."""

    __slots__ = ("_address", "_before", "_frames", "_lock", "_offset", "_page", "scratch", "writable")

    def __init__(self, land: LentLand, mapping: Mapping, offset: int, length: int) -> None:
        """Copies `length` bytes from `offset` of the mapping's frames on.

        MemoryFault: the segment was truncated. PhysicalMemoryExhaustion: no scratch page can be had.
        """
        self._lock = Lock()  # of its page, which must not be another's while it is copied back
        self._page: list[int] = []  # its number; empty once it is given back
        #: Whether what is changed there is copied back: where its window is there, and may be written.
        self.writable = False
        assert isinstance(mapping.frames, SharedFrames)
        self._offset, self._frames = offset, mapping.frames
        self._address = mapping.address + offset - mapping.phys_offset
        # Also for a window that is only written: what is not written there must come back as it was.
        self._before = self._frames.read(offset, length, self._address)
        self.scratch = land.take_page(self._page)
        try:
            self._frames.hold(self, "edge", self._address)
            os.pwrite(self.scratch.frames._fd, self._before, self._page[0] * PAGE_SIZE + (offset & PAGE_MASK))
        except BaseException as error:
            self.end()
            if isinstance(error, OSError) and not isinstance(error, KernelError):
                raise frames_error(error, PAGE_SIZE) from None
            raise

    def piece(self) -> Piece:
        return self.scratch.frames._fd, self._page[0] * PAGE_SIZE, PAGE_SIZE

    def copy_back(self) -> None:
        """Writes what was changed into the frames, as far as it was not already.

        MemoryFault, PhysicalMemoryExhaustion: it cannot be.
        """
        with self._lock:
            self._write()

    def _write(self) -> None:
        fd = self.scratch.frames._fd
        if not self._page or not self.writable or fd < 0:  # in a forked child: it is the parent's
            return
        at = self._page[0] * PAGE_SIZE + (self._offset & PAGE_MASK)
        before, after = self._before, os.pread(fd, len(self._before), at)
        if after != before and self._page:  # else a signal handler has ended it meanwhile
            changed = int.from_bytes(after, "little") ^ int.from_bytes(before, "little")
            first = ((changed & -changed).bit_length() - 1) // 8
            end = (changed.bit_length() + 7) // 8
            self._frames.write(self._offset + first, memoryview(after)[first:end], self._address + first)
            self._before = after

    def end(self) -> None:
        """Copies back, and gives the page back, zeroed. Again: nothing. Errors as `copy_back`, when it is given back.

        Where a signal handler raised, it is as it was.
        """
        with self._lock:
            try:
                self._write()
            except (KernelError, OSError):
                self._give_back()
                raise
            self._give_back()

    def _give_back(self) -> None:
        self._frames.let_go(self)
        with contextlib.suppress(IndexError):
            page = self._page.pop()
            if self.scratch.frames._fd >= 0:
                os.pwrite(self.scratch.frames._fd, ZEROS, page * PAGE_SIZE)  # where this fails it is not used again
            self.scratch.free.append(page)

    def __del__(self) -> None:
        if self._page:
            with contextlib.suppress(Exception):  # nobody is left to be told
                self.end()


class LentMapping(CrossProcessMapping):
    """A window in LentLand that shows exactly the bytes that it is asked for: whole pages in place, edges as copies."""

    __slots__ = ("_edges",)

    _edges: list[_Edge]

    @classmethod
    def _open(cls, kernel: Any, mapping: Any, offset: Any, length: Any, rights: int, caller: object) -> Self | None:
        """Whole pages are lent as they are mirrored, and kept as those are; None: not this short way."""
        if type(offset) is int and type(length) is int and isinstance(mapping.frames, SharedFrames):
            step = HUGE_SIZE if mapping.frames.huge else PAGE_SIZE  # a mirror of huge frames shows whole huge pages
            if not ((mapping.phys_offset + offset) | length) & (step - 1):
                made = super()._open(kernel, mapping, offset, length, rights, caller)
                if made is not None:
                    made._edges = []
                return made
        return None

    @classmethod
    def _mirror(cls, parts: list[tuple[Mapping, Any, Any]], kernel: KernelMemory, rights: MappingAccessRights) -> Self:
        """The long way: by the plan of each part."""
        if not isinstance(kernel, LentLand):
            raise KernelPanic(f"what is lent is mapped in a LentLand, not in {kernel!r}")
        ranges = [(mapping, *cls._checked(mapping, offset, length)) for mapping, offset, length in parts]
        prot = mirror_prot(rights)
        frames: dict[int, SharedFrames] = {}
        pieces: list[Piece] = []
        edges: list[_Edge] = []
        start = ranges[0][0].phys_offset + ranges[0][1]
        lead = covered = start & PAGE_MASK
        try:
            for mapping, offset, length in ranges:
                assert isinstance(mapping.frames, SharedFrames)
                frames[id(mapping.frames)] = mapping.frames
                at = mapping.phys_offset + offset
                demand(not pieces or not (at | covered) & PAGE_MASK, "parts that follow each other do so between pages")
                covered += length
                for stretch in plan(at, length):
                    if stretch.lent:
                        pieces += mapping.frames.pieces(stretch.offset, stretch.length)
                    else:
                        edge = _Edge(kernel, mapping, stretch.offset, stretch.length)
                        edges.append(edge)
                        pieces.append(edge.piece())
                        frames[id(edge.scratch.frames)] = edge.scratch.frames
            start -= lead
            made = cls._placed(ranges, kernel, tuple(frames.values()), pieces, start, lead, start, prot)
        except BaseException:
            for edge in edges:
                edge.end()
            raise
        made._edges = edges
        for edge in edges:
            edge.writable = bool(prot & mmap.PROT_WRITE)
        return made

    def drop(self) -> None:
        """As of a mirror; then what was changed at its edges is copied back.

        MemoryFault also: the segment under an edge was truncated. PhysicalMemoryExhaustion: no memory for a page there
        that was not committed. Everything is given back all the same; of several errors the first is told.
        """
        first: KernelError | None = None
        try:
            super().drop()
        except MemoryFault as fault:  # it is dropped all the same
            first = fault
        self._at_edges(_Edge.end, first)

    def copy_back(self) -> None:
        """Copies back now what was changed at its edges, while it lives on. Errors as `drop`, of the edges."""
        self._at_edges(_Edge.copy_back)

    def _at_edges(self, do: Callable[[_Edge], None], first: KernelError | None = None) -> None:
        for edge in self._edges:
            try:
                do(edge)
            except KernelError as error:
                first = first or error
            except OSError as error:
                first = first or frames_error(error, PAGE_SIZE)
        if first is not None:
            raise first

    def __del__(self) -> None:
        try:
            if self.alive:
                self.drop()
        except KernelError:  # the call that it was made in has to end in that
            if self._caller is not None:
                self._caller._note_fault(self, self.address)
        except Exception:  # a view in the same cycle of garbage: the edges end with it
            pass


class LentLand(KernelMemory):
    """Where this process has what others lend it: the top of its UserLand, where nothing else is mapped.

    Made as a `KernelMemory`; `lazy_unmap` keeps windows of whole pages for their next use. A forked child has none.
    """

    whole = LENT_LAND
    mirror_type = LentMapping

    def __init__(
        self,
        start: SupportsIndex = LENT_LAND.start,
        length: SupportsIndex = LENT_LAND.length,
        *,
        lazy_unmap: SupportsIndex = 0,
    ) -> None:
        """As `KernelMemory`, inside of LentLand."""
        super().__init__(start, length, lazy_unmap=lazy_unmap)
        self._allocator = FrameAllocator()
        self._scratch: _Scratch | None = None

    def settle(self, buffers: Sequence[Any]) -> None:
        """The call of these `UserBuffer`s is about to be answered: copies back what was changed at the edges of windows
        of them that still live.

        MemoryFault: bytes of a buffer were gone when they were used, or now. PhysicalMemoryExhaustion: as `drop`.
        All of them are settled; the first error is told.
        """
        first: KernelError | None = None
        for buffer in buffers:
            first = first or buffer.fault
        for mirror in self.mirrors() if self.live else ():
            if isinstance(mirror, LentMapping) and mirror._caller in buffers:
                try:
                    mirror.copy_back()
                except KernelError as error:
                    first = first or error
        if first is not None:
            raise first

    def take_page(self, into: list[int]) -> _Scratch:
        """Puts the number of a scratch page `into` a list; the set that it is of.

        PhysicalMemoryExhaustion: no more can be made.
        """
        while True:
            scratch = self._scratch
            try:
                if scratch is not None:
                    into.append(scratch.free.pop())
                    return scratch
            except IndexError:  # that set goes with the last window that uses it
                pass
            frames = self._allocator.allocate(SCRATCH_PAGES * PAGE_SIZE)
            frames.hold(frames, "scratch pages")  # for as long as it is there
            self._scratch = _Scratch(frames, list(range(SCRATCH_PAGES)))

    def _after_fork_in_child(self) -> None:
        self._allocator.after_fork_in_child()
        super()._after_fork_in_child()
