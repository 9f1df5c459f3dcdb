"""A raw client: the handshake, and then whatever it is told to send. What the kernel answers is read, and checked."""

from __future__ import annotations

import array
import contextlib
import errno
import mmap
import os
import select
import socket
import stat
import struct
import time
from collections import deque
from collections.abc import Iterable, Sequence

import msgspec
from mutations import hello, own_memory, signed
from states import ANSWERS, HEAD, QUEUE_BYTES, SLOT_COUNT, TAIL, bytes_of, head_of

from realmap._core import RING_BYTES
from realmap.host import procfs
from realmap.wire import channel, messages

#: The kernel has to do what it must within this time: far above what a loaded machine takes. Seconds.
BOUND = 60.0
#: So many descriptors that came with answers stay open.
KEPT = 24
_MOST_RECORDS, _RECORD = 64, 1024
_HEADER = struct.Struct("=4Q")
_HEAD = struct.Struct("=QII")
_WORD = struct.Struct("=I")
_greeting = msgspec.msgpack.Decoder(messages.Welcome | messages.Refused)
_reply = msgspec.msgpack.Decoder(messages.Reply)
_pid, _start = os.getpid(), procfs.start_time(os.getpid())


AT_ONCE = socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT
AT_ONCE_CLOEXEC = AT_ONCE | socket.MSG_CMSG_CLOEXEC
ANCILLARY = socket.CMSG_SPACE(messages.MAX_DESCRIPTORS * 4)


