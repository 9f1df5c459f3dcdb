"""`SharedMemory`, and the list in one."""

from __future__ import annotations

import contextlib
import errno
import functools
import mmap
import os
import types
from collections.abc import Iterable
from multiprocessing import shared_memory as standard
from typing import Any

from realmap.host import SHM, files
from realmap.shared_memory import lookup, tracker
from realmap.user.buffer import Buffer
from realmap.user.windows import open_segment

#: "1": each block that is made has its name in /dev/shm as well.
VISIBLE = "REALMAP_VISIBLE"


class SharedMemory(standard.SharedMemory):
    """A block of shared memory with a name, made (`create=True`) or attached.

    `name`: without a slash, at most 255 bytes; by default a new one. `size`: bytes, when it is made. `track=False`:
    the block does not end with its maker, whatever way that dies. `readonly`: its `buf` cannot be written. Of one that
    is made: `visible`: it has its name in /dev/shm as well (by default, as $REALMAP_VISIBLE says), and whole pages
    there; `commit=False`: space is taken at first touch only, and a full /dev/shm is a SIGBUS then.

    ValueError: no size above 0 to make, no name to attach, or a NUL in the name. FileExistsError: the name is taken.
    FileNotFoundError: nobody has that name. OSError: no usable name, as one with a slash (EINVAL), or too long
    (ENAMETOOLONG). MemoryError (PhysicalMemoryExhaustion, VirtualMemoryExhaustion): no space. ConnectionError
    (KernelDied): no kernel serves where $REALMAP_KERNEL says, or the process tree's root has ended.

    >>> block = SharedMemory(create=True, size=100)
    >>> block.buf[:3] = b"abc"
    >>> same = SharedMemory(block.name, readonly=True)
    >>> bytes(same.buf[:3]), same.size
    (b'abc', 100)
    >>> block.close(); same.close(); same.unlink()
    """

    #: As in the standard library; a subclass with os.O_CREAT | os.O_RDWR attaches what is there, and else makes it.
    _flags = os.O_RDWR
    _mode = 0o600
    _prepend_leading_slash = True
    _track = True
    _name: str | None = None
    _buf: memoryview | None = None
    _size = 0
    #: What `_buf` shows: `_buffer`, or, where others have put it into /dev/shm, `_map`.
    _is_outside = False
    _buffer: Buffer | None = None
    _map: mmap.mmap | None = None
    #: (number, device, inode) of the descriptor that `_fd` has opened; None: none yet.
    _opened: tuple[int, int, int] | None = None

    def __init__(
        self,
        name: str | None = None,
        create: bool = False,
        size: int = 0,
        *,
        track: bool = True,
        readonly: bool = False,
        visible: bool | None = None,
        commit: bool = True,
    ) -> None:
        if not size >= 0:
            raise ValueError(f"size is a positive number of bytes, not {size}")
        if create:
            self._flags = os.O_CREAT | os.O_EXCL | os.O_RDWR
            if not size:
                raise ValueError("a new block has at least one byte: give its size")
            if readonly:
                raise ValueError("a new block that nobody can write is of no use: attach it read-only")
        if name is None and not self._flags & os.O_EXCL:
            raise ValueError("give the name of the block to attach, or create=True")
        if name is not None:
            lookup.checked(name)
        self._track, self._readonly = track, readonly
        found: Buffer | int | None = None
        if not self._flags & os.O_EXCL:
            assert name is not None
            found = lookup.attach(name, readonly)
            if found is None and (not self._flags & os.O_CREAT or not size):
                raise FileNotFoundError(errno.ENOENT, "no shared memory has this name", name)
        chosen = name
        if found is None:
            seen = os.environ.get(VISIBLE) == "1" if visible is None else visible
            chosen, found = lookup.create(name, size, keep=not track, visible=seen, commit=commit)
        self._name = chosen if name is None or not self._prepend_leading_slash else f"/{name}"
        if isinstance(found, Buffer):
            self._buffer = found
            tracker.conceal(self)
        else:
            self._is_outside, self._fd = True, found
            try:
                self._map = self._new_map(found)
            except BaseException:
                self._fd = -1
                raise
        self._buf = memoryview(self._memory)
        self._size = len(self._buf)

    @property
    def _memory(self) -> Buffer | mmap.mmap:
        memory = self._buffer if self._buffer is not None else self._map
        assert memory is not None
        return memory

    @property
    def buf(self) -> memoryview:
        """Its bytes; None once it was closed. It holds the memory mapped for as long as it, or a view of it, lives."""
        return self._buf  # type: ignore[return-value]  # as typeshed has it: who asks has not closed it

    @property
    def name(self) -> str:
        """By which other processes attach it."""
        name = self._name or ""
        return name[1:] if self._prepend_leading_slash and name.startswith("/") else name

    @property
    def size(self) -> int:
        """Bytes, as they were asked for."""
        return self._size

    def close(self) -> None:
        """Unmaps it here; the block lives on. Again: nothing. BufferError: a view of `buf` lives (nothing is done)."""
        if self._buf is not None:
            self._buf.release()
            self._buf = None
        try:
            if self._map is not None:
                self._map.close()
                self._map = None
            if self._buffer is not None:
                self._buffer._unmap_soon()
                self._buffer = None
        except BufferError:
            self._buf = memoryview(self._memory)
            raise
        self._fd = -1

    def unlink(self) -> None:
        """Ends the name, once for all processes; the memory goes when nobody has it mapped any more.

        FileNotFoundError: nobody has that name any more.
        """
        if self._is_outside:
            os.unlink(f"{SHM}/{lookup.checked(self.name)}")
        elif self._name is not None and not lookup.unlink(self._name):
            raise FileNotFoundError(errno.ENOENT, "no shared memory has this name", self._name)

    def __del__(self) -> None:
        # First of all: what views of it keep from being released goes all the same, with the last of them.
        buf, self._buf, self._buffer, self._map = self._buf, None, None, None
        with contextlib.suppress(BufferError):
            if buf is not None:
                buf.release()
        if self._opened is not None:
            self._fd = -1

    def __reduce__(self) -> tuple[Any, ...]:
        made: Any = functools.partial(self.__class__, readonly=True) if self._readonly else self.__class__
        return made, (self.name, False, self.size)

    def __repr__(self) -> str:
        return f"{self.__class__.__name__}({self.name!r}, size={self.size})"

    # ---- what programs take from within the standard module's ----------------------------------

    @property
    def _fd(self) -> int:
        """A descriptor of the memory, for this object alone: opened when it is first asked for. -1 from `close` on.

        Who closes it says so by setting it to -1, or does not: one that is another's by then is left alone.
        KernelDied: its kernel has ended before.
        """
        if self._opened is None and self._buffer is not None:
            fd = open_segment(self._buffer)
            if self.__dict__.setdefault("_opened", _identified(fd))[0] != fd:  # another thread was quicker
                files.close(fd)
        return self._opened[0] if self._opened is not None else -1

    @_fd.setter
    def _fd(self, fd: int) -> None:
        if fd < 0 and self._opened is None:
            return
        before, self._opened = self._opened, _identified(fd)
        if before is not None and before[0] != fd and before == _identified(before[0]):
            files.close(before[0])

    @property
    def _mmap(self) -> mmap.mmap | None:
        """The same memory as an `mmap.mmap` of its own, made when it is first asked for; None once it is closed.

        KernelDied: its kernel has ended before.
        """
        if self._map is None and self._buffer is not None:
            fd = open_segment(self._buffer)
            try:
                self._map = self._new_map(fd)
            finally:
                files.close(fd)
        return self._map

    @_mmap.setter
    def _mmap(self, value: mmap.mmap | None) -> None:
        self._map = value
        if value is None:  # so it is taken from `close`: views of it live on
            self._buffer = None

    def _new_map(self, fd: int) -> mmap.mmap:
        access = mmap.ACCESS_READ if self._readonly else mmap.ACCESS_DEFAULT
        return mmap.mmap(fd, self._size, access=access)  # 0, where that is not known yet: all there is


class ShareableList(standard.ShareableList[Any]):
    """The standard library's `ShareableList`, in such a block: `shm` is a `SharedMemory` of this module."""

    def __init__(self, sequence: Iterable[Any] | None = None, *, name: str | None = None) -> None:
        # The very code of the interpreter at hand, with our class where it names its own.
        _fill(self, sequence, name=name)


_fill = types.FunctionType(
    standard.ShareableList.__init__.__code__,
    {**vars(standard), "SharedMemory": SharedMemory},
    "__init__",
    standard.ShareableList.__init__.__defaults__,
    standard.ShareableList.__init__.__closure__,
)
_fill.__kwdefaults__ = standard.ShareableList.__init__.__kwdefaults__


def _identified(fd: int) -> tuple[int, int, int]:
    try:
        status = os.fstat(fd)
    except OSError:
        return fd, -1, -1
    return fd, status.st_dev, status.st_ino
