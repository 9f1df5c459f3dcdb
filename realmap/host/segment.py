"""One POSIX shared-memory segment: made, unlinked at once, and only then its space taken.

From the unlink on, the descriptors and mappings keep it alive, and no way of dying can leave it
behind. A death between shm_open and shm_unlink leaves an empty name that says who made it; the
next kernel sweeps it (host/runtime.py).

One that is to have a name of others' choosing is made the same way, but keeps the first name beside it, as a second
link to the same inode: that says for as long as both are there whose it is, and neither can be without the other.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import weakref
from collections.abc import Callable
from typing import Any

import posix_ipc

from realmap._core import collapse
from realmap.errors import InvalidHandle, KernelError, ProcessKilled
from realmap.host import SHM, files, room, runtime
from realmap.host.signals import pass_on
from realmap.host.translate import frames_error
from realmap.pages import PAGE_SIZE, demand

#: How much space is taken in one system call: about 10 ms (0.6 ms a MiB, tools/bench/README.md), then others may go on.
STEP = 16 << 20


def _make(own: str, made: list[posix_ipc.SharedMemory]) -> None:
    """Makes a segment without any space, and notes it in `made`: in one call of C, so that no signal comes in between.

    OSError: it cannot be made.
    """
    make = functools.partial(posix_ipc.SharedMemory, flags=posix_ipc.O_CREX, mode=0o600)
    try:
        made.extend(map(make, ("/" + own,)))
    except posix_ipc.PermissionsError:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None
    except posix_ipc.Error as error:
        raise OSError(errno.ENOENT, str(error)) from None
    except OSError as error:
        pass_on(error)
        # posix_ipc says EMFILE and ENFILE in words only.
        raise OSError(error.errno or errno.EMFILE, error.strerror or str(error)) from None


def checked_name(name: object) -> str:
    """`name` as the name of a segment, without the leading slash that POSIX writes.

    TypeError: no str. InvalidHandle: empty, "." or "..", too long, or with a slash or NUL.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, not {type(name).__name__}")
    bare = name.removeprefix("/")
    if not bare or bare in (".", "..") or "/" in bare or "\0" in bare or len(os.fsencode(bare)) > 254:
        raise InvalidHandle(name, why=f"{name!r} is no name for a segment: 1 to 254 bytes, no slash inside, no NUL")
    if bare.startswith(runtime.SEGMENT_PREFIX):
        raise InvalidHandle(name, why=f"names that start with {runtime.SEGMENT_PREFIX!r} are realmap's own")
    return bare


