"""`UserBuffer`: what a handler gets for a buffer argument. An address and a length, until it is asked for more."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, SupportsIndex
from weakref import ref

from realmap._core import copy_in, faults
from realmap.errors import AccessDenied, InvalidAddress, InvalidMemState, InvalidSize, MemoryFault
from realmap.memory import views
from realmap.memory.cross_process import CrossProcessMapping, Part, mirror_for, mirror_parts
from realmap.memory.frames import SharedFrames
from realmap.memory.kernel_memory import KernelMemory
from realmap.memory.mapping import Mapping
from realmap.memory.userspace_ptr import UserspacePtr, point_at
from realmap.pages import usize
from realmap.rights import MappingAccessRights, allows, k_r, k_rw, k_w, prot_of, rights_of
from realmap.serving.caller import Caller, Copies

#: Faults of mirrors that were kept beyond their call: by thread, with the count of faults when it was noted.
late_faults: dict[int, tuple[int, MemoryFault]] = {}
#: What the arrays of handlers show that lived on at the end of their blocks: as variables, until the handler returns.
shown: dict[UserBuffer, list[ref[Any]]] = {}


class UserBuffer:
    """`len()` bytes at `address` in the UserLand of `process`. Good until its handler ends.

    Nothing is mapped or copied before one of these is called; all check the caller's rights:

    * `mirror()`: its pages in KernelLand, in place
    * `array()`: a numpy array over a mirror
    * `access()`: directly where the buffer is in this very process (case 1), else a mirror
    * `copy_in()`, `copy_out()`: a copy, without mapping; never faults
    """

    __slots__ = ("_kernel", "_length", "_observer", "_parts", "address", "fault", "process")

    process: Caller
    #: What a mirror of it ran into that was dropped since.
    fault: MemoryFault | None
    _parts: list[Part] | None
    _kernel: KernelMemory

    def __init__(
        self,
        process: Caller,
        kernel: KernelMemory,
        observer: Copies | None,
        address: int,
        length: int,
        most: int | None = None,
    ) -> None:
        """Finds the mappings it lies in, at most so many. InvalidAddress: nothing there, or a hole. InvalidSize: no
        bytes. LimitReached: they are more. `observer`: told of its copies.
        """
        self.process = process
        self._kernel = kernel
        self._observer = observer
        self.address = address
        self._length = length
        self.fault = None
        memory = process.memory
        mapping = memory.mapping_at(address)
        if mapping is not None and 0 < length <= mapping.length - (offset := address - mapping.address):
            self._parts = [(mapping, offset, length)]  # in one mapping: the common case
        else:
            self._parts = memory.parts(address, length, most)

    @property
    def has_ended(self) -> bool:
        return self._parts is None

    def _note_fault(self, mirror: CrossProcessMapping, address: int) -> None:
        """A mirror of it is being dropped, and from `address` of KernelLand on its bytes were gone."""
        if self.has_ended:  # it was kept: what is told is the call that is at work on the thread which touched it
            late_faults[mirror._fault_thread] = (faults(), mirror._memory_fault(address))
        elif self.fault is None:
            self.fault = mirror._memory_fault(address)

    def __len__(self) -> int:
        return self._length

    @property
    def mappings(self) -> tuple[Mapping, ...]:
        """The mappings it lies in, in order of address: one, or several without a gap."""
        return tuple(mapping for mapping, _, _ in self._live())

    @property
    def rights(self) -> MappingAccessRights:
        """What the caller may do there: what every mapping of it allows."""
        allowed = 15
        for mapping, _, _ in self._live():
            allowed &= int(mapping.rights)
        return rights_of(allowed)

    def _live(self) -> list[Part]:
        if self._parts is None:
            raise InvalidAddress(self.address, why="its call has ended: a UserBuffer is good until its handler returns")
        return self._parts

    def _range(self, offset: SupportsIndex, length: SupportsIndex | None, rights: int) -> list[Part]:
        """The parts of [offset, offset + length), checked against its length and the caller's `rights`."""
        asked = prot_of(rights) & k_rw
        parts = self._parts
        if parts is None:
            parts = self._live()
        if len(parts) == 1 and not offset and length is None:  # all of it, in one mapping: the common case
            allowed = parts[0][0].rights
            if allows(allowed, asked):
                return parts
            raise AccessDenied(
                rights_of(rights), allowed, self.address, why="the caller may not do that with its own buffer"
            )
        start = usize(offset, "offset")
        size = self._length - start if length is None else usize(length, "length")
        if start > self._length or size > self._length - start:
            raise InvalidSize(size, why=f"offset {start} + length {size} runs past the buffer's {self._length} bytes")
        found = []
        for mapping, at, part in parts:
            inside = min(part - start, size) if start < part else 0
            if inside > 0:
                if not allows(mapping.rights, asked):
                    raise AccessDenied(
                        rights_of(rights),
                        mapping.rights,
                        mapping.address + at + start,
                        why="the caller may not do that with its own buffer",
                    )
                found.append((mapping, at + start, inside))
                size -= inside
            start = max(0, start - part)
        return found

    def mirror(
        self,
        rights: MappingAccessRights = k_rw,
        offset: SupportsIndex = 0,
        length: SupportsIndex | None = None,
        *,
        populate: bool = False,
    ) -> CrossProcessMapping:
        """Maps [offset, offset + length) of it into KernelLand: one contiguous window, also over several mappings.

        AccessDenied: the caller may not do that itself, or `rights` go beyond k_rw. InvalidSize: no
        bytes, or beyond the buffer. InvalidMemState: memory that is not shared. VirtualMemoryExhaustion:
        no space in KernelLand. InvalidAddress: its call has ended. `populate`: every page is faulted in at
        once (cheaper where all of it will be touched); then also MemoryFault, PhysicalMemoryExhaustion.
        Bytes that are gone when they are touched read as zeros, and the call ends in MemoryFault.
        """
        parts = self._parts
        if length is None and not offset and not populate and parts is not None and len(parts) == 1:
            mirror = mirror_for(self, *parts[0], self._kernel, rights)
            if mirror is not None:
                return mirror
        parts = self._range(offset, length, rights)
        if not parts:
            raise InvalidSize(0, why="a mirror of no bytes")
        made = mirror_parts(parts, kernel=self._kernel, rights=rights, populate=populate)
        made._tell(self)
        return made

    @contextmanager
    def array(
        self,
        dtype: Any = "uint8",
        shape: SupportsIndex | Iterable[SupportsIndex] | None = None,
        rights: MappingAccessRights = k_rw,
    ) -> Iterator[Any]:
        """A numpy array over a mirror of it: `with data.array("float64") as values: values += 1`. Errors as `mirror`,
        and `array` of that.

        After the block it is unmapped with the last array that shows it: where the block's is still a variable of
        the handler, that is when it returns. One that lives on then is a BufferError to the caller.
        """
        mirror = self.mirror(rights)
        values = mirror.array(dtype, shape)
        whole = ref(values.base)  # of whatever is made of it, too
        try:
            yield values
        finally:
            del values
            if not mirror.exports:
                mirror.drop()
            elif not self.has_ended:  # `drop` would look for the variable, which takes its time
                shown.setdefault(self, []).append(whole)

    def access(
        self, rights: MappingAccessRights = k_rw, offset: SupportsIndex = 0, length: SupportsIndex | None = None
    ) -> CrossProcessMapping | UserspacePtr:
        """The bytes in place: a `UserspacePtr` where they are in this process, else a mirror. Errors as `mirror`."""
        self._live()
        if self.process.is_here:
            parts = self._range(offset, length, rights)
            if parts and all(isinstance(part[0].frames, SharedFrames) for part in parts):
                mapping, at, _ = parts[0]
                total = sum(part[2] for part in parts)
                try:
                    return point_at([part[0] for part in parts], mapping.address + at, total, rights=rights)
                except InvalidAddress:
                    pass  # its thread has unmapped it meanwhile: the frames are still there for a mirror
        return self.mirror(rights, offset, length)

    def copy_in(self, length: SupportsIndex | None = None, offset: SupportsIndex = 0) -> bytes:
        """A copy of [offset, offset + length) of it, read without mapping.

        AccessDenied: the caller may not read it. InvalidSize: beyond the buffer. InvalidMemState: memory
        that is not shared. MemoryFault: somebody truncated a segment of it. InvalidAddress: its call
        has ended.
        """
        parts, observer = self._parts, self._observer
        if observer is None and length is None and not offset and parts is not None and len(parts) == 1:
            kernel = self._kernel
            copy = copy_in(*parts[0])
            if copy is not None:
                kernel.copies_in += 1
                kernel.bytes_in += self._length
                return copy
        if observer is None:
            return self._copy_in(length, offset)
        began, copied = time.monotonic_ns(), -1
        try:
            copy = self._copy_in(length, offset)
            copied = len(copy)
            return copy
        finally:
            self._tell(observer, began, offset, copied, out=False)

    def _copy_in(self, length: SupportsIndex | None, offset: SupportsIndex) -> bytes:
        parts, kernel = self._range(offset, length, k_r), self._kernel
        copy = b"".join(
            _frames_of(mapping).read(mapping.phys_offset + at, size, mapping.address + at)
            for mapping, at, size in parts
        )
        kernel.copies_in += 1
        kernel.bytes_in += len(copy)
        return copy

    def copy_out(self, data: bytes | bytearray | memoryview, offset: SupportsIndex = 0) -> None:
        """Copies `data` into it from byte `offset` on, without mapping. Errors as `copy_in`, of writing."""
        observer = self._observer
        if observer is None:
            self._copy_out(data, offset)
            return
        began, copied = time.monotonic_ns(), -1
        try:
            copied = self._copy_out(data, offset)
        finally:
            self._tell(observer, began, offset, copied, out=True)

    def _copy_out(self, data: bytes | bytearray | memoryview, offset: SupportsIndex) -> int:
        with memoryview(data) as view, view.cast("B") as flat:
            parts, kernel = self._range(offset, len(flat), k_w), self._kernel
            for mapping, _, _ in parts:
                _frames_of(mapping)
            done = 0
            for mapping, at, size in parts:
                _frames_of(mapping).write(mapping.phys_offset + at, flat[done : done + size], mapping.address + at)
                done += size
        kernel.copies_out += 1
        kernel.bytes_out += done
        return done

    def _tell(self, observer: Copies, began: int, offset: SupportsIndex, copied: int, out: bool) -> None:
        """Of a copy of so many bytes; below 0: it failed."""
        if not self.has_ended:
            at = self.address if copied < 0 else self.address + offset.__index__()
            observer.copied(self.process, at, max(0, copied), began, out, copied < 0)

    def __repr__(self) -> str:
        return f"<UserBuffer {self.address:#x}, {self._length} bytes>"