def descriptors_in(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors that came with a datagram; the receiver's to close."""
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return list(found)


class Wrong(Exception):
    """The kernel did what it must not."""


class Notes:
    """Counts, and the last things that were sent, in a file: there still when this process, or the kernel, is not."""

    def __init__(self, path: str) -> None:
        """Opens the notes at `path`, makes them where they are not there."""
        size = _HEADER.size + _MOST_RECORDS * _RECORD
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(fd, size)
        self._memory = mmap.mmap(fd, size)
        os.close(fd)
        self._next = 0

    def sent(self, index: int, data: bytes) -> None:
        """Takes down what is about to be sent: the start of it, and how long it is."""
        at = _HEADER.size + self._next % _MOST_RECORDS * _RECORD
        kept = data[: _RECORD - _HEAD.size]
        _HEAD.pack_into(self._memory, at, index, len(data), len(kept))
        self._memory[at + _HEAD.size : at + _HEAD.size + len(kept)] = kept
        self._next += 1

    def count(self, done: int, connections: int, answers: int, byes: int) -> None:
        """Takes down how far it has come."""
        _HEADER.pack_into(self._memory, 0, done, connections, answers, byes)

    def counts(self) -> tuple[int, int, int, int]:
        """done, connections, answers, byes."""
        done, connections, answers, byes = _HEADER.unpack_from(self._memory)
        return done, connections, answers, byes

    def last(self, count: int) -> list[str]:
        """The last things that were sent, in hexadecimal, oldest first."""
        found = []
        for record in range(_MOST_RECORDS):
            at = _HEADER.size + record * _RECORD
            index, size, kept = _HEAD.unpack_from(self._memory, at)
            if kept:
                data = self._memory[at + _HEAD.size : at + _HEAD.size + kept]
                found.append((index, f"#{index}, {size} bytes: {data.hex()}{'...' if kept < size else ''}"))
        return [text for _, text in sorted(found)[-count:]]


class Tally:
    """What a hostile process has counted."""

    def __init__(self) -> None:
        self.connections = self.answers = self.byes = self.refused = self.unread = 0


class Peer:
    """One connection. `over`: the kernel has ended it."""

    def __init__(self, path: str, tally: Tally, *, greet: bool = True, keep_ring: bool = False) -> None:
        """Connects; with `greet` it introduces itself, and asks for memory, without waiting for the answers.

        `keep_ring`: the ring is somebody else's to read and write (`memory`).
        """
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.connect(path)
        self.sock.setblocking(False)
        self._poll = select.poll()
        self._poll.register(self.sock, select.POLLIN)
        self.memory: mmap.mmap | None = None
        self.greeted = self.over = self.welcome = False
        self.sent = 0
        self._keep_ring = keep_ring
        #: What came last with answers: sockets of services and sessions among it, which end when they are closed.
        self._kept: deque[int] = deque()
        self._tally = tally
        self._assembler = channel.Assembler()
        tally.connections += 1
        if greet:
            self.greeted = True
            self.send(b"\0" + signed(hello(), _pid, _start))
            self.send(b"\0" + own_memory())

    def send(self, datagram: bytes, descriptors: Sequence[int] = ()) -> None:
        """Sends a datagram; reads answers as long as it cannot. Nothing where the kernel has ended the connection."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        end = 0.0
        while not self.over:
            try:
                if rights:
                    self.sock.sendmsg([datagram], rights, AT_ONCE)
                else:
                    self.sock.send(datagram, AT_ONCE)
                return
            except BlockingIOError:
                end = end or time.monotonic() + BOUND
                if time.monotonic() > end:
                    raise Wrong(f"the kernel takes nothing from a client for {BOUND} s") from None
                self._poll.modify(self.sock, select.POLLIN | select.POLLOUT)
                self._poll.poll(1000)
                self._poll.modify(self.sock, select.POLLIN)
                self.drain()
            except ConnectionError:
                self.drain()
                self.over = True
            except OSError as error:
                if error.errno != errno.ETOOMANYREFS:
                    raise
                rights = []  # too many are on their way already

    def tell(self, datagram: bytes) -> None:
        """Says it by every socket that it was given."""
        for fd in self._kept:
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as sock:
                    sock.send(datagram, AT_ONCE)

    def drain(self) -> None:
        """Reads and checks all that is there."""
        while not self.over:
            try:
                data, ancillary, _, _ = self.sock.recvmsg(
                    channel.DATAGRAM, ANCILLARY, AT_ONCE | socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                break
            except ConnectionError:  # it had not read all that was sent when it ended the connection
                self._tally.unread += 1
                data, ancillary = b"", []
            descriptors = descriptors_in(ancillary)
            try:
                if not data:
                    self.over = True
                elif data != channel.BELL:
                    self._take(data, descriptors)
            finally:
                self._kept += descriptors
                while len(self._kept) > KEPT:
                    os.close(self._kept.popleft())
        if self.memory is not None and not self._keep_ring:
            self._read_ring(self.memory)

    def _take(self, datagram: bytes, descriptors: list[int]) -> None:
        try:
            message = self._assembler.feed(datagram)
        except channel.NotAMessage as error:
            raise Wrong(f"the kernel sent a datagram that is none: {error}: {datagram[:100].hex()}") from None
        if message is None:
            return
        if not self.welcome:
            try:
                greeting = _greeting.decode(message)
            except msgspec.MsgspecError:
                pass  # not let in: a Bye
            else:
                self.welcome = True
                self._tally.refused += isinstance(greeting, messages.Refused)
                if descriptors:
                    self.memory = mmap.mmap(descriptors[0], RING_BYTES)
                return
        self._check(message)

    def _check(self, message: bytes) -> None:
        try:
            reply = _reply.decode(message)
        except msgspec.MsgspecError as error:
            raise Wrong(f"the kernel answered what is no answer: {error}: {message[:100].hex()}") from None
        self._tally.answers += 1
        self._tally.byes += isinstance(reply, messages.Bye)

    def _read_ring(self, memory: mmap.mmap) -> None:
        """As an honest client would."""
        base = ANSWERS * QUEUE_BYTES
        head, tail = _WORD.unpack_from(memory, base + HEAD)[0], _WORD.unpack_from(memory, base + TAIL)[0]
        if (tail - head) % 2**32 > SLOT_COUNT:
            raise Wrong(f"the kernel's queue of answers has a tail of {tail} at a head of {head}")
        while head != tail:
            size = _WORD.unpack_from(memory, base + head_of(head))[0]
            at = base + bytes_of(head, size)
            self._check(memory[at : at + size])
            head = (head + 1) % 2**32
        _WORD.pack_into(memory, base + HEAD, head)

    def wait(self, seconds: float = BOUND) -> None:
        """Waits for anything to read, or for the end."""
        self._poll.poll(seconds * 1000)

    def settle(self, what: str) -> None:
        """Reads until the kernel ends the connection. Wrong: it does not."""
        end = time.monotonic() + BOUND
        while True:
            self.drain()
            if self.over:
                return
            if time.monotonic() > end:
                raise Wrong(f"the kernel did not end a connection within {BOUND} s after {what}")
            self.wait(1.0)

    def finish(self) -> None:
        """Says that nothing more will come: the kernel ends the connection once it has read all."""
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.drain()
            self.over = True

    def close(self) -> None:
        """Closes its side."""
        self.sock.close()
        channel.close_all(list(self._kept))
        self._kept.clear()
        if self.memory is not None:
            self.memory.close()