class Segment:
    """A whole number of pages of shared memory, held open by one descriptor.

    `length` in bytes, `huge` how many of them huge pages back, `fd` the descriptor (read and write),
    `device` and `inode` what /proc/PID/maps shows, `name` what others can open it by, or None.
    """

    __slots__ = ("__weakref__", "_made", "device", "fd", "huge", "inode", "length", "name")

    def __init__(
        self,
        length: int,
        *,
        name: str | None = None,
        commit: bool = True,
        huge: bool = False,
        cancelled: Callable[[], bool] | None = None,
        opened: dict[int, weakref.ref[Any]] | None = None,
    ) -> None:
        """Makes a segment of zeros; with `commit` its space is taken now, in steps.

        `huge`: with huge pages, as far as Linux has any; `self.huge` then says how many bytes. `cancelled`
        is asked between steps. `opened`: it is noted there by its descriptor, as soon as it has one.

        Errors: PhysicalMemoryExhaustion (no space, no descriptors), AccessDenied (/dev/shm is not ours to use),
        InvalidHandle (`name` is taken), ProcessKilled (cancelled). None leaves anything behind.
        """
        if length <= 0 or length % PAGE_SIZE:
            demand(False, f"a segment is whole pages, not {length} bytes")
        self.length = length
        self.name: str | None = None
        self.fd = -1
        self.huge = 0
        made: list[posix_ipc.SharedMemory] = []
        try:
            own = runtime.own_name(name)
            #: Of one with a name: the one that it is made under and keeps beside it, and whose both are to take away.
            self._made = None if name is None else (own, os.getpid())
            try:
                _make(own, made)
                self.fd = made[0].fd
                if opened is not None:
                    opened[self.fd] = weakref.ref(self)
                status = os.fstat(self.fd)
                self.device, self.inode = status.st_dev, status.st_ino
                if status.st_mode & 0o600 != 0o600:  # by the umask: nobody could open it anew
                    os.fchmod(self.fd, 0o600)
                if name is not None:
                    self._take_name(own, name)
            finally:
                if made and self.name is None:  # in no function, at whose beginning an exception could come
                    try:
                        posix_ipc.unlink_shared_memory("/" + own)
                    except (posix_ipc.Error, OSError) as error:
                        if isinstance(error, OSError):
                            pass_on(error)
                        # What was short for a moment may be there again. Else a kernel sweeps it after our end.
                        os.unlink(f"{SHM}/{own}")
            self._take_space(commit or huge, cancelled)
            if huge:
                self.huge = collapse(self.fd, self.length)
        except BaseException as error:
            if made:
                self.fd = made[0].fd
            self.close()
            if isinstance(error, OSError) and not isinstance(error, KernelError):
                raise frames_error(error, length) from None
            raise

    @classmethod
    def received(cls, fd: int, length: int) -> Segment:
        """The first `length` bytes of a segment that another process made. `fd` is its own from here on.

        OSError: `fd` is no descriptor.
        """
        self = cls.__new__(cls)
        status = os.fstat(fd)
        self.device, self.inode = status.st_dev, status.st_ino
        self.length, self.huge, self.name = length, 0, None
        self.fd = fd
        return self

    def _take_name(self, own: str, name: str) -> None:
        self.name = name  # from here on `close` takes it away, if it is there
        try:
            os.link(f"{SHM}/{own}", f"{SHM}/{name}")
        except FileExistsError:
            self.name = None
            raise InvalidHandle(name, why=f"a segment named {name!r} exists already") from None

    def _take_space(self, commit: bool, cancelled: Callable[[], bool] | None) -> None:
        if not commit:
            if self.length >> 63:  # more than Linux can say of a file
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.ftruncate(self.fd, self.length)
            return
        room.require(self.length)
        if self.length <= STEP:
            os.posix_fallocate(self.fd, 0, self.length)
            return
        for start in range(0, self.length, STEP):
            if start:
                room.require(self.length - start)  # others may have taken what was free
                if cancelled is not None and cancelled():
                    raise ProcessKilled(None, why="the process that asked for this memory has ended")
            # Not ftruncate: on a full /dev/shm this says ENOSPC here, instead of SIGBUS at first touch.
            os.posix_fallocate(self.fd, start, min(STEP, self.length - start))

    def open_anew(self, *, writable: bool) -> int:
        """A descriptor with an open file description of its own; the caller's to close. One that is not `writable`
        cannot be mapped so either.

        PhysicalMemoryExhaustion: none left.
        """
        try:
            return os.open(f"/proc/self/fd/{self.fd}", (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        except OSError as error:
            raise frames_error(error, 0) from None

    def unlink(self) -> None:
        """Gives up the name, if it has one. Mappings and descriptors live on. Again: nothing."""
        if self.name is None or self._made is None:
            return
        own, maker = self._made
        if maker != os.getpid():  # a forked child has descriptors, but not the name
            return
        name, self.name = self.name, None
        with contextlib.suppress(OSError):
            with contextlib.suppress(FileNotFoundError):
                # Not a later one of the same name: while we have ours open, its inode is no other's.
                if os.path.samestat(os.stat(f"{SHM}/{name}"), os.fstat(self.fd)):
                    os.unlink(f"{SHM}/{name}")
            os.unlink(f"{SHM}/{own}")  # last, and only then: by this a sweep finds the other

    def after_fork_in_child(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            files.close(fd)

    def close(self) -> None:
        """Gives up the descriptor, and the name if it has one. Mappings and other descriptors live on.

        Again: nothing.
        """
        if self.fd < 0:
            return
        self.unlink()
        # No function of Python's is entered, so nothing comes in between: it is closed once, and not forgotten.
        fd, self.fd = self.fd, -1
        try:
            if fd >= 0:
                os.close(fd)
        except OSError as error:
            if error.errno == errno.EBADF:  # as `files.close`
                raise

    def __del__(self) -> None:
        try:
            if self.fd >= 0:
                self.close()
        except Exception:  # nobody is left to be told
            pass
