"""A client that speaks the wire by hand, so that it can say what `realmap.connect` never would."""

from __future__ import annotations

import os
import socket
from typing import Self

import msgspec

from realmap.host import procfs
from realmap.wire import messages
from realmap.wire.ring import RingEnd


class RawClient:
    """A connection that was let in: its socket, and its end of the ring. A context manager."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.connect(path)
        pid = os.getpid()
        hello = messages.Hello(messages.PROTOCOL, messages.VERSION, pid, procfs.start_time(pid))
        self.sock.send(b"\0" + msgspec.msgpack.encode(hello))
        _, fds, _, _ = socket.recv_fds(self.sock, 1 << 16, 1, socket.MSG_CMSG_CLOEXEC)
        self.ring = RingEnd.join(fds[0])
        os.close(fds[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.ring._close()
        self.sock.close()
