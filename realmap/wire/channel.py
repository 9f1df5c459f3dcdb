"""The socket: messages of any allowed length over SOCK_SEQPACKET, with descriptors.

One datagram carries a flag byte and up to 64 KiB; longer messages go in several:

    WHOLE                      FIRST · MIDDLE · … · LAST
    any thread, at any time    one thread at a time (the sender's lock)

BELL is a datagram of its own, and says nothing: it wakes who sleeps while something is in the ring.
A WHOLE message may come between the parts of another. A FIRST without the LAST of the one before
means that its sender was interrupted there: the former is forgotten.
"""

from __future__ import annotations

import array
import errno
import os
import socket
from collections import deque
from collections.abc import Iterable, Sequence

from realmap.errors import InvalidSize
from realmap.wire.messages import MAX_DESCRIPTORS, MAX_MESSAGE

WHOLE, FIRST, MIDDLE, LAST, RING = range(5)
#: Look into the ring.
BELL = bytes([RING])
CHUNK = 64 << 10
#: Room for one datagram and one byte more, by which a longer one is noticed.
DATAGRAM = CHUNK + 2
ANCILLARY = socket.CMSG_SPACE(MAX_DESCRIPTORS * 4)
# As plain integers: combining two members of an enum costs as much as sending.
NOSIGNAL = int(socket.MSG_NOSIGNAL)
AT_ONCE = int(socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
#: For receiving: descriptors that come are not inherited; and the same without waiting.
CLOEXEC = int(socket.MSG_CMSG_CLOEXEC)
CLOEXEC_AT_ONCE = int(socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)


class NotAMessage(Exception):
    """What came is no message of ours: too long, cut short, or out of turn."""


def datagrams(message: bytes) -> list[bytes]:
    """`message` in datagrams. InvalidSize: it is longer than MAX_MESSAGE bytes."""
    size = len(message)
    if size <= CHUNK:
        return [b"\x00" + message]
    if size > MAX_MESSAGE:
        raise InvalidSize(size, why=f"a message carries at most {MAX_MESSAGE} bytes; put more into a buffer")
    chunks = [message[at : at + CHUNK] for at in range(0, size, CHUNK)]
    flags = [FIRST, *[MIDDLE] * (len(chunks) - 2), LAST]
    return [bytes([flag]) + chunk for flag, chunk in zip(flags, chunks, strict=True)]


class Assembler:
    """Puts messages together from the datagrams of one peer."""

    __slots__ = ("_last", "_parts", "_size")

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0
        self._last: tuple[bytes | None, bytes | None] = (None, None)

    def feed(self, datagram: bytes) -> bytes | None:
        """The message that this datagram completes, or None. NotAMessage: it belongs to none.

        The same object once more, after an interrupt, has the same answer.
        """
        if datagram is not self._last[0]:
            self._last = (datagram, self._feed(datagram))
        return self._last[1]

    def _feed(self, datagram: bytes) -> bytes | None:
        if datagram == BELL:
            return None
        if not 1 < len(datagram) < DATAGRAM:
            raise NotAMessage(f"a datagram of {len(datagram)} bytes")
        flag = datagram[0]
        if flag == WHOLE:
            return datagram[1:]
        if flag == FIRST:
            self._parts, self._size = [], 0
        elif flag not in (MIDDLE, LAST) or not self._parts:
            raise NotAMessage(f"a part (flag {flag}) of no message")
        self._parts.append(datagram[1:])
        self._size += len(datagram) - 1
        if self._size > MAX_MESSAGE:
            raise NotAMessage(f"a message of more than {MAX_MESSAGE} bytes")
        if flag != LAST:
            return None
        message, self._parts = b"".join(self._parts), []
        return message


def send_one(sock: socket.socket, datagram: bytes, descriptors: Sequence[int] = (), flags: int = NOSIGNAL) -> None:
    """Sends one datagram, whole or not at all. OSError as sendmsg(2). `flags`: NOSIGNAL, or AT_ONCE."""
    if descriptors:
        rights = array.array("i", descriptors)
        sock.sendmsg([datagram], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)], flags)
    else:
        sock.send(datagram, flags)


def descriptors_in(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors that came with a datagram; the receiver's to close."""
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return list(found)


class Descriptors(list[int]):
    """Descriptors that are closed with the list, where nobody has before: an interrupt may keep their owner from it."""

    def __del__(self) -> None:
        close_all(self)


def close_all(descriptors: list[int]) -> None:
    """Closes each and takes it out, in one call of C: an interrupt leaves none behind, and none to be closed twice."""
    while descriptors:
        try:
            deque(map(os.close, iter(descriptors.pop, None)), maxlen=0)
        except IndexError:  # the list is empty
            return
        except OSError as error:  # it is closed all the same (host/files.py); on with the next one
            if error.errno == errno.EBADF:
                raise