def parts_of(buffer: UserBuffer) -> list[Part]:
    """The ranges of mappings that it lies in: (mapping, offset, length). Of an ended call: none."""
    return buffer._parts or []


def pin(buffer: UserBuffer) -> None:
    """Keeps its memory until `end`, whatever its process does."""
    for mapping, _, _ in parts_of(buffer):
        mapping.pin()


def end(buffer: UserBuffer, *, pinned: bool) -> None:
    """Its call has ended: it is of no use any more, and holds nothing (a mirror of it that is kept holds it)."""
    parts, buffer._parts = buffer._parts, None
    del buffer.process, buffer._kernel
    if pinned:
        for mapping, _, _ in parts or ():
            mapping.unpin()


def require_gone(buffers: Sequence[UserBuffer], function: Callable[..., Any]) -> None:
    """Once a handler has returned. BufferError: an array that it was lent lives on; where that is, if it is found."""
    for buffer in buffers:
        for whole in shown.pop(buffer, ()):
            if (array := whole()) is not None:
                names = views.in_module(function, array.base.obj)
                where = f" as {', and '.join(names)}" if names else ""
                why = f"an array of the caller's buffer lives on{where} when its handler has returned"
                raise BufferError(f"{why}: keep a copy (`values.copy()`)")


def _frames_of(mapping: Mapping) -> SharedFrames:
    if not isinstance(mapping.frames, SharedFrames):
        raise InvalidMemState(mapping.address, mapping.type, why="it has no shared frames")
    return mapping.frames
