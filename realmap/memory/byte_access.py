"""What an object that exports its bytes offers beside them: casts and arrays. One for Buffer, mirror and pointer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from operator import index
from typing import Any, Literal, SupportsIndex

from realmap.errors import InvalidSize
from realmap.pages import usize

#: How many bytes are compared, or searched, at a time.
STEP = 64 << 10


class ByteAccess:
    """`x[i]` is an int, `x[i:j]` is bytes (a copy); assigning a slice of another length is an InvalidSize. `x == y`
    compares bytes, `y in x` looks for a byte or a sequence of them.

    Each of these raises BufferError once the memory is unmapped, and MemoryFault where bytes of it turn out to be
    gone (somebody truncated the segment). `memoryview(x)` and `numpy.asarray(x)` are views without a copy, and hold
    the memory for as long as they live; where bytes go while they do, they show zeros, and `x.fault` tells. So do
    `struct.unpack_from("<iq", x, 8)`, and ctypes: `Header.from_buffer(x, 8)` is a structure in place.
    """

    __slots__ = ()

    def __buffer__(self, flags: int, /) -> memoryview:  # the C bases implement it; here for Python 3.12's eyes
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        """Whether `other` has the same bytes. What is unmapped is equal to itself alone."""
        if self is other:
            return True
        try:
            with memoryview(self) as mine, memoryview(other) as shown:  # type: ignore[arg-type]
                if len(mine) != shown.nbytes:
                    return False
                parts = range(0, len(mine), STEP)
                with shown.cast("B") as theirs:  # memory, of a bytearray; two memoryviews are compared by the item
                    return all(bytearray(mine[at : at + STEP]) == theirs[at : at + STEP] for at in parts)
        except (TypeError, BufferError):  # it has no bytes, or none in a row; one of the two is unmapped
            return NotImplemented

    __hash__ = None  # type: ignore[assignment]  # as of a bytearray: what it is equal to changes

    def __contains__(self, item: Any) -> bool:
        """Whether a byte, or a sequence of bytes, is among its own.

        TypeError: it is neither. ValueError: a number that is no byte.
        """
        wanted: int | bytes
        try:
            wanted, length = index(item), 1
        except TypeError:
            wanted = bytes(memoryview(item))
            length = max(1, len(wanted))
        with memoryview(self) as mine:
            return any(wanted in bytes(mine[at : at + STEP + length - 1]) for at in range(0, len(mine), STEP))

    def cast(self, format: str, shape: list[int] | None = None) -> memoryview:
        """A view of all of it as other numbers than bytes: `memoryview(x).cast(format, shape)`, whose rules it has.

        It holds the memory for as long as it lives. TypeError, ValueError: as there.
        """
        view = memoryview(self)
        return view.cast(format, shape) if shape is not None else view.cast(format)  # type: ignore[call-overload, no-any-return]

    def array(
        self,
        dtype: Any = "uint8",
        shape: SupportsIndex | Iterable[SupportsIndex] | None = None,
        *,
        offset: SupportsIndex = 0,
        order: Literal["C", "F"] = "C",
    ) -> Any:
        """A numpy array of these bytes, from byte `offset` on: no copy, and read-only where they are.

        `shape`: by default as many items as fit, in one dimension. `order`: "C", where the last dimension varies
        fastest, or "F", where the first one does. It holds the memory for as long as it lives.
        InvalidSize: it would reach beyond the bytes, or is no whole items. TypeError: numpy does not know the
        dtype, or it holds objects. ImportError: numpy is not installed.
        """
        import numpy

        kind = numpy.dtype(dtype)
        if kind.hasobject or not kind.itemsize:
            raise TypeError(f"memory that processes share holds numbers, neither Python objects nor nothing: {kind}")
        with memoryview(self) as view:  # what is gone is told of here
            start, total = usize(offset, "offset"), len(view)
        if shape is None:
            left = total - start
            if left < 0 or left % kind.itemsize:
                why = f"{left} bytes from offset {start} on are no whole items of {kind.itemsize} bytes"
                raise InvalidSize(total, why=why)
            shape = (left // kind.itemsize,)
        wanted: tuple[int, ...]
        try:
            wanted = (index(shape),)  # type: ignore[arg-type]  # what is no number is several
        except TypeError:
            wanted = tuple(map(index, shape))  # type: ignore[arg-type]
        size = kind.itemsize * math.prod(wanted)
        if any(number < 0 for number in wanted) or start + size > total:
            raise InvalidSize(size, why=f"offset {start} + {size} bytes is beyond the {total} bytes that are there")
        if kind.subdtype is not None:  # items that are arrays themselves
            kind, inner = kind.subdtype
            wanted += inner
        # Not numpy.ndarray(buffer=…): that holds what is behind a memoryview, without an export of it.
        return numpy.asarray(self)[start : start + size].view(kind).reshape(wanted, order=order)

    def __dlpack__(self, **options: Any) -> Any:
        """For numpy.from_dlpack, torch.from_dlpack and the like: the same bytes, without a copy."""
        return self.array().__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        """Main memory (kDLCPU)."""
        return 1, 0
