"""One side's end of a connection: the socket, the ring beside it, and whose turn it is to read them.

Messages go by the ring where they fit and the kernel is awake, else by the socket. Of those that wait for something
one at a time reads, for all; what it takes is handed on at once, and kept until that is done, whatever interrupts it.
What is done with it is said in user/client.py.
"""

from __future__ import annotations

import select
import time
from collections import deque
from threading import RLock
from typing import Any, Protocol

from realmap._core import Ring, Turn, fall_asleep, spin, wake_up
from realmap.errors import KernelError
from realmap.host.translate import SHORT_OF_MEMORY
from realmap.user import handshake
from realmap.user.handshake import SLICE
from realmap.wire import channel
from realmap.wire.ring import LONGEST, OVERLOADED, SAME_CPU, RingEnd, SpinBudget

#: A datagram as recvmsg gives it.
Received = tuple[bytes, list[tuple[int, int, bytes]], int, Any]


class Outgoing(Protocol):
    """What is known of a message that is being sent."""

    #: What was sent of it so far, and how many parts it has. Noted in the same call of C that sends.
    sent: list[Any]
    parts: int


class Post:
    """The socket at `path`, connected, and the ring once there is one."""

    def __init__(self, path: str, timeout: float | None) -> None:
        """Errors as `handshake.open_socket`."""
        #: What was received and is not handed on yet: messages of the ring, and datagrams.
        self._inbox: deque[bytes] = deque()
        self._mail: deque[Received] = deque()
        self._ring: RingEnd | None = None
        self._rings: list[Ring] = []
        self._spin = SpinBudget(0)
        self._assembler = channel.Assembler()
        # With levels: a destructor or a signal handler may make a call while its own thread is in one.
        self._reading = Turn()
        self._sending = RLock()
        self._notices: deque[bytes] = deque()
        self._sock = handshake.open_socket(path, timeout)
        self._poll = select.poll()
        self._poll.register(self._sock, select.POLLIN)

    def fileno(self) -> int:
        """The socket's descriptor; -1 once it is closed."""
        return self._sock.fileno()

    # ---- what is done with it: the client's -------------------------------------------------------

    @property
    def has_ended(self) -> bool:
        """Whether it is of no use any more: closed, or the kernel has gone."""
        raise NotImplementedError

    def _dispatch(self, received: Received | bytes) -> None:
        """Hands on what was received; again, where an interrupt came in between."""
        raise NotImplementedError

    def pass_on(self) -> None:
        """Lets the next one read: this one does no longer."""
        raise NotImplementedError

    def _lost(self, error: OSError) -> KernelError:
        """Sending failed: what that means."""
        raise NotImplementedError

    # ---- sending ----------------------------------------------------------------------------

    def _flush_notices(self) -> None:
        while self._notices:
            try:
                message = self._notices.popleft()
            except IndexError:
                return
            if self._ring is not None and self._ring._offer(message, self._sock.fileno()):
                continue
            try:
                channel.send_one(self._sock, channel.datagrams(message)[0], flags=channel.AT_ONCE)
            except OSError:  # not now; or the kernel is gone, which the next request will find out
                self._notices.appendleft(message)
                return
            if self._ring is not None:
                self._ring._mailed()  # a request that goes by the ring later does not come before it

    def _send(self, message: bytes, deadline: float | None, pending: Outgoing) -> None:
        if self._notices:
            self._flush_notices()
        sent = pending.sent
        if self._send_by_ring(message, sent):
            return
        parts = channel.datagrams(message)
        if len(parts) == 1:
            self._send_part(parts[0], deadline, sent)
            return
        pending.parts = len(parts)
        with self._sending:  # the parts of one message must not mix with those of another
            for part in parts:
                self._send_part(part, deadline, sent)

    def _send_by_ring(self, message: bytes, sent: list[Any]) -> bool:
        if self._ring is None or len(message) > LONGEST:
            return False
        # In one call of C: an interrupt cannot come between sending and noting that it was sent.
        sent.extend(filter(None, map(self._ring._offer, (message,), (self._sock.fileno(),))))
        return bool(sent)

    def send_at_once(self, message: bytes, sent: list[Any]) -> bool:
        """Sends it if that can be done without waiting, and notes that in `sent`. Errors as sending has."""
        if self._notices:
            self._flush_notices()
        if self._send_by_ring(message, sent):
            return True
        parts = channel.datagrams(message)
        if len(parts) > 1:
            return False
        try:
            sent.extend(map(self._sock.send, (parts[0],), (channel.AT_ONCE,)))
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in SHORT_OF_MEMORY:
                raise
            raise self._lost(error) from None
        return True

    def _send_part(self, datagram: bytes, deadline: float | None, sent: list[Any]) -> None:
        level = self._reading.level()
        while True:
            try:
                sent.extend(map(self._sock.send, (datagram,), (channel.AT_ONCE,)))
                return
            except BlockingIOError:
                # The kernel may be waiting for us to read: so read while waiting to send.
                poll = select.poll()
                poll.register(self._sock, select.POLLOUT | select.POLLIN)
                poll.poll(self._slice(deadline))
                if self._reading.take():
                    try:
                        self._receive(0)
                    finally:
                        self._reading.restore(level)
                        self.pass_on()
            except OSError as error:
                if error.errno in SHORT_OF_MEMORY:
                    raise  # of a message in parts, those that went are forgotten
                raise self._lost(error) from None

    @staticmethod
    def _slice(deadline: float | None) -> float:
        if deadline is None:
            return SLICE
        left = (deadline - time.monotonic()) * 1000
        if left <= 0:
            raise TimeoutError
        return min(SLICE, left)

    # ---- receiving --------------------------------------------------------------------------

    def _readable(self, milliseconds: float) -> bool:
        poll = self._poll
        if self._reading.level() > 1:  # a call within a call: the other is in this one's poll
            poll = select.poll()
            poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(milliseconds))

    def _receive(self, milliseconds: float, *, spinning: bool = True) -> None:
        """Takes what is there, by the ring or a datagram, and hands it on. Only whose turn it is."""
        ring = self._ring
        if ring is None:
            self._receive_datagram(milliseconds)
        elif not self._take_from_ring(ring, spinning) and fall_asleep(self._rings):
            before = time.monotonic_ns()
            try:
                self._receive_datagram(milliseconds)
            finally:
                wake_up(self._rings)
                self._spin.slept(time.monotonic_ns() - before)

    def _take_from_ring(self, ring: RingEnd, spinning: bool) -> bool:
        """Hands on what is in the ring, or comes while it is worth spinning; whether anything was."""
        inbox = self._inbox
        inbox.extend(iter(ring._pop, None))  # in one call of C, as below
        if not inbox:
            patience = self._spin.nanoseconds() if spinning else 0
            if not patience:
                return False
            found = spin(self._rings, 0, patience)
            if found < 0:
                if found == OVERLOADED:
                    self._spin.overloaded()
                elif found != SAME_CPU:
                    self._spin.lost()
                return False
            self._spin.won()
            inbox.extend(iter(ring._pop, None))
        self._hand_on()
        return True

    def _receive_datagram(self, milliseconds: float | None) -> None:
        """Takes a datagram that comes within this time and hands it on; None: that is there already, if any is."""
        flags = channel.CLOEXEC  # waits a SLICE by itself: one system call less
        if milliseconds is None or milliseconds < SLICE or self._reading.level() > 1:
            if milliseconds is not None and not self._readable(milliseconds):
                return
            flags = channel.CLOEXEC_AT_ONCE
        try:
            # In one call of C: a KeyboardInterrupt cannot come between taking it and keeping it.
            self._mail.extend(
                map(
                    self._sock.recvmsg,
                    (channel.DATAGRAM,),
                    (channel.ANCILLARY,),
                    (flags,),
                )
            )
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno in SHORT_OF_MEMORY:
                return  # it is still there
            self._mail.append((b"", [], 0, None))
        self._hand_on_from(self._mail)

    def _hand_on(self) -> None:
        self._hand_on_from(self._mail)
        self._hand_on_from(self._inbox)

    def _hand_on_from(self, queue: deque[Any]) -> None:
        while queue:
            try:
                received = queue[0]
            except IndexError:  # a call within this one, in a signal handler, has handed it on
                return
            self._dispatch(received)  # handing it on twice does no harm, losing it does
            if queue and queue[0] is received:  # else a call within this one has done it
                queue.popleft()

    # ---- in an event loop -------------------------------------------------------------------

    def read_all(self) -> bool:
        """Hands on all that is there, and waits for nothing. False: another thread reads."""
        level = self._reading.level()
        if not self._reading.take():
            return False
        try:
            if self._rings:
                wake_up(self._rings)
            while not self.has_ended and self._readable(0):
                self._receive_datagram(None)
            if self._ring is not None:
                self._inbox.extend(iter(self._ring._pop, None))
                self._hand_on()
        finally:
            self._reading.restore(level)
        return True

    def sleep_in_a_loop(self) -> bool:
        """The socket is going to be watched. False: there is something to read already."""
        level = self._reading.level()
        if not self._rings or not self._reading.take():  # where another thread reads, it wakes those who wait
            return True
        try:
            return fall_asleep(self._rings)
        finally:
            self._reading.restore(level)
