"""`CrossProcessMapping`: another process's bytes, mapped into KernelLand for a while.

                 mapping.address                 mapping's end
UserLand      ────────┤▒▒▒▒▒▒▒▒▓▓▓▓▓▓▓▓▓▓▒▒▒▒▒▒▒▒▒▒├────────
                      │ offset │  length │
                      ▼        ▼         ▼
frames        ──┤phys_offset … pages that hold a byte of it … ├──
                          │                     │
KernelLand    ────────────┤  ▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓   ├──── one page stays free ────
                          base └ address, len()
"""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING, Any, Self, SupportsIndex

from realmap._core import Mirror
from realmap.errors import (
    AccessDenied,
    InvalidMemState,
    InvalidRights,
    InvalidSize,
    MemoryFault,
    PhysicalMemoryExhaustion,
    gone,
)
from realmap.host import translate
from realmap.host.signals import pass_on
from realmap.memory import views
from realmap.memory.byte_access import ByteAccess
from realmap.memory.frames import Piece, SharedFrames
from realmap.memory.kernel_memory import KernelMemory
from realmap.memory.mapping import Mapping
from realmap.pages import HUGE_SIZE, USIZE_MAX, align_down, align_up, demand, integer
from realmap.rights import MappingAccessRights, MemoryType, k_rw, rights_of

#: The rights that the kernel may have on a mirror, and their PROT_ bits.
_ALLOWED = {value: value for value in (1, 2, 3)}
#: A range of a mapping: (mapping, offset in it, length), in bytes.
Part = tuple[Mapping, int, int]


def mirror_prot(rights: MappingAccessRights) -> int:
    """PROT_ bits for a mirror. AccessDenied: more than k_rw was asked. InvalidRights: nothing was."""
    prot = _ALLOWED.get(rights)
    if prot is None:
        asked = rights_of(rights)
        if not asked & k_rw:
            raise InvalidRights(asked, why="a mirror must be readable or writable: k_r, k_w or k_rw")
        raise AccessDenied(asked, k_rw, why="the kernel reads and writes what it mirrors, nothing more")
    return prot


def refuse(mapping: Mapping, offset: Any, length: Any) -> InvalidSize | InvalidMemState:
    """The first thing wrong with [offset, offset + length) of `mapping`: its frames, no bytes, 64 bits, its end."""
    if not mapping.type.is_counted:
        return InvalidMemState(mapping.address, mapping.type, why=f"{mapping.type.name} memory has no shared frames")
    if mapping.released:
        return InvalidMemState(mapping.address, MemoryType.UNMAPPED, why="the mapping was released")
    size, start = integer(length, "length"), integer(offset, "offset")
    if size == 0:
        return InvalidSize(0, why="a mirror of no bytes")
    if size < 0 or start < 0:
        return InvalidSize(min(size, start), why="offset and length must not be negative")
    if start + size > USIZE_MAX:
        return InvalidSize(size, why=f"offset ({start:#x}) + length overflows 64 bits")
    demand(
        mapping.phys_offset + start <= USIZE_MAX,
        f"phys_offset ({mapping.phys_offset:#x}) + offset ({start:#x}) overflows 64 bits",
    )
    return InvalidSize(size, why=f"offset {start} + length {size} runs past the mapping's {mapping.length} bytes")


