"""`Mapping`: a range of a process's addresses, and the frames behind it. Always valid once it exists."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Protocol, SupportsIndex

from realmap._core import Mapping as MappingCore
from realmap.errors import InvalidAddress, InvalidSize, MemoryFault, WrongMappingFramesForType
from realmap.host.signals import pass_on
from realmap.memory.frames import OwnedFrames, SharedFrames
from realmap.pages import PAGE_MASK, PAGE_SIZE, address_of, page_range
from realmap.rights import MappingAccessRights, MemoryState, MemoryType, rights_of, type_of

Frames = SharedFrames | OwnedFrames | None
_serials = itertools.count(1)


class Lasting(Protocol):
    """A handle by which frames are attached as often as anybody likes."""

    #: Until it ends.
    stays: bool


def _frames_for(type_: MemoryType) -> str:
    return "Shared" if type_.is_counted else "Owned" if type_.has_frames else "no"


class Mapping(MappingCore):
    """`length` bytes at `address` that show `frames` from `phys_offset` on. A book entry: it maps nothing itself.

    Invariants: address, phys_offset and length are whole pages; the range does not wrap; frames are
    Shared exactly where the type is reference counted, Owned where it is not, None for UNMAPPED,
    RESERVED and KERNEL_STACK; [phys_offset, phys_offset + length) lies inside the frames.

    It holds one reference to Shared frames from its making until `release`, or until collection.
    A syscall that works on it pins it: a release meanwhile takes effect when the last pin goes.
    """

    __slots__ = ("__weakref__", "handle", "type")

    if TYPE_CHECKING:  # the core knows neither

        @property
        def frames(self) -> Frames: ...
        @property
        def rights(self) -> MappingAccessRights: ...

    def __init__(
        self,
        address: SupportsIndex,
        frames: Frames,
        offset: SupportsIndex,
        length: SupportsIndex,
        type: MemoryType,
        rights: MappingAccessRights,
        *,
        owner: str = "",
    ) -> None:
        """Address, offset and length in bytes; `owner` says whose mapping it is, in words.

        InvalidAddress: address or offset is unaligned, the range overflows, or the offset is beyond
        the frames. InvalidSize: the length is zero, unaligned, or longer than the frames from the
        offset on. WrongMappingFramesForType: the type takes other frames. InvalidRights, TypeError:
        as `rights_of`. InvalidHandle: the frames are gone.
        """
        start, size = page_range(address, length)
        phys_offset = address_of(offset, "offset")
        if phys_offset & PAGE_MASK:
            raise InvalidAddress(phys_offset, why=f"offset is no multiple of the page size ({PAGE_SIZE})")
        self.type = type_of(type)
        rights = rights_of(rights)
        self.serial = next(_serials)
        #: By which it was attached, and may be attached again.
        self.handle: Lasting | None = None
        kind = "Shared" if isinstance(frames, SharedFrames) else "Owned" if isinstance(frames, OwnedFrames) else "no"
        if kind == "no" and frames is not None:
            raise TypeError(f"frames must be SharedFrames, OwnedFrames or None, not {frames!r}")
        if kind != _frames_for(self.type):
            raise WrongMappingFramesForType(
                self.type, kind, why=f"a mapping of type {self.type.name} takes {_frames_for(self.type)} frames"
            )
        if frames is not None:
            if phys_offset > frames.length:
                raise InvalidAddress(phys_offset, why=f"offset lies beyond the frames ({frames.length} bytes)")
            if size > frames.length - phys_offset:
                raise InvalidSize(
                    size, why=f"the frames have only {frames.length - phys_offset} bytes from the offset on"
                )
        self._set(start, frames, phys_offset, size, rights, ("mapping", start, owner))

    @property
    def owner(self) -> str:
        """Whose it is, in words."""
        return self._who[2]

    @property
    def offset(self) -> int:
        """The same as `phys_offset`: where in the frames the mapping starts, in bytes."""
        return self.phys_offset

    @property
    def end(self) -> int:
        """The first address behind it; 2**64 where it ends at the last byte of the address space."""
        return self.address + self.length

    @property
    def state(self) -> MemoryState:
        """The type, and what follows from it."""
        return self.type.state

    def truncated_at(self, offset: int, length: int) -> MemoryFault | None:
        """The fault at the first byte of [offset, offset + length) whose segment is too short by now; None: all there.

        The caller has checked the range.
        """
        frames = self.frames
        if not isinstance(frames, SharedFrames) or frames.freed:
            return None
        try:
            at = frames.truncated_at(self.phys_offset + offset, length)
        except (OSError, IndexError) as error:  # another thread gave up the last reference: nobody can look any more
            if isinstance(error, OSError):
                pass_on(error)
            return None
        if at is None:
            return None
        return MemoryFault(self.address + at - self.phys_offset, why="the segment under it was truncated")

    def __repr__(self) -> str:
        state = ", released" if self.released else ""
        return f"<Mapping [{self.address:#x}, {self.end:#x}) {self.type.name} {self.rights}{state}>"
