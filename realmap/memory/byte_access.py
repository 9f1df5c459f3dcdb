"""Indexing as on a bytearray, over whatever exports its bytes: one implementation for Buffer, mirror and pointer."""

from __future__ import annotations

from typing import TYPE_CHECKING, overload

from realmap.errors import AccessDenied, InvalidSize


class ByteAccess:
    """`x[i]` is an int, `x[i:j]` is bytes (a copy); assigning a slice of another length is an InvalidSize.

    Each of these raises BufferError once the memory is unmapped, and MemoryFault where bytes of it turn out to be
    gone (somebody truncated the segment). `memoryview(x)` and `numpy.asarray(x)` are views without a copy, and hold
    the memory for as long as they live; where bytes go while they do, they show zeros, and `x.fault` tells.
    """

    __slots__ = ()

    if TYPE_CHECKING:  # the C bases have them

        @property
        def fault(self) -> int | None: ...
        def _memory_fault(self, address: int, /) -> Exception: ...

    def __buffer__(self, flags: int, /) -> memoryview:  # the C bases implement it; here for Python 3.12's eyes
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> bytes: ...
    def __getitem__(self, index: int | slice) -> int | bytes:
        found: int | bytes
        with memoryview(self) as view:
            part: int | memoryview = view[index]
            if isinstance(part, memoryview):
                with part:
                    found = part.tobytes()
            else:
                found = part
        if self.fault is not None:
            raise self._memory_fault(self.fault)
        return found

    @overload
    def __setitem__(self, index: int, value: int) -> None: ...
    @overload
    def __setitem__(self, index: slice, value: bytes | bytearray | memoryview) -> None: ...
    def __setitem__(self, index: int | slice, value: int | bytes | bytearray | memoryview) -> None:
        with memoryview(self) as view:
            if view.readonly:
                raise AccessDenied(why=f"{self!r} is read-only")
            if not isinstance(index, slice):
                view[index] = value  # type: ignore[assignment]
            else:
                with memoryview(value) as data, view[index] as part:  # type: ignore[arg-type]
                    if data.nbytes != part.nbytes:
                        raise InvalidSize(
                            data.nbytes,
                            why=f"a slice of {part.nbytes} bytes takes {part.nbytes} bytes: memory does not move",
                        )
                    part[:] = data if data.format == "B" and data.ndim == 1 else data.cast("B")
        if self.fault is not None:
            raise self._memory_fault(self.fault)
