"""Who is let in: a peer is identified without doubt, of this uid and version, or refused in words."""

from __future__ import annotations

import os

import msgspec

from realmap.errors import AccessDenied, VersionMismatch
from realmap.host import files, liveness
from realmap.host.translate import shortage
from realmap.kernel.books import Books
from realmap.kernel.connection import Connection
from realmap.kernel.limits import first_reserved, require_unreserved
from realmap.serving.workers import Workers
from realmap.wire import messages
from realmap.wire.messages import PROTOCOL, VERSION


class Admission:
    """Knows who may enter a kernel's books."""

    def __init__(self, books: Books, workers: Workers) -> None:
        self._books = books
        self._workers = workers
        self._hello = msgspec.msgpack.Decoder(messages.Hello)

    def admit(self, connection: Connection, data: bytes) -> messages.Welcome:
        """Takes in who says Hello: what it is told.

        KernelError: it may not enter, or Linux is short of something. MsgspecError: it says something else.
        """
        hello = self._hello.decode(data)
        if hello.protocol != PROTOCOL:
            ours, theirs = f"{VERSION} (protocol {PROTOCOL})", f"{hello.version} (protocol {hello.protocol})"
            raise VersionMismatch(ours, theirs, why="kernel and user are of different versions of realmap")
        try:
            peer = liveness.peer(connection.sock, hello.pid, hello.start)
        except OSError as error:  # dead by now, or no descriptor left for it
            raise shortage(error, "the kernel cannot take this process in") from None
        try:
            if peer.uid != os.geteuid():
                raise AccessDenied(why=f"the kernel belongs to uid {os.geteuid()}, the peer is uid {peer.uid}")
            if hello.control:
                connection.control = True
                files.close(peer.pidfd)
                return messages.Welcome(VERSION, 0, os.getpid())
            self._require_descriptors(connection, peer.pidfd)
            process = self._books.admit(peer.pid, peer.uid)
        except BaseException:
            files.close(peer.pidfd)
            raise
        connection.enter(process, peer.pidfd, self._workers, self._books.limits.running)
        if self._books.observer is not None:
            self._books.observer.connected(process)
        return messages.Welcome(VERSION, process.number, os.getpid(), secret=process.secret)

    def _require_descriptors(self, connection: Connection, pidfd: int) -> None:
        limits = self._books.limits
        if pidfd >= first_reserved(limits) // 2:  # stocks give way before descriptors are scarce
            self._books.give_way()
        require_unreserved(limits, connection.sock.fileno(), pidfd)
