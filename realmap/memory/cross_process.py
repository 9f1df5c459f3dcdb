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
from typing import Any, Self, SupportsIndex

from realmap._host import Window
from realmap.errors import AccessDenied, InvalidMemState, InvalidRights, InvalidSize, VirtualMemoryExhaustion
from realmap.host import translate
from realmap.memory.byte_access import ByteAccess
from realmap.memory.frames import Piece, SharedFrames
from realmap.memory.kernel_memory import KernelMemory
from realmap.memory.mapping import Mapping
from realmap.pages import HUGE_SIZE, PAGE_MASK, USIZE_MAX, demand, integer
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
    """Why [offset, offset + length) of `mapping` cannot be mirrored, in the order of SEED.md's lines 1, 4, 6, 7, 5."""
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


class CrossProcessMapping(Window, ByteAccess):
    """A mirror: `len()` bytes at `address` in KernelLand that are those of `mapping`, in place.

    Exports its bytes (`memoryview(m)`, `numpy.asarray(m)`, `m[3:7]`). `drop()`, the end of a `with`
    block, or collection unmaps it; while a view of it lives, `drop()` raises BufferError and the
    mirror still works. It shares ownership of the frames: it may outlive the mapping and its
    process, and its bytes stay valid until it is dropped. Once dropped it is dead for good.
    """

    __slots__ = ("__weakref__", "_frames", "_kernel", "mapping", "mappings", "offset")

    #: The mapping that its first byte belongs to, and all that it shows, in order.
    mapping: Mapping
    mappings: tuple[Mapping, ...]
    #: Where in `mapping` it starts, in bytes.
    offset: int
    _kernel: KernelMemory
    _frames: SharedFrames | tuple[SharedFrames, ...]

    @classmethod
    def mirror_mapping(
        cls,
        mapping: Mapping,
        offset: SupportsIndex,
        length: SupportsIndex,
        *,
        kernel: KernelMemory,
        rights: MappingAccessRights = k_rw,
    ) -> Self:
        """Mirrors `length` bytes from byte `offset` of `mapping` on into `kernel`'s land.

        Whole pages are mapped; address and length are to the byte. In this order: InvalidMemState
        (the mapping's frames are not Shared), InvalidSize (length is 0; offset + length overflows,
        or something is negative), KernelPanic (phys_offset + offset overflows), InvalidSize (beyond
        the mapping). TypeError: no integers. VirtualMemoryExhaustion: no space in KernelLand, or
        Linux's limit of mappings. AccessDenied: `rights` beyond k_rw; InvalidRights: none at all.
        """
        frames = mapping.frames
        # One test for the good case; which rule is broken is found out where one is.
        if (
            frames.__class__ is not SharedFrames
            or offset.__class__ is not int
            or length.__class__ is not int
            or length <= 0
            or offset < 0
            or offset + length > mapping.length
            or not (mapping._held or mapping._pins)
        ):
            offset, length = cls._checked(mapping, offset, length)
        assert isinstance(frames, SharedFrames)
        prot = _ALLOWED.get(rights) or mirror_prot(rights)
        lead = offset & PAGE_MASK
        span = (lead + length + PAGE_MASK) & ~PAGE_MASK
        start = mapping.phys_offset + offset - lead
        kept = kernel.kept
        if kept is not None:
            found = kept.take(frames, start, span, prot)
            if found is not None:
                window, first = found
                base = window._base
                self = cls._take_over(window, start - first + lead, length)
                return self._begin(mapping, offset, kernel, frames, base)
        fd = frames._fd
        if fd < 0:
            return cls._mirror_pieces((mapping,), offset, frames.pieces(start, span), length, kernel, prot)
        try:
            base = kernel.reserve(span, start)
            try:
                self = cls._map(base, span, prot, fd, start, lead, length, 0)
            except BaseException:
                kernel.forget(base)
                raise
        except (OSError, VirtualMemoryExhaustion):
            return cls._mirror_pieces((mapping,), offset, [(fd, start, span)], length, kernel, prot)
        return self._begin(mapping, offset, kernel, frames, base)

    def _begin(self, mapping: Mapping, offset: int, kernel: KernelMemory, frames: SharedFrames, base: int) -> Self:
        """What a mapped window needs to be a mirror."""
        self.mapping = mapping
        self.mappings = (mapping,)
        self.offset = offset
        self._kernel = kernel
        self._frames = frames
        frames._holders[id(self)] = ("mirror", self.address)
        kernel.adopt(base, self)  # last: who looks at the mirrors sees whole ones only
        return self

    @staticmethod
    def _checked(mapping: Mapping, offset: Any, length: Any) -> tuple[int, int]:
        """The long way of the checks, for integers that are no plain `int` too."""
        if isinstance(mapping.frames, SharedFrames) and (mapping._held or mapping._pins):
            size, start = integer(length, "length"), integer(offset, "offset")
            if size > 0 and start >= 0 and start + size <= mapping.length:
                return start, size
        raise refuse(mapping, offset, length)

    @classmethod
    def mirror_parts(cls, parts: list[Part], *, kernel: KernelMemory, rights: MappingAccessRights = k_rw) -> Self:
        """One contiguous mirror of ranges that lie side by side in a process: each but the last ends its mapping.

        Errors as `mirror_mapping`; all of it is mirrored, or nothing.
        """
        if len(parts) == 1:
            return cls.mirror_mapping(*parts[0], kernel=kernel, rights=rights)
        prot = mirror_prot(rights)
        pieces: list[Piece] = []
        total = 0
        for mapping, offset, length in parts:
            start, size = cls._checked(mapping, offset, length)
            demand(not pieces or not start & PAGE_MASK, "only the first part may start within a page")
            assert isinstance(mapping.frames, SharedFrames)
            inside = start & PAGE_MASK
            span = (inside + size + PAGE_MASK) & ~PAGE_MASK
            pieces += mapping.frames.pieces(mapping.phys_offset + start - inside, span)
            total += size
        return cls._mirror_pieces(tuple(part[0] for part in parts), int(parts[0][1]), pieces, total, kernel, prot)

    @classmethod
    def _mirror_pieces(
        cls,
        mappings: tuple[Mapping, ...],
        offset: int,
        pieces: list[Piece],
        length: int,
        kernel: KernelMemory,
        prot: int,
    ) -> Self:
        span, lead = sum(piece[2] for piece in pieces), offset & PAGE_MASK
        frames = {id(mapping.frames): mapping.frames for mapping in mappings}
        held = tuple(found for found in frames.values() if isinstance(found, SharedFrames))

        def make(base: int) -> Any:
            self = cls._map_pieces(base, prot, pieces, lead, length, 0)
            self.mapping = mappings[0]
            self.mappings = mappings
            self.offset = offset
            self._kernel = kernel
            self._frames = held[0] if len(mappings) == 1 else held
            for found in held:
                found.hold(self, "mirror", self.address)
            return self

        made: Self = kernel.place(make, span, pieces[0][1] % HUGE_SIZE, prot)
        return made

    @property
    def rights(self) -> MappingAccessRights:
        """What may be done through it: k_r, k_w or k_rw."""
        return rights_of(self._prot)

    def drop(self) -> None:
        """Unmaps it from KernelLand (or keeps the window, under `lazy_unmap`), and gives up its reference
        to the frames. Again: nothing.

        BufferError: a view of it lives (the mirror stays as it is). VirtualMemoryExhaustion: at
        Linux's limit of mappings, where the unmapping would split one (it stays as it is).
        """
        frames = self._frames
        kept = self._kernel.kept
        if kept is not None and frames.__class__ is SharedFrames and kept.keep(self, frames):
            frames.let_go(self)
            return
        try:
            self._unmap()
        except OSError as error:
            raise translate.window_error(error, self._base, self._span, self._prot) from None
        # Also where it was unmapped before: an interrupt may have come in between. Both know what is done.
        self._kernel.release(self._base, self)
        if frames.__class__ is SharedFrames:
            frames.let_go(self)
        else:
            self._let_go_all()

    def _let_go_all(self) -> None:
        assert isinstance(self._frames, tuple)
        for frames in self._frames:
            frames.let_go(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # An exception on its way out may hold views in its traceback, and matters more than they do.
        with contextlib.suppress(BufferError) if kind is not None else contextlib.nullcontext():
            self.drop()

    def __del__(self) -> None:
        # No view can live then. At interpreter exit, or where it is half made, anything may be missing.
        with contextlib.suppress(Exception):
            self.drop()

    def __repr__(self) -> str:
        if not self.alive:
            return f"<CrossProcessMapping, dropped, {len(self)} bytes>"
        return f"<CrossProcessMapping {self.address:#x}, {len(self)} bytes, {self.rights}, of {self.mapping!r}>"
