"""What an object that exports its bytes offers beside them: casts and arrays. One for Buffer, mirror and pointer."""

from __future__ import annotations

import math
from typing import Any, SupportsIndex

from realmap.errors import InvalidSize
from realmap.pages import usize


class ByteAccess:
    """`x[i]` is an int, `x[i:j]` is bytes (a copy); assigning a slice of another length is an InvalidSize.

    Each of these raises BufferError once the memory is unmapped, and MemoryFault where bytes of it turn out to be
    gone (somebody truncated the segment). `memoryview(x)` and `numpy.asarray(x)` are views without a copy, and hold
    the memory for as long as they live; where bytes go while they do, they show zeros, and `x.fault` tells.
    """

    __slots__ = ()

    def __buffer__(self, flags: int, /) -> memoryview:  # the C bases implement it; here for Python 3.12's eyes
        raise NotImplementedError

    def cast(self, format: str, shape: list[int] | None = None) -> memoryview:
        """A view of all of it as other numbers than bytes: `memoryview(x).cast(format, shape)`, whose rules it has.

        It holds the memory for as long as it lives. TypeError, ValueError: as there.
        """
        view = memoryview(self)
        return view.cast(format, shape) if shape is not None else view.cast(format)  # type: ignore[call-overload, no-any-return]

    def array(
        self, dtype: Any = "uint8", shape: int | tuple[int, ...] | None = None, *, offset: SupportsIndex = 0
    ) -> Any:
        """A numpy array of these bytes, from byte `offset` on: no copy, and read-only where they are.

        `shape`: by default as many items as fit, in one dimension. It holds the memory for as long as it lives.
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
        wanted = (shape,) if isinstance(shape, int) else tuple(shape)
        size = kind.itemsize * math.prod(wanted)
        if any(number < 0 for number in wanted) or start + size > total:
            raise InvalidSize(size, why=f"offset {start} + {size} bytes is beyond the {total} bytes that are there")
        # Not numpy.ndarray(buffer=…): that holds what is behind a memoryview, without an export of it.
        return numpy.asarray(self)[start : start + size].view(kind).reshape(wanted)

    def __dlpack__(self, **options: Any) -> Any:
        """For numpy.from_dlpack, torch.from_dlpack and the like: the same bytes, without a copy."""
        return self.array().__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        """Main memory (kDLCPU)."""
        return 1, 0
