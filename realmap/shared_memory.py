"""Shared memory by name, as in the standard library: change the import, keep the program.

    from realmap.shared_memory import SharedMemory      # was: from multiprocessing.shared_memory import …

A drop-in for `multiprocessing.shared_memory` (https://docs.python.org/3/library/multiprocessing.shared_memory.html)
without its tracker: names are names of this process tree's kernel, which is booted when the first one is made. Other
programs of the same user find them as well.

* A reader's exit, or its crash, never takes the memory from those who still use it; there are no warnings at exit.
* A name ends with `unlink()`, or when the process tree does: with the process that was the first to import this
  module (a worker of multiprocessing counts its parent). Memory lives while anybody has it mapped.
* In a kernel that outlives the tree ($REALMAP_KERNEL), a maker that is killed takes its names along, as soon as no
  process lives that has attached them; one that ends in good order, or with `track=False`, does not.
* Where the kernel itself is killed, what is mapped stays, names are gone, and the next use boots another one.
* Space is taken at once: a full /dev/shm is a PhysicalMemoryExhaustion (a MemoryError), not a SIGBUS later.
* The size asked for is the size got. `readonly=True` attaches what cannot be written, by page protection.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import secrets
import time
import types
from collections.abc import Callable, Iterable
from multiprocessing import shared_memory as standard
from multiprocessing import util
from typing import Any, TypeVar

from realmap import ambient
from realmap.errors import AccessDenied, InvalidHandle, KernelDied, SyscallTimeout, VersionMismatch
from realmap.host import runtime
from realmap.host.signals import Living
from realmap.rights import u_r
from realmap.user import names, travel
from realmap.user.buffer import Buffer
from realmap.user.process import Process

__all__ = ["ShareableList", "SharedMemory"]

#: The longest name, in bytes (NAME_MAX of limits.h, as for the standard library's names).
LONGEST_NAME = 255
#: How long another kernel of this user may take to let us in and look for a name, in seconds.
PATIENCE = 2.0
# Under the names that the standard library's own tests know.
_USE_POSIX = True
_SHM_NAME_PREFIX = "psm_"

#: How long a kernel that did not answer is not asked again, in seconds; and those, with the end of that.
SILENCE = 60.0
_silent: dict[str, float] = {}
T = TypeVar("T")

#: The connections by which this process gave names.
_makers: Living[Process] = Living()

ambient.plant()


class SharedMemory:
    """A block of shared memory with a name, made (`create=True`) or attached.

    `name`: without a slash, at most 255 bytes; by default a new one. `size`: bytes, when it is made. `track=False`:
    the block does not end with its maker, whatever way that dies. `readonly`: its `buf` cannot be written.

    ValueError: no size above 0 to make, no name to attach, or a NUL in the name. FileExistsError: the name is taken.
    FileNotFoundError: nobody has that name. OSError: no name at all, one with a slash (EINVAL), or too long
    (ENAMETOOLONG). MemoryError (PhysicalMemoryExhaustion, VirtualMemoryExhaustion): no space. ConnectionError
    (KernelDied): the kernel of the process tree has ended.

    >>> block = SharedMemory(create=True, size=100)
    >>> block.buf[:3] = b"abc"
    >>> same = SharedMemory(block.name, readonly=True)
    >>> bytes(same.buf[:3]), same.size
    (b'abc', 100)
    >>> block.close(); same.close(); same.unlink()
    """

    #: As in the standard library; a subclass with os.O_CREAT | os.O_RDWR attaches what is there, and else makes it.
    _flags = os.O_RDWR
    _name: str | None = None
    _buf: memoryview | None = None
    _buffer: Buffer | None = None
    _size = 0

    def __init__(
        self,
        name: str | None = None,
        create: bool = False,
        size: int = 0,
        *,
        track: bool = True,
        readonly: bool = False,
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
            _checked(name)
        self._readonly = readonly
        buffer = None
        if not self._flags & os.O_EXCL:
            assert name is not None
            buffer = _attach(name, readonly)
            if buffer is None and (not self._flags & os.O_CREAT or not size):
                raise FileNotFoundError(errno.ENOENT, "no shared memory has this name", name)
        if buffer is None:
            name, buffer = _create(name, size, keep=not track)
        self._name, self._buffer, self._size = name, buffer, len(buffer)
        self._buf = memoryview(buffer)

    @property
    def buf(self) -> memoryview:
        """Its bytes; None once it was closed. It holds the memory mapped for as long as it, or a view of it, lives."""
        return self._buf  # type: ignore[return-value]  # as typeshed has it: who asks has not closed it

    @property
    def name(self) -> str:
        """By which other processes attach it."""
        return self._name or ""

    @property
    def size(self) -> int:
        """Bytes, as they were asked for."""
        return self._size

    def close(self) -> None:
        """Unmaps it here; the block lives on. Again: nothing. BufferError: a view of `buf` lives (nothing is done)."""
        if self._buf is not None:
            self._buf.release()
            self._buf = None
        if self._buffer is not None:
            try:
                self._buffer.unmap()
            except BufferError:
                self._buf = memoryview(self._buffer)
                raise
            self._buffer = None

    def unlink(self) -> None:
        """Ends the name, once for all processes; the memory goes when nobody has it mapped any more.

        FileNotFoundError: nobody has that name any more.
        """
        if self._name is not None:
            name = _checked(self._name)

            def unlink(process: Process, timeout: float | None) -> bool:
                names.unlink(process, name, timeout=timeout)
                return True

            if not _look(unlink):
                raise FileNotFoundError(errno.ENOENT, "no shared memory has this name", self._name)

    def __del__(self) -> None:
        # First of all: what views of it keep from being released goes all the same, with the last of them.
        buf, self._buf, self._buffer = self._buf, None, None
        with contextlib.suppress(BufferError):
            if buf is not None:
                buf.release()

    def __reduce__(self) -> tuple[Any, ...]:
        made: Any = functools.partial(self.__class__, readonly=True) if self._readonly else self.__class__
        return made, (self.name, False, self.size)

    def __repr__(self) -> str:
        return f"{self.__class__.__name__}({self.name!r}, size={self.size})"


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


# ---- names, of this kernel and of others ------------------------------------------------------


def _checked(name: str) -> str:
    """The name, as it is known to kernels: without slashes before it, as Linux's names are."""
    if not isinstance(name, str):
        raise TypeError(f"a name is a str, not {type(name).__name__}")
    if "\0" in name:
        raise ValueError("embedded null character in the name of a block")
    bare = name.lstrip("/")
    if not bare or "/" in bare:
        raise OSError(errno.EINVAL, "the name of a block has at least one character, and no slash", name)
    if len(os.fsencode(bare)) > LONGEST_NAME:
        raise OSError(errno.ENAMETOOLONG, f"the name of a block has at most {LONGEST_NAME} bytes", name)
    return bare


