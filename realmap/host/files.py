"""Descriptors: received; closed whatever close(2) says, for Linux has closed one also where it reports EINTR or EIO."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import operator
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import select
    import socket


def close(fd: int) -> None:
    """Closes a descriptor. OSError (EBADF) only: it was none, which is a bug of ours."""
    try:
        os.close(fd)
    except OSError as error:
        if error.errno == errno.EBADF:
            raise


def shut(thing: socket.socket | select.epoll) -> None:
    """Closes it. Again: nothing."""
    with contextlib.suppress(OSError):
        thing.close()


def receive(sock: socket.socket, room: int, most: int) -> tuple[bytes, list[int]]:
    """What is there now: so many bytes of it, and so many descriptors, at most; where more came, none of these.

    OSError as recvmsg(2): BlockingIOError: nothing is there. (`socket.recv_fds` takes flags, and leaves them out.)
    """
    import array
    import socket  # here: `realmap shm` does without

    fds = array.array("i")
    flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    data, ancillary, cut, _ = sock.recvmsg(room, socket.CMSG_LEN(most * fds.itemsize), flags)
    for level, kind, rights in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(rights[: len(rights) - len(rights) % fds.itemsize])
    if cut & socket.MSG_CTRUNC:
        while fds:
            close(fds.pop())
    return data, fds.tolist()


def sealed(name: str, length: int) -> int:
    """New memory of `length` bytes that nobody can cut short or extend: its descriptor. OSError: no memory, or none.

    `name`: what Linux shows of it.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, length)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        close(fd)
        raise
    return fd


class Descriptor:
    """One that is closed at the end of its `with` block, or with its object. It is opened and closed in one step each:
    an exception of a signal handler that comes in between neither forgets it nor closes it twice.
    """

    __slots__ = ("_held",)

    def __init__(self, opens: Callable[[], int]) -> None:
        """`opens`: a function of C, with its arguments (functools.partial). OSError: what it raises."""
        self._held: list[int] = []
        self._held.extend(map(operator.call, (opens,)))

    @property
    def fd(self) -> int:
        """Its number; -1: it is closed."""
        return self._held[0] if self._held else -1

    def close(self) -> None:
        """Again: nothing. OSError (EBADF) only, as `close`."""
        try:
            if self._held:
                next(map(os.close, map(self._held.pop, (0,))))
        except OSError as error:
            if error.errno == errno.EBADF:
                raise

    def __enter__(self) -> int:
        return self.fd

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # nobody is left to be told
            self.close()
