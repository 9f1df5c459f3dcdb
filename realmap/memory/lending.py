"""Lending: a range of a caller's memory, mapped into a server that must not see a byte beside it.

                     first byte          last byte
the caller's   ──┤▒▒▒▒▓▓▓▓│▓▓▓▓▓▓▓▓│▓▓▓▓▓▓▓▓│▓▓▒▒▒▒▒▒├──   ▓ the range   ▒ its neighbours
                      copied    lent     lent  copied
the server's   ──┤0000▓▓▓▓│▓▓▓▓▓▓▓▓│▓▓▓▓▓▓▓▓│▓▓000000├──   one window, congruent modulo the page

A page of which the range covers all bytes is lent: mapped where it is, without a copy. Of any other page, the bytes of
the range are copied into a page of zeros, which is mapped in its place (`_core/edges.c`). When the window is dropped,
and may be written, what was changed is copied back, from the first changed byte to the last.

So an edge is a copy for as long as its window lives: what the caller or another window writes there meanwhile is not
seen, and what is written here is seen by others when it is dropped. Each window has edges of its own; of two that
change the same edge, the one dropped last wins, between the first byte that it has changed and the last. Whole pages
are shared at once, as those of a mirror.

How others use it: a `LentLand` in the place of the `KernelMemory` that a `UserBuffer` is given. `mirror`, `array` and
`access` then make a `LentMapping`, which is a `CrossProcessMapping` in all that can be asked of it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Any, Self

from realmap._core import Lent
from realmap.errors import KernelError, MemoryFault
from realmap.host.translate import frames_error
from realmap.memory.cross_process import CrossProcessMapping
from realmap.memory.frames import Piece, SharedFrames
from realmap.memory.kernel_memory import KernelMemory
from realmap.memory.lands import LENT_LAND
from realmap.memory.mapping import Mapping
from realmap.pages import PAGE_MASK, PAGE_SIZE, align_up, demand
from realmap.rights import MappingAccessRights


class LentMapping(CrossProcessMapping, Lent):
    """A window in LentLand that shows exactly the bytes that it is asked for: whole pages in place, edges as copies."""

    __slots__ = ()

    @classmethod
    def _mirror(cls, parts: list[tuple[Mapping, Any, Any]], kernel: KernelMemory, rights: MappingAccessRights) -> Self:
        """The long way. MemoryFault also: a segment was truncated, so that an edge cannot be copied."""
        ranges = [(mapping, *cls._checked(mapping, offset, length)) for mapping, offset, length in parts]
        pieces: list[Piece] = []
        start = ranges[0][0].phys_offset + ranges[0][1]
        lead = covered = start & PAGE_MASK
        for mapping, offset, length in ranges:
            assert isinstance(mapping.frames, SharedFrames)
            at = mapping.phys_offset + offset
            demand(not pieces or not (at | covered) & PAGE_MASK, "parts that follow each other do so between pages")
            covered += length
            pieces += mapping.frames.pieces(at, length)
        start -= lead
        try:
            return cls._placed(ranges, kernel, pieces, start, lead, start, rights, align_up(covered))
        except KernelError:
            for mapping, offset, length in ranges:
                if short := mapping.truncated_at(offset, length):
                    raise short from None
            raise

    def drop(self) -> None:
        """As of a mirror; what was changed at its edges is copied back first.

        MemoryFault also: the segment under an edge was truncated. PhysicalMemoryExhaustion: no memory for a page there
        that was not committed. Everything is given back all the same; of several errors the first is told.
        """
        try:
            super().drop()
        except MemoryFault:
            self._copy_back()  # what it says comes second
            raise
        self.copy_back()

    def copy_back(self) -> None:
        """Copies back now what was changed at its edges, while it lives on. Errors as `drop`, of the edges."""
        lost = self._copy_back()
        if lost is not None:
            error, address = lost
            if error == errno.ENODATA:
                raise self._memory_fault(address)
            raise frames_error(OSError(error, os.strerror(error)), PAGE_SIZE)


class LentLand(KernelMemory):
    """Where this process has what others lend it: the top of its UserLand, where nothing else is mapped.

    Made as a `KernelMemory`; `lazy_unmap` keeps windows of whole pages for their next use. A forked child has none.
    """

    whole = LENT_LAND
    mirror_type = LentMapping

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
