"""How a connection begins: a socket that is let in, who we are, and what the kernel says to that."""

from __future__ import annotations

import errno
import os
import stat

import msgspec

from realmap._core import ANSWERED, NONSENSE, TIMED_OUT, Endpoint
from realmap.errors import AccessDenied, InvalidHandle, KernelDied, KernelError, VersionMismatch
from realmap.host import procfs
from realmap.host.signals import pass_on
from realmap.host.translate import SHORT_OF_MEMORY, frames_error, shortage
from realmap.wire import messages, status
from realmap.wire.messages import PROTOCOL, VERSION
from realmap.wire.status import Patience


def open_endpoint(path: str, timeout: float | None) -> Endpoint:
    """A connection to the kernel at `path`. Errors as `Client`.

    SyscallTimeout: so many wait to be let in that it was not even noted within `timeout` seconds; by default, as
    `Patience` says.
    """
    try:
        name = os.fsencode(path)
    except UnicodeEncodeError as error:
        raise InvalidHandle(path, why=f"{path!r} is no socket path: {error}") from None
    if b"\0" in name:
        raise InvalidHandle(path, why=f"{path!r} is no socket path: it has a null character")
    patience = Patience(path, "connect")
    while True:
        found = Endpoint._connect(name, patience if timeout is None else timeout)
        if isinstance(found, Endpoint):
            return found
        if found != errno.ETIMEDOUT:
            raise _refusal(found, path)
        if timeout is not None:
            raise status.unanswered(path, "connect", timeout)


def _refusal(number: int, path: str) -> KernelError:
    """Why there was no connection, by the errno."""
    error = OSError(number, os.strerror(number))
    if (what := _no_socket(path)) is not None:
        why = f"{path!r} is {what}, not the socket of a kernel: give what `realmap kernel` prints, or kernel.path"
        return InvalidHandle(path, why=why)
    if number == errno.ECONNREFUSED:  # the socket of one that was killed
        why = f"no kernel listens at {path!r} any more; clear it away: realmap gc {path}"
        return KernelDied(path, why=f"{why}, or start a new one there: realmap kernel --path {path}")
    if number in (errno.ENOENT, errno.ENOTDIR):
        why = f"no kernel listens at {path!r}; start one: realmap.boot(), or realmap kernel --path {path}"
        return KernelDied(path, why=why)
    if number in (errno.EACCES, errno.EPERM):
        return AccessDenied(why=f"the socket {path!r} is not open to this user")
    if number in (errno.EMFILE, errno.ENFILE, errno.EAGAIN, *SHORT_OF_MEMORY):
        return shortage(error, f"cannot connect to {path!r}")
    return InvalidHandle(path, why=f"{path!r} is no socket of a kernel: {error.strerror}")


def _no_socket(path: str) -> str | None:
    try:
        mode = os.stat(path).st_mode
    except OSError:  # it is not there, or not ours to look at
        return None
    return None if stat.S_ISSOCK(mode) else "a directory" if stat.S_ISDIR(mode) else "a file"


def introduce(
    endpoint: Endpoint, path: str, control: bool, encoder: msgspec.msgpack.Encoder, timeout: float | None
) -> messages.Welcome:
    """Says who we are, and joins the ring where the kernel has one for us. Its welcome.

    KernelDied: it ended meanwhile. VersionMismatch: it speaks otherwise. PhysicalMemoryExhaustion: no descriptor was
    left for the ring, or Linux has no memory. Else its refusal. SyscallTimeout: no answer within `timeout` seconds; by
    default, as `Patience` says.
    """
    pid = os.getpid()
    try:
        start = procfs.start_time(pid)
    except OSError as error:
        raise shortage(error, f"cannot connect to {path!r}") from None
    hello = messages.Hello(PROTOCOL, VERSION, pid, start, control)
    bound = Patience(path, "connect") if timeout is None else timeout
    answer = endpoint.request(0, encoder.encode(hello), bound, None, None)
    if answer.outcome == TIMED_OUT:
        raise status.unanswered(path, "connect", timeout)
    if answer.outcome != ANSWERED and answer.error:
        raise shortage(OSError(answer.error, os.strerror(answer.error)), f"cannot connect to {path!r}")
    if answer.outcome != ANSWERED and endpoint.end != NONSENSE:
        raise KernelDied(path, why=f"the kernel at {path!r} ended while this process connected")
    try:
        found = msgspec.msgpack.decode(answer.data or b"", type=messages.Welcome | messages.Refused)
    except messages.UNREADABLE as error:
        pass_on(error)
        raise VersionMismatch(VERSION, "unknown", why=f"what answers at {path!r} does not speak as we do") from None
    if isinstance(found, messages.Refused):
        raise messages.exception_of(found.error)
    if found.spin:
        descriptors = answer.descriptors
        if not descriptors:
            raise frames_error(OSError(errno.EMFILE, os.strerror(errno.EMFILE)), 0)
        if number := endpoint.join(descriptors[0], int(found.spin * 1000)):
            raise shortage(OSError(number, os.strerror(number)), f"cannot connect to {path!r}")
    return found
