"""`Buffer`: bytes in this process's UserLand, with frames that the kernel can mirror."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn, Self, SupportsIndex

from realmap._core import ANSWERED, View, Window
from realmap.errors import InvalidAddress, InvalidSize, unmapped
from realmap.host import translate
from realmap.memory import views
from realmap.memory.byte_access import ByteAccess
from realmap.pages import usize
from realmap.rights import MappingAccessRights, allows, k_w
from realmap.user import shown, travel
from realmap.user.handle import new_handle
from realmap.wire import messages

if TYPE_CHECKING:
    from realmap.user.process import Process


class UserWindow(Window):
    """The whole mapping that a buffer and its slices are parts of. When it is unmapped the kernel is told, in the same
    call of the C core, whoever does that: `unmap`, the end of its process, the collector."""

    __slots__ = ("__weakref__", "huge", "lent_to", "process", "recycles", "rights")

    process: Process
    rights: MappingAccessRights
    #: Bytes of its frames that huge pages back.
    huge: int
    #: What it can be used for again; 0: nothing, it is not parked.
    recycles: int
    #: The sessions whose servers may map it.
    lent_to: tuple[int, ...]

    def unmap(self) -> None:
        """Unmaps it, and waits until the kernel has given back its frames, or keeps them. BufferError: a view lives.

        Where the kernel is gone, that is all.
        """
        process = self.process
        client = process._client
        if client.lost_in_child:  # a forked child that has not connected yet: its copy is its own affair
            self._unmap()
            return
        number = client.next_id()
        if self.recycles and (parked := client.endpoint.park(self, number, self.recycles)):
            if parked is not True and parked.outcome == ANSWERED:
                client.value(parked)
            return
        answer = client.endpoint.unmap(self, number, process._farewell(self._base, self._span, number))
        if isinstance(answer, int):
            raise translate.window_error(OSError(answer, os.strerror(answer)), self._base, self._span, self._prot)
        if answer is not None and answer.outcome == ANSWERED:
            client.value(answer)


class Buffer(View, ByteAccess):
    """`len()` bytes at `address`, mapped in this process, shared with nobody until they are passed to a syscall.

    Works as a bytearray does (`b[3]`, `b[3:7] = b"four"`, `b == b"text"`, `b"ex" in b`), and exports its
    bytes (`memoryview(b)`, `numpy.asarray(b)`). The frames behind it are whole pages; the length is as it was asked
    for. It is unmapped by `unmap()`, at the end of a `with` block, when its process closes, or when it and
    all its slices and views are collected. Once unmapped, every use raises BufferError. Where somebody
    truncates its segment, what is gone reads as zeros, and every use says so from then on: MemoryFault.

    >>> import realmap
    >>> with realmap.boot() as kernel, kernel.connect() as me:
    ...     buffer = me.map(10_000)
    ...     buffer[5:8] = b"abc"
    ...     len(buffer), buffer[6], buffer.slice(5, 3)[:], buffer.refcount
    (10000, 98, b'abc', 1)
    >>> buffer[6]  # unmapped with its process
    Traceback (most recent call last):
    BufferError: it is unmapped: its bytes are no longer there
    """

    __slots__ = {
        "__weakref__": None,
        "process": "The `Process` that has it mapped, and may share it. Where it came by a pickle, that may be another "
        "one than this program has made itself.",
        "rights": "What this process may do with it.",
    }

    process: Process
    rights: MappingAccessRights

    @property
    def _window(self) -> UserWindow:
        window = self._windows[0]
        assert isinstance(window, UserWindow)
        return window

    @property
    def refcount(self) -> int:
        """How many mappings, mirrors and handles hold its frames now, this one included. 0 for private memory.

        InvalidAddress: it is unmapped. KernelDied, ProcessKilled: no kernel.
        """
        self.check()
        return self.process.query(self.address).refcount

    @property
    def huge(self) -> int:
        """How many bytes of the whole mapping huge pages back: what `map(huge=True)` got; 0 where it got none."""
        return self._window.huge

    def slice(self, offset: SupportsIndex, length: SupportsIndex) -> Buffer:
        """A buffer of `length` bytes from byte `offset` on, on the same mapping: no copy.

        InvalidSize: it has no bytes, is negative, or reaches beyond this buffer. TypeError: no integers.
        InvalidAddress: the buffer is unmapped.
        """
        start, size = usize(offset, "offset"), usize(length, "length")
        if not size or start + size > len(self):
            raise InvalidSize(size, why=f"offset {start} + length {size} is no part of a buffer of {len(self)} bytes")
        if not self.alive:
            raise unmapped(self.address)
        return part_of(self._window, self.address + start, size)

    def check(self) -> None:
        """InvalidAddress: it is unmapped. MemoryFault: bytes of it are gone."""
        if not self.alive:
            raise unmapped(self.address)
        if self.fault is not None:
            raise self._memory_fault(self.fault)

    def unmap(self) -> None:
        """Unmaps the whole mapping, also under its slices, and gives back its frames. Again: nothing.

        Small ones that nobody else ever had may be kept for the next `map` of their kind (`Limits.stock`).

        BufferError: a memoryview, a numpy array or the like of it still lives, or a lock in it is held or waited for
        (nothing is unmapped).
        VirtualMemoryExhaustion: at Linux's limit of mappings (nothing is unmapped).
        A syscall that is at work on it keeps the frames until its handler ends.
        """
        try:
            self._window.unmap()
        except BufferError as error:
            raise views.named(error, self) from None

    def _unmap_soon(self) -> None:
        """`unmap`, but nobody waits for the kernel, which gives back its frames later. OSError: as munmap(2)."""
        window = self._window
        try:
            if not window.recycles or not self.process._client.endpoint.park(window, None, window.recycles):
                window._unmap()
        except BufferError as error:
            raise views.named(error, self) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # An exception on its way out may hold views in its traceback, and matters more than they do.
        with contextlib.suppress(BufferError) if kind is not None else contextlib.nullcontext():
            self.unmap()

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels as a handle: whoever unpickles it has the same memory, mapped as its own.

        It may be unpickled as often as it was pickled, in any process that can reach the kernel, also after this one
        has ended or unmapped it (within `realmap.user.travel.TRANSIT` seconds). InvalidAddress: it is unmapped. Errors
        as `Process.share`.
        """
        self.check()
        return travel.load, (new_handle(self.process, self, self.rights, 1, None, travel.TRANSIT, more=True),)

    def __copy__(self) -> NoReturn:
        raise TypeError("a Buffer is memory, not a value: bytes(buffer) is a copy, buffer.slice(…) the same memory")

    def __deepcopy__(self, _: object) -> NoReturn:
        self.__copy__()

    def _repr_html_(self) -> str:
        return shown.of_buffer(self)

    def __repr__(self) -> str:
        return f"<Buffer {self.address:#x}, {len(self)} bytes, {self.rights}{'' if self.alive else ', unmapped'}>"


