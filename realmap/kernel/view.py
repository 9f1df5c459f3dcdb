"""`ProcessView`: a connected process as handlers see it, from the books; the face of `ForeignProcess`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, SupportsIndex, TypeVar

from realmap.errors import AccessDenied, ProcessKilled
from realmap.kernel.books import Books
from realmap.kernel.processes import UserProcess
from realmap.memory.cross_process import CrossProcessMapping, mirror_parts, mirror_prot
from realmap.memory.foreign import ForeignMapping
from realmap.memory.frames import SharedFrames
from realmap.memory.mapping import Mapping
from realmap.pages import address_of
from realmap.rights import MappingAccessRights, allows, k_r, k_w

T = TypeVar("T")


class AskBooks(Protocol):
    """Has something run where the books are, and gives back what that gives, or raises."""

    def __call__(self, question: Callable[[], T], /) -> T: ...


class ProcessView:
    """The memory that process `pid` has of this kernel. From any thread, also once the loop is lost.

    Everything here is ProcessKilled once it is connected no more. Its mirrors stay good, whatever it does.
    """

    __slots__ = ("_ask", "_books", "pid")

    def __init__(self, pid: int, books: Books, ask: AskBooks) -> None:
        self.pid = pid
        self._books = books
        self._ask = ask

    @property
    def name(self) -> str:
        """What its program is called, in Linux; "" where that cannot be told."""
        try:
            return Path(f"/proc/{self.pid}/comm").read_text(errors="surrogateescape").removesuffix("\n")
        except OSError:
            return ""

    def mappings(self) -> list[ForeignMapping]:
        """Its mappings in the books, in order of address. ProcessKilled: it is connected no more."""

        def look() -> list[ForeignMapping]:
            found = [_told(mapping) for process in self._connected() for mapping in process.memory]
            return sorted(found, key=lambda each: each.address)

        return self._ask(look)

    def mirror(
        self, address: SupportsIndex, length: SupportsIndex, rights: MappingAccessRights = k_r
    ) -> CrossProcessMapping:
        """Maps [address, address + length) of it into KernelLand, also over several mappings without a gap.

        InvalidAddress: outside of UserLand, or nothing is mapped there, or a hole is run into. InvalidSize: no bytes,
        negative, or it overflows. InvalidMemState: memory that is not shared. AccessDenied: the process may not do that
        there itself, or `rights` beyond k_rw; InvalidRights: none at all. VirtualMemoryExhaustion: no space.
        ProcessKilled: it is connected no more. TypeError: no integers.
        """
        asked, start = mirror_prot(rights), address_of(address)

        def make() -> CrossProcessMapping:
            connected = self._connected()  # a pid that has connected twice has two UserLands, side by side
            memory = next((each for each in connected if each.memory.mapping_at(start)), connected[0]).memory
            parts = memory.parts(start, length)
            for mapping, offset, _ in parts:
                if not allows(mapping.rights, asked):
                    why = f"process {self.pid} may not do that with its own memory"
                    raise AccessDenied(rights, mapping.rights, mapping.address + offset, why=why)
            return mirror_parts(parts, kernel=self._books.memory, rights=rights)

        return self._ask(make)

    def copy_in(self, address: SupportsIndex, length: SupportsIndex) -> bytes:
        """A copy of [address, address + length). Errors as `mirror`, and MemoryFault: a segment was truncated."""
        with self.mirror(address, length, k_r) as mirror:
            return bytes(mirror)

    def copy_out(self, address: SupportsIndex, data: bytes | bytearray | memoryview) -> None:
        """Copies `data` to `address` of it. Errors as `copy_in`, of writing."""
        with memoryview(data) as view, view.cast("B") as flat, self.mirror(address, len(flat), k_w) as mirror:
            mirror[:] = flat

    def _connected(self) -> list[UserProcess]:
        found = [process for process in self._books.processes if process.pid == self.pid]
        if not found:
            raise ProcessKilled(self.pid, why=f"process {self.pid} is connected no more")
        return found

    def __repr__(self) -> str:
        return f"<ProcessView of pid {self.pid}>"


def _told(mapping: Mapping) -> ForeignMapping:
    frames, why_not, device, inode = mapping.frames, "", 0, 0
    if isinstance(frames, SharedFrames):
        first = frames.segments[frames.index_of(mapping.phys_offset)]
        device, inode = first.device, first.inode
    else:
        why_not = f"{mapping.type.name} memory has no shared frames"
    place = (mapping.address, mapping.length, mapping.rights, mapping.type.name)
    return ForeignMapping(*place, "", device, inode, mapping.phys_offset, None, why_not)
