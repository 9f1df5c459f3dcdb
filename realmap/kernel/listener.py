"""The path of a kernel, and the socket there, where clients connect."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Callable

from realmap.host import files, runtime
from realmap.kernel.loop import Loop


class Listener:
    """Takes the path while it lives, and hands on every socket that connects."""

    def __init__(self, path: str, loop: Loop, enter: Callable[[socket.socket], None]) -> None:
        """`enter` is called with each, on the loop.

        InvalidHandle: the path is taken, too long, not UTF-8, or no socket. AccessDenied: it is not ours. OSError:
        Linux has no descriptors or no memory for it, or does not allow it. Nothing is left then.
        """
        self._loop = loop
        self._enter = enter
        lock = runtime.SocketLock(path)
        with contextlib.ExitStack() as undo:
            undo.callback(lock.release)
            runtime.sweep()
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(files.shut, self._socket)
            self._socket.setblocking(False)
            self._socket.bind(path)
            os.chmod(path, 0o600)
            self._socket.listen(128)
            # Given up for a moment where no descriptor is left, to turn a client away.
            self._spare = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
            undo.callback(files.close, self._spare)
            loop.watch(self._socket.fileno(), self._accept)
            self._lock = lock
            undo.pop_all()

    def _accept(self, _: int) -> None:
        try:
            sock, _ = self._socket.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # else the listener would be ready for ever
                if self._spare >= 0:
                    files.close(self._spare)
                with contextlib.suppress(OSError):
                    self._socket.accept()[0].close()
                self._spare = -1
                with contextlib.suppress(OSError):  # a worker was quicker: then without one
                    self._spare = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
            return
        self._enter(sock)

    def note(self, descriptor: int) -> None:
        """Tells whoever looks by which descriptor this process says what it is at; where the lock cannot, nobody."""
        with contextlib.suppress(OSError):
            self._lock.note(descriptor)

    def close(self) -> None:
        """Nobody can connect any more; the path is still ours."""
        self._loop.unwatch(self._socket.fileno())
        files.shut(self._socket)

    def release(self) -> None:
        """Gives the path free."""
        if self._spare >= 0:
            files.close(self._spare)
        self._lock.release()

    def after_fork_in_child(self) -> None:
        """It is the parent's alone."""
        files.shut(self._socket)
        spare, self._spare = self._spare, -1
        if spare >= 0:
            files.close(spare)