def part_of(window: UserWindow, address: int, length: int) -> Buffer:
    """`length` bytes at `address` of a window."""
    buffer = Buffer._over((window,), address, length, int(allows(window.rights, k_w)))
    buffer.process = window.process
    buffer.rights = window.rights
    return buffer


def require_own(process: Process, buffer: Buffer) -> None:
    """InvalidAddress: it is unmapped, or of another `Process`. MemoryFault: bytes of it are gone."""
    buffer.check()
    if buffer.process is not process:
        why = "the buffer belongs to another Process: buffer.process.call(…), or attach it: "
        raise InvalidAddress(buffer.address, why=f"{why}me.attach(buffer.process.share(buffer))")


def buffers_in(values: Iterable[Any]) -> Iterator[Buffer]:
    """Those among arguments that can travel, in lists and dicts too."""
    for value in values:
        kind = type(value)
        if kind is Buffer:
            yield value
        elif kind is list or kind is tuple:
            yield from buffers_in(value)
        elif kind is dict:
            yield from buffers_in(value.values())


def encode_buffer(process: Process, value: Any) -> Any:
    """How a value that MessagePack does not know travels among the arguments of a call. Errors as `require_own`."""
    if isinstance(value, Buffer):
        require_own(process, value)
        return messages.buffer_ext(value.address, len(value))
    return value.item()  # one of numpy's numbers: `plain.check` let nothing else through
