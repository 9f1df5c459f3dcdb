"""What a caller lends, as its server has it: mappings of the caller's UserLand, by descriptors that the kernel granted.

The kernel says what comes and goes (`enter`, `leave`); a `UserBuffer` asks the two questions that it asks a caller's
`ProcessMemory` (`mapping_at`, `parts`). What leaves while a mirror of it lives, or a call works on it, keeps its frames
by their refcount until then; at zero the descriptors are closed.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable
from typing import NamedTuple, SupportsIndex

from realmap.errors import InvalidAddress, InvalidSize
from realmap.host import forks
from realmap.memory.cross_process import Part
from realmap.memory.frames import FrameAllocator
from realmap.memory.lands import USER_LAND
from realmap.memory.mapping import Mapping
from realmap.memory.process_memory import walk
from realmap.pages import address_of
from realmap.rights import MappingAccessRights, MemoryType


class _Table(NamedTuple):
    """Never changed: each change is another table. So any thread, and a signal handler, may look at any moment."""

    starts: list[int]
    mappings: list[Mapping]  # in the same order: by address


class Grants:
    """The mappings of one caller that this process may lend from. Addresses are the caller's, in bytes.

    It may be asked and changed from any thread. A forked child has none of them.
    """

    def __init__(self, owner: str = "", allocator: FrameAllocator | None = None) -> None:
        """`owner` names the caller in words. `allocator`: what is held is charged to it; by default without a limit."""
        self.owner = owner
        self.allocator = allocator if allocator is not None else FrameAllocator()
        self._table = _Table([], [])
        forks.lose_in_child(self)

    def __len__(self) -> int:
        return len(self._table.mappings)

    def enter(
        self,
        address: int,
        length: int,
        kind: MemoryType,
        rights: MappingAccessRights,
        pieces: list[tuple[int, int]],
        descriptors: list[int],
        serial: int,
    ) -> Mapping:
        """A mapping of the caller's, known by `serial` from here on. `pieces`: what it shows of the segment behind each
        descriptor, (offset, length) in bytes. The descriptors are its own from here on, and closed where this fails.

        InvalidAddress, InvalidSize: it overlaps one that has not left, lies outside of UserLand, or the pieces are not
        `length` bytes in whole pages, all but the first from the start of their segment. Else as `Mapping`, and
        `FrameAllocator.receive`.
        """
        frames = self.allocator.receive(descriptors, [offset + size for offset, size in pieces])
        try:
            if not length or sum(size for _, size in pieces) != length:
                raise InvalidSize(length, why=f"these pieces do not make it: {pieces}")
            if any(offset for offset, _ in pieces[1:]):
                raise InvalidAddress(address, why=f"only the first piece may start within its segment: {pieces}")
            if not USER_LAND.holds(address, length):
                raise InvalidAddress(address, why=f"{length} bytes there do not lie in UserLand")
            mapping = Mapping(address, frames, pieces[0][0], length, kind, rights, owner=self.owner)
        except BaseException:
            frames._end()
            raise
        mapping.serial = serial

        def enter(mappings: list[Mapping]) -> None:
            at = bisect_right(mappings, address, key=lambda each: each.address)
            for other in mappings[max(0, at - 1) : at + 1]:
                if other.address < mapping.end and address < other.end:
                    raise InvalidAddress(address, why=f"overlaps {other!r}")
            insort(mappings, mapping, key=lambda each: each.address)

        try:
            self._change(enter)
        except BaseException:
            mapping.release()
            raise
        return mapping

    def leave(self, serial: int) -> None:
        """The caller has unmapped it: no call that comes from here on finds it. One that is not there: nothing."""
        left: list[Mapping] = []

        def leave(mappings: list[Mapping]) -> None:
            left[:] = [each for each in mappings if each.serial == serial]
            mappings[:] = [each for each in mappings if each.serial != serial]

        self._change(leave)
        for mapping in left:
            mapping.release()

    def clear(self) -> None:
        """All of them leave: the caller has ended, or its session."""
        for mapping in self._table.mappings:
            self.leave(mapping.serial)

    def _change(self, change: Callable[[list[Mapping]], None]) -> None:
        while True:
            before = self._table
            mappings = list(before.mappings)
            change(mappings)
            after = _Table([each.address for each in mappings], mappings)
            if (
                self._table is before
            ):  # else another thread, or a signal handler, was first; nothing comes in between here
                self._table = after
                return

    def mapping_at(self, address: int) -> Mapping | None:
        starts, mappings = self._table
        index = bisect_right(starts, address) - 1
        if index < 0 or mappings[index].end <= address:
            return None
        return mappings[index]

    def parts(self, address: SupportsIndex, length: SupportsIndex, most: int | None = None) -> list[Part]:
        """The mappings that [address, address + length) goes through: (mapping, offset in it, length) each, in bytes.

        Errors as `ProcessMemory.parts`, of what was granted.
        """
        return walk(self.mapping_at, address_of(address), length, most)

    def _after_fork_in_child(self) -> None:
        self.allocator.after_fork_in_child()
        self.clear()
