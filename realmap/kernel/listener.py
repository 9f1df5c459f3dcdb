"""The path of a kernel, and the socket there, where clients connect."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Callable, Sequence

from realmap._core import watch_directory
from realmap.errors import KernelError
from realmap.host import files, runtime
from realmap.host.translate import shortage
from realmap.serving.logs import log, urgent
from realmap.serving.loop import Loop

#: Who removes the socket may be about to remove its directory: that is waited for so often, so many seconds each time.
LOOKS, PAUSE = 20, 0.001
#: Where it cannot be made anew, it is tried again so many seconds later.
AGAIN = (0.01, 0.1, 1.0)


class Listener:
    """Takes the path while it lives, and hands on every socket that connects. Where somebody removes the socket, or its
    directory (cleaners of /tmp do, and systemd at a logout), it makes them anew: the kernel would be lost to all who
    come later.
    """

    def __init__(
        self,
        path: str,
        loop: Loop,
        enter: Callable[[socket.socket], None],
        turn_away: Callable[[socket.socket, KernelError], None],
    ) -> None:
        """`enter` is called with each, on the loop; `turn_away` with one for which there is no descriptor, and why.

        InvalidHandle: the path is taken, its name too long, not UTF-8, or no socket. AccessDenied: it is not ours.
        OSError: Linux has no descriptors or no memory for it, or does not allow it. Nothing is left then.
        """
        self._path = path
        self._loop = loop
        self._enter = enter
        self._turn_away = turn_away
        #: Readable when a name has gone from the directory; -1: Linux has no more of these for this user.
        self._watching = -1
        #: What `note` was told.
        self._noted: int | None = None
        self._listen()
        try:
            runtime.sweep()
            # Given up for a moment where no descriptor is left, to tell a client so.
            self._spare = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            self.close()
            self._lock.release()
            raise

    def _listen(self) -> None:
        lock = runtime.SocketLock(self._path)
        with contextlib.ExitStack() as undo:
            undo.callback(lock.release)
            with contextlib.suppress(OSError):  # before there is anything that could be missed
                self._watching = watch_directory(os.fsencode(os.path.dirname(self._path)))
                undo.callback(self._stop_watching)
                self._loop.watch(self._watching, self._on_loss)
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(files.shut, sock)
            sock.setblocking(False)
            made = self._path + runtime.NEW
            with runtime.in_short(made) as short:
                sock.bind(short)
            os.chmod(made, 0o600)
            sock.listen(128)
            self._loop.watch(sock.fileno(), self._accept)
            os.rename(made, self._path)  # whoever sees it can connect
            undo.pop_all()
        self._lock, self._socket = lock, sock

    def _accept(self, _: int) -> None:
        try:
            sock, _ = self._socket.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # else the listener would be ready for ever
                if self._spare >= 0:
                    files.close(self._spare)
                with contextlib.suppress(OSError):
                    self._turn_away(self._socket.accept()[0], shortage(error, "the kernel cannot take this process in"))
                self._spare = -1
                with contextlib.suppress(OSError):  # a worker was quicker: then without one
                    self._spare = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
            return
        self._enter(sock)

    def _on_loss(self, fd: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(fd, 1 << 16)
        self._look(LOOKS)

    def _look(self, times: int) -> None:
        if self._loop.ending or self._lock.is_there:
            return
        if times and os.path.isdir(os.path.dirname(self._path)):
            self._loop.after(PAUSE, lambda: self._look(times - 1))
            return
        log.warning("somebody has removed the socket %r; it is made anew", self._path)
        self._renew(AGAIN)

    def _renew(self, pauses: Sequence[float]) -> None:
        if self._loop.ending:
            return
        before = self._socket
        self._lock.release()
        self._stop_watching()
        try:
            runtime.directory()  # where it was in the private one
            self._listen()
        except (KernelError, OSError) as error:
            if pauses:  # it may have been removed in the middle of that
                self._loop.after(pauses[0], lambda: self._renew(pauses[1:]))
            else:
                urgent.error("nobody can connect to %r any more: %s", self._path, error)
            return
        self._loop.unwatch(before.fileno())
        with contextlib.suppress(OSError):  # those who were waiting there
            while True:
                self._enter(before.accept()[0])
        files.shut(before)
        if self._noted is not None:
            self.note(self._noted)

    def note(self, descriptor: int) -> None:
        """Tells whoever looks by which descriptor this process says what it is at; where the lock cannot, nobody."""
        self._noted = descriptor
        with contextlib.suppress(OSError):
            self._lock.note(descriptor)

    def _stop_watching(self) -> None:
        watching, self._watching = self._watching, -1
        if watching >= 0:
            self._loop.unwatch(watching)
            files.close(watching)

    def close(self) -> None:
        """Nobody can connect any more; the path is still ours."""
        self._stop_watching()
        self._loop.unwatch(self._socket.fileno())
        files.shut(self._socket)

    def release(self) -> None:
        if self._spare >= 0:
            files.close(self._spare)
        self._lock.release()

    def after_fork_in_child(self) -> None:
        files.shut(self._socket)
        for fd in (self._spare, self._watching):
            if fd >= 0:
                files.close(fd)
        self._spare = self._watching = -1
