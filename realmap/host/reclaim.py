"""Unlinking names that nobody uses, and only these: Linux itself is asked, and holds others off meanwhile.

A write lease (fcntl(2), F_SETLEASE) is had of a file only where no other open file description of it is left on the
machine: none of another user, in another namespace, on its way through a socket, or under a mapping. Who opens it from
then on waits, and is seen to wait. A look through /proc can promise none of that.

    open ─▶ lease ─▶ renamed out of reach ─▶ a moment for whoever had found the old name ─▶ still ours? ─▶ unlinked
                                                                                     └─ else its name is put back
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import stat
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from realmap.host import files, runtime

#: So many at a time: each takes a descriptor, and is out of reach for GRACE.
BATCH = 128
#: Seconds in which whoever looked a name up before it went gets as far as to open it.
GRACE = 0.01
IN_USE = "in use"


class Named(NamedTuple):
    """A file by all of its names in a directory, and which file that was."""

    names: tuple[str, ...]
    device: int
    inode: int


class Kept(Exception):
    """It is not unlinked; why, in words."""


class _Taken:
    """A file under a lease, its names out of reach. `give_back` undoes it."""

    def __init__(self, folder: str, file: Named) -> None:
        """Kept: it is in use, is another one by now, or is not ours."""
        self.moved: list[tuple[str, str]] = []
        self.fd = -1
        try:
            self.fd = _open(f"{folder}/{file.names[0]}")
            status = os.fstat(self.fd)
            if (status.st_dev, status.st_ino) != (file.device, file.inode) or not stat.S_ISREG(status.st_mode):
                raise Kept("another file has that name by now")
            self._lease(status.st_uid)
            for name in file.names:
                self._move(folder, name, status)
        except BaseException as error:
            self.give_back()
            if isinstance(error, OSError):
                gone = isinstance(error, FileNotFoundError)
                raise Kept("gone already" if gone else error.strerror or str(error)) from None
            raise

    def _lease(self, uid: int) -> None:
        fcntl.fcntl(self.fd, fcntl.F_SETSIG, signal.SIGURG)  # which nobody dies of: the lease itself says who waits
        try:
            fcntl.fcntl(self.fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except OSError as error:
            if error.errno == errno.EAGAIN:
                raise Kept(IN_USE) from None
            if error.errno in (errno.EACCES, errno.EPERM):
                raise Kept(f"it belongs to uid {uid}") from None
            raise Kept(f"whether it is in use cannot be told here: {error.strerror}") from None

    def _move(self, folder: str, name: str, status: os.stat_result) -> None:
        path, aside = f"{folder}/{name}", f"{folder}/{runtime.own_name()}"
        os.rename(path, aside)
        self.moved.append((path, aside))  # a name of ours: where we die here, the next sweep takes it
        if not os.path.samestat(os.stat(aside, follow_symlinks=False), status):
            raise Kept("another file has that name by now")

    @property
    def is_free(self) -> bool:
        """Whether nobody has come for it so far."""
        return fcntl.fcntl(self.fd, fcntl.F_GETLEASE) == fcntl.F_WRLCK

    def unlink(self) -> None:
        while self.moved:
            os.unlink(self.moved[-1][1])
            self.moved.pop()
        self.give_back()

    def give_back(self) -> None:
        """The names that it had, but for those that somebody has given to another file meanwhile."""
        for path, aside in self.moved:
            try:
                os.link(aside, path, follow_symlinks=False)
            except FileExistsError:
                pass
            except OSError:  # no inode is left for a second name
                os.rename(aside, path)
                continue
            os.unlink(aside)
        self.moved.clear()
        if self.fd >= 0:
            with contextlib.suppress(OSError):
                fcntl.fcntl(self.fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)  # a child forked meanwhile has it open, too
            files.close(self.fd)
            self.fd = -1


def _open(path: str) -> int:
    """To look at, never to wait for. Kept: somebody else holds a lease on it."""
    try:
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY)
    except BlockingIOError:
        raise Kept(IN_USE) from None


def unlink_unused(folder: str, wanted: Sequence[Named]) -> Iterator[tuple[Named, str]]:
    """Unlinks all names of those files in `folder` that nobody has open or mapped, anywhere on the machine.

    Each with "", where it went, or with why it stays: in use, another file by now, gone already, not this user's.
    """
    for first in range(0, len(wanted), BATCH):
        taken: list[tuple[Named, _Taken]] = []
        try:
            for file in wanted[first : first + BATCH]:
                try:
                    taken.append((file, _Taken(folder, file)))
                except Kept as why:
                    yield file, str(why)
            if taken:
                time.sleep(GRACE)
            while taken:
                file, ours = taken[0]
                free = ours.is_free
                ours.unlink() if free else ours.give_back()
                taken.pop(0)
                yield file, "" if free else IN_USE
        finally:
            for _, ours in taken:
                ours.give_back()