def _make_filename() -> str:
    return _SHM_NAME_PREFIX + secrets.token_hex(4)


def _create(name: str | None, size: int, *, keep: bool) -> tuple[str, Buffer]:
    """A new block, with a name that nobody has."""
    if name is not None and _attach(name, True) is not None:
        raise FileExistsError(errno.EEXIST, "shared memory of this name exists", name)
    process = ambient.process()
    buffer = process.map(size)
    keep = keep or ambient.is_of_the_tree(process.path)  # it ends soon enough
    while True:
        chosen = _make_filename() if name is None else name
        try:
            names.publish(process, buffer, _checked(chosen), keep=keep)
            _makers.add(process)
            return chosen, buffer
        except InvalidHandle:
            if name is not None:
                raise FileExistsError(errno.EEXIST, "shared memory of this name exists", name) from None


def _attach(name: str, readonly: bool) -> Buffer | None:
    """The block of that name, or None."""
    bare, rights = _checked(name), u_r if readonly else None
    return _look(lambda process, timeout: names.attach(process, bare, rights, timeout=timeout))


def _look(ask: Callable[[Process, float | None], T]) -> T | None:
    """What a kernel answers that has the name: the ambient one, or else another of this user's; None: none has it."""
    mine = ambient.running()
    if mine is not None:
        with contextlib.suppress(InvalidHandle, KernelDied):
            return ask(travel.own_process_of(mine), None)
    for path in runtime.sockets():
        if path != mine and _silent.get(path, 0.0) < time.monotonic():
            with contextlib.suppress(InvalidHandle, KernelDied):
                return _ask_another(path, ask)
    return None


def _ask_another(path: str, ask: Callable[[Process, float | None], T]) -> T:
    """InvalidHandle, KernelDied: it has no such name, or does not answer, or not to us."""
    process = travel.made(path)
    known = process is not None
    try:
        if process is None:
            process = Process(path, timeout=PATIENCE)
        found = ask(process, PATIENCE)
        travel.keep(process)
        known = True
        return found
    except (SyscallTimeout, VersionMismatch, AccessDenied) as error:
        _silent[path] = time.monotonic() + SILENCE
        raise InvalidHandle(path, why=str(error)) from None
    finally:
        if process is not None and not known:
            process.close()


# ---- the end in good order ----------------------------------------------------------------------


def _leave() -> None:
    for process in _makers.all():
        if not process.is_lost:
            names.leave(process)


def _leave_at_exit(_: object = None) -> None:
    # Run at exit like an atexit function, and in multiprocessing's children, which run none of those.
    util.Finalize(None, _leave, exitpriority=0)


_leave_at_exit()
util.register_after_fork(_leave_at_exit, _leave_at_exit)
os.register_at_fork(after_in_child=_leave_at_exit)