class CrossProcessMapping(Mirror, ByteAccess):
    """A mirror: `len()` bytes at `address` in KernelLand that are those of `mapping`, in place.

    Exports its bytes (`memoryview(m)`, `numpy.asarray(m)`, `m[3:7]`). `drop()`, the end of a `with`
    block, or collection unmaps it; while a view of it lives, `drop()` raises BufferError and the
    mirror still works. It shares ownership of the frames: it may outlive the mapping and its
    process, and its bytes stay valid until it is dropped. Once dropped it is dead for good.

    >>> from realmap.memory import CrossProcessMapping, FrameAllocator, KernelMemory, Mapping
    >>> from realmap.memory import MappingAccessRights, MemoryType
    >>> frames = FrameAllocator().allocate(3 * 4096)
    >>> mapping = Mapping(0x2000_0000_1000, frames, 0, 3 * 4096, MemoryType.HEAP, MappingAccessRights(11))
    >>> with CrossProcessMapping.mirror_mapping(mapping, 4090, 20, kernel=KernelMemory()) as mirror:
    ...     mirror[3:8] = b"bytes"
    ...     len(mirror), mirror[:10], frames.refcount
    (20, b'\\x00\\x00\\x00bytes\\x00\\x00', 2)
    >>> frames.refcount
    1
    >>> mapping.release()
    """

    __slots__ = ()

    if TYPE_CHECKING:  # the core knows nothing of mappings

        @property
        def mapping(self) -> Mapping: ...
        @property
        def mappings(self) -> tuple[Mapping, ...]: ...

    @classmethod
    def mirror_mapping(
        cls,
        mapping: Mapping,
        offset: SupportsIndex,
        length: SupportsIndex,
        *,
        kernel: KernelMemory,
        rights: MappingAccessRights = k_rw,
        populate: bool = False,
    ) -> Self:
        """Mirrors `length` bytes from byte `offset` of `mapping` on into `kernel`'s land.

        Whole pages are mapped (of huge frames whole huge pages, as far as the mapping goes); address and
        length are to the byte. `populate`: every page is faulted in at once, which costs less than one
        by one where all of them will be touched. In this order: InvalidMemState
        (the mapping's frames are not Shared), InvalidSize (length is 0; offset + length overflows,
        or something is negative), KernelPanic (phys_offset + offset overflows), InvalidSize (beyond
        the mapping). TypeError: no integers. VirtualMemoryExhaustion: no space in KernelLand, or
        Linux's limit of mappings. AccessDenied: `rights` beyond k_rw; InvalidRights: none at all.
        With `populate` also MemoryFault (a segment was truncated) and PhysicalMemoryExhaustion (no
        memory for a page that was not committed).
        """
        # The good case, with all of these checks; which rule is broken is found out where one is.
        self = cls._open(kernel, mapping, offset, length, rights, None)
        if self is None:
            self = cls._mirror([(mapping, offset, length)], kernel, rights)
        if populate:
            self._prefault()
        return self

    @staticmethod
    def _checked(mapping: Mapping, offset: Any, length: Any) -> tuple[int, int]:
        """The long way of the checks, for integers that are no plain `int` too."""
        if isinstance(mapping.frames, SharedFrames) and mapping._usable:
            size, start = integer(length, "length"), integer(offset, "offset")
            if size > 0 and start >= 0 and start + size <= mapping.length:
                return start, size
        raise refuse(mapping, offset, length)

    @classmethod
    def _mirror(cls, parts: list[tuple[Mapping, Any, Any]], kernel: KernelMemory, rights: MappingAccessRights) -> Self:
        """The long way: of several mappings, in several segments, not in the current hole, or not at all."""
        ranges = [(mapping, *cls._checked(mapping, offset, length)) for mapping, offset, length in parts]
        pieces: list[Piece] = []
        for mapping, offset, length in ranges:
            assert isinstance(mapping.frames, SharedFrames)
            at = mapping.phys_offset + offset
            low, high = align_down(at), align_up(at + length)
            if mapping.frames.huge and len(parts) == 1:  # whole huge pages, as far as the mapping goes
                low = max(align_down(low, HUGE_SIZE), mapping.phys_offset)
                high = min(align_up(high, HUGE_SIZE), mapping.phys_offset + mapping.length)
            if not pieces:
                start, lead = low, at - low
            demand(not pieces or low == at, "only the first part may start within a page")
            pieces += mapping.frames.pieces(low, high - low)
        span = sum(piece[2] for piece in pieces)
        return cls._placed(ranges, kernel, pieces, start, lead, pieces[0][1], rights, span)

    @classmethod
    def _placed(
        cls,
        ranges: list[Part],
        kernel: KernelMemory,
        pieces: list[Piece],
        start: int,
        lead: int,
        residue: int,
        rights: MappingAccessRights,
        span: int,
    ) -> Self:
        """Maps `pieces` side by side where there is space: from `start` of the frames on, `lead` bytes of which are not
        shown. `residue`: what a large one's address is congruent to. `span`: bytes of its whole pages.
        """
        prot = mirror_prot(rights)
        mappings = tuple(mapping for mapping, _, _ in ranges)
        frames = tuple(dict.fromkeys(mapping.frames for mapping in mappings))
        total = sum(length for _, _, length in ranges)

        def make(base: int) -> Any:
            return cls._open_at(kernel, base, mappings, frames, pieces, start, lead, total, prot)

        made: Self = kernel.place(make, span, residue % HUGE_SIZE, prot, len(pieces))
        return made

    def _prefault(self) -> None:
        """Faults in every page. MemoryFault, PhysicalMemoryExhaustion: it is dropped then."""
        try:
            self._populate()
        except OSError as error:
            pass_on(error)
            if error.errno == errno.EINVAL:  # Linux before 5.14 cannot: it is then as without
                return
            short = self._short()
            self.drop()
            if short is not None:
                raise short from None
            raise PhysicalMemoryExhaustion(self._span, why=f"no memory for its pages: {error.strerror}") from None

    @property
    def offset(self) -> int:
        """Where in `mapping` it starts, in bytes."""
        return self._start + self.address - self._base - self.mapping.phys_offset

    @property
    def rights(self) -> MappingAccessRights:
        """What may be done through it: k_r, k_w or k_rw."""
        return rights_of(self._prot)

    def drop(self) -> None:
        """Unmaps it from KernelLand (or keeps the window, under `lazy_unmap`), and gives up its reference
        to the frames. Again: nothing.

        BufferError: a view of it lives (the mirror stays as it is). VirtualMemoryExhaustion: at
        Linux's limit of mappings, where the unmapping would split one (it stays as it is). MemoryFault:
        bytes of it were gone when they were used; it is dropped all the same.
        """
        try:
            faulted = self._end()
        except BufferError as error:
            raise views.named(error, self) from None
        except OSError as error:
            raise translate.window_error(error, self._base, self._span, self._prot) from None
        if faulted and self.fault is not None:
            raise self._memory_fault(self.fault)

    def _memory_fault(self, address: int, /) -> MemoryFault:
        """The fault at `address` of KernelLand, told of the user's address: that is what its owner knows."""
        user = self.mapping.address + self._start - self.mapping.phys_offset + address - self._base
        return MemoryFault(user, why="the segment under it was truncated") if self._short() else gone(user)

    def _short(self) -> MemoryFault | None:
        """Where the segments of its mappings end too early by now; None: they are all there."""
        for mapping in self.mappings:
            fault = mapping.truncated_at(0, mapping.length)
            if fault is not None:
                return fault
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, *_: object) -> None:
        if kind is None:
            self.drop()
            return
        # An exception on its way out may hold views in its traceback, and matters more than they do. That bytes
        # were gone (which a system call says with EFAULT) may be what caused it.
        short = self._short() if isinstance(error, OSError) and error.errno == errno.EFAULT else None
        with contextlib.suppress(BufferError):
            self.drop()
        if short is not None:
            raise short

    def __repr__(self) -> str:
        if not self.alive:
            return f"<{type(self).__name__}, dropped, {len(self)} bytes>"
        return f"<{type(self).__name__} {self.address:#x}, {len(self)} bytes, {self.rights}, of {self.mapping!r}>"


def _type(kernel: KernelMemory) -> type[CrossProcessMapping]:
    return kernel.mirror_type or CrossProcessMapping


def mirror_for(
    caller: object, mapping: Mapping, offset: int, length: int, kernel: KernelMemory, rights: MappingAccessRights
) -> CrossProcessMapping | None:
    """As `mirror_mapping`, where the mapping's own rights allow it. None: they do not, or not this short way.

    `caller._note_fault(mirror, address)` is called where bytes of it were gone by the time that it is dropped.
    """
    made: CrossProcessMapping | None = _type(kernel)._open(kernel, mapping, offset, length, rights, caller)
    return made


def mirror_parts(
    parts: list[Part], *, kernel: KernelMemory, rights: MappingAccessRights = k_rw, populate: bool = False
) -> CrossProcessMapping:
    """One contiguous mirror of ranges that lie side by side in a process: each but the last ends its mapping.

    Errors as `mirror_mapping`; all of it is mirrored, or nothing.
    """
    kind = _type(kernel)
    if len(parts) == 1:
        return kind.mirror_mapping(*parts[0], kernel=kernel, rights=rights, populate=populate)
    mirror = kind._mirror(parts, kernel, rights)
    if populate:
        mirror._prefault()
    return mirror
