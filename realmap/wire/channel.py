"""The socket: messages of any allowed length over SOCK_SEQPACKET, with descriptors.

One datagram carries a flag byte and up to 64 KiB; longer messages go in several:

    WHOLE    or    FIRST · MIDDLE · … · LAST

BELL is a datagram of its own, and says nothing: it wakes who sleeps while something is in the ring.
A WHOLE message may come between the parts of another. A FIRST without the LAST of the one before means that its sender
gave up there: the former is forgotten. What a user sends and receives is the C core's (`_core/mail.c`).
"""

from __future__ import annotations

import array
import errno
import os
import socket
from collections import deque
from collections.abc import Sequence

from realmap._core import TOO_LONG
from realmap.errors import InvalidSize
from realmap.wire.messages import FLAWS, MAX_MESSAGE

WHOLE, FIRST, MIDDLE, LAST, RING = range(5)
#: Look into the ring.
BELL = bytes([RING])
CHUNK = 64 << 10
#: Room for one datagram and one byte more, by which a longer one is noticed.
DATAGRAM = CHUNK + 2
NOSIGNAL = int(socket.MSG_NOSIGNAL)  # as a plain integer: a member of an enum costs as much as sending


class NotAMessage(Exception):
    """What came is no message of ours: too long, cut short, or out of turn."""


def datagrams(message: bytes) -> list[bytes]:
    """`message` in datagrams. InvalidSize: it is longer than `MAX_MESSAGE` bytes."""
    size = len(message)
    if size <= CHUNK:
        return [b"\x00" + message]
    if size > MAX_MESSAGE:
        raise InvalidSize(size, why=FLAWS[TOO_LONG])
    chunks = [message[at : at + CHUNK] for at in range(0, size, CHUNK)]
    flags = [FIRST, *[MIDDLE] * (len(chunks) - 2), LAST]
    return [bytes([flag]) + chunk for flag, chunk in zip(flags, chunks, strict=True)]


class Assembler:
    """Puts messages together from the datagrams of one peer."""

    __slots__ = ("_parts", "size")

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        #: Bytes of a message whose last part has not come.
        self.size = 0

    def feed(self, datagram: bytes) -> bytes | None:
        """The message that this datagram completes, or None. NotAMessage: it belongs to none."""
        if datagram == BELL:
            return None
        if not 1 < len(datagram) < DATAGRAM:
            raise NotAMessage(f"a datagram of {len(datagram)} bytes")
        flag = datagram[0]
        if flag == WHOLE:
            return datagram[1:]
        if flag == FIRST:
            self._parts, self.size = [], 0
        elif flag not in (MIDDLE, LAST) or not self._parts:
            raise NotAMessage(f"a part (flag {flag}) of no message")
        self._parts.append(datagram[1:])
        self.size += len(datagram) - 1
        if self.size > MAX_MESSAGE:
            raise NotAMessage(f"a message of more than {MAX_MESSAGE} bytes")
        if flag != LAST:
            return None
        message, self._parts, self.size = b"".join(self._parts), [], 0
        return message


def send_one(sock: socket.socket, datagram: bytes, descriptors: Sequence[int] = ()) -> None:
    """Sends one datagram, whole or not at all. OSError as sendmsg(2)."""
    if descriptors:
        rights = array.array("i", descriptors)
        sock.sendmsg([datagram], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)], NOSIGNAL)
    else:
        sock.send(datagram, NOSIGNAL)


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
