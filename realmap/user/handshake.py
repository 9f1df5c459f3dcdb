"""How a connection begins: the socket is opened, and the kernel answers who has introduced itself."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import time

import msgspec

from realmap.errors import AccessDenied, InvalidHandle, KernelDied, SyscallTimeout, VersionMismatch
from realmap.host import files
from realmap.host.translate import SHORT_OF_MEMORY, frames_error, shortage
from realmap.wire import channel, messages
from realmap.wire.messages import VERSION
from realmap.wire.ring import RingEnd

#: A wait looks at signals at least this often, in milliseconds: one that comes right before a
#: system call blocks would not be seen by Python before the call returns.
SLICE = 50


def open_socket(path: str, timeout: float | None = None) -> socket.socket:
    """A socket that is connected to the kernel at `path`. Errors as `Client`.

    SyscallTimeout: so many wait to be let in that it was not even noted within `timeout` seconds.
    """
    doing = f"cannot connect to {path!r}"
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError as error:
        raise shortage(error, doing) from None
    try:
        if timeout is not None:
            whole = int(timeout)
            wait = struct.pack("@ll", whole, int((timeout - whole) * 1_000_000))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wait)
        sock.connect(path)
        if timeout is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", 0, 0))
    except OSError as error:
        files.shut(sock)
        if error.errno == errno.EAGAIN and timeout is not None:
            why = f"the kernel at {path!r} lets nobody in within {timeout} s"
            raise SyscallTimeout("connect", timeout, why=why) from None
        if error.errno == errno.ECONNREFUSED:  # the socket of one that was killed
            why = f"no kernel listens at {path!r} any more; clear it away: realmap gc {path}"
            raise KernelDied(path, why=f"{why}, or start a new one there: realmap kernel --path {path}") from None
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise KernelDied(
                path, why=f"no kernel listens at {path!r}; start one: realmap.boot(), or realmap kernel --path {path}"
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM):
            raise AccessDenied(why=f"the socket {path!r} is not open to this user") from None
        if error.errno in SHORT_OF_MEMORY or error.errno == errno.EAGAIN:
            raise shortage(error, doing) from None
        raise InvalidHandle(path, why=f"{path!r} is no socket of a kernel: {error}") from None
    except ValueError as error:
        files.shut(sock)
        raise InvalidHandle(path, why=f"{path!r} is no socket path: {error}") from None
    # How long a thread waits in one receive: it then looks whether the connection was closed meanwhile.
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 0, SLICE * 1000))
    except OSError as error:
        files.shut(sock)
        raise shortage(error, doing) from None
    return sock


def welcome(sock: socket.socket, path: str, timeout: float | None = None) -> tuple[messages.Welcome, RingEnd | None]:
    """The kernel's answer to Hello, and this side's end of the ring if there is one.

    KernelDied: it ended meanwhile. VersionMismatch: it speaks otherwise. PhysicalMemoryExhaustion: no
    descriptor was left for the ring. Else its refusal. OSError: Linux has no memory for it. SyscallTimeout: no
    answer within `timeout` seconds.
    """
    end = None if timeout is None else time.monotonic() + timeout
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    while not poll.poll(SLICE):
        if end is not None and time.monotonic() > end:
            why = f"the kernel at {path!r} does not answer: a handler keeps its thread, or it is stopped"
            raise SyscallTimeout("connect", timeout, why=why)
    while True:
        try:
            data, ancillary, _, _ = sock.recvmsg(channel.DATAGRAM, channel.ANCILLARY, channel.CLOEXEC)
            break
        except BlockingIOError:  # it waits a SLICE at most
            pass
        except ConnectionError:
            data, ancillary = b"", []
            break
    descriptors = channel.descriptors_in(ancillary)
    try:
        return _understood(data, descriptors, path)
    finally:
        channel.close_all(descriptors)


def _understood(data: bytes, descriptors: list[int], path: str) -> tuple[messages.Welcome, RingEnd | None]:
    try:
        answer = msgspec.msgpack.decode(data[1:], type=messages.Welcome | messages.Refused)
    except msgspec.MsgspecError:
        if not data:
            raise KernelDied(path, why=f"the kernel at {path!r} ended while this process connected") from None
        raise VersionMismatch(VERSION, "unknown", why=f"what answers at {path!r} does not speak as we do") from None
    if isinstance(answer, messages.Refused):
        raise messages.exception_of(answer.error)
    if not answer.spin:
        return answer, None
    if not descriptors:
        raise frames_error(OSError(errno.EMFILE, os.strerror(errno.EMFILE)), 0)
    return answer, RingEnd.join(descriptors[0])
