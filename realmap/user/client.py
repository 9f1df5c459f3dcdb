"""The connection of a user process to its kernel. May be used from many threads.

There is no thread of its own: of those that wait for an answer, one reads the socket and hands
the others theirs (it leads); when it has its own, the next one leads.

An answer can be given up (a timeout, Ctrl-C). Its request stays known until the kernel has
answered: what it sent along is held until then, and what the answer brings is given back.
"""

from __future__ import annotations

import itertools
import os
import select
import time
from collections import deque
from collections.abc import Callable
from threading import Lock, RLock
from typing import Any

import msgspec

from realmap._host import Ring, Turn, fall_asleep, spin, wake_up
from realmap.errors import (
    InvalidHandle,
    KernelDied,
    KernelError,
    ProcessKilled,
    SyscallTimeout,
    VersionMismatch,
)
from realmap.host import files, forks, procfs
from realmap.host.translate import SHORT_OF_MEMORY, shortage
from realmap.user import handshake
from realmap.user.handshake import SLICE
from realmap.wire import channel, messages
from realmap.wire.messages import PROTOCOL, VERSION
from realmap.wire.ring import LONGEST, OVERLOADED, SAME_CPU, RingEnd, SpinBudget

Received = tuple[bytes, list[tuple[int, int, bytes]], int, Any]


class Pending(msgspec.Struct):  # a Struct because it is made in C: one for every call
    """A request on its way: its answer when it is there, and what happens to an answer that comes too late."""

    holds: object
    late: Callable[[Any], None] | None
    reply: messages.Done | messages.Failed | None = None
    descriptors: list[int] = []
    #: Held; released to wake the thread that waits for the reply. A bare lock: each use of it is one call of C.
    event: Any = None
    abandoned: bool = False
    carried: bool = False
    spun: bool = False
    #: What was sent of it so far, and how many parts it has. Noted in the same call of C that sends.
    sent: list[Any] = []
    parts: int = 1

    def wake(self) -> None:
        """Wakes the thread that waits, if one does."""
        try:
            self.event.release()
        except (AttributeError, RuntimeError):  # nobody waits, or it was woken before
            pass


class Client:
    """A connection, from its handshake to its end. `number` is this process's name in the kernel's books."""

    def __init__(
        self,
        path: str,
        *,
        control: bool = False,
        encoder: msgspec.msgpack.Encoder | None = None,
        timeout: float | None = None,
    ) -> None:
        """Connects and introduces itself.

        KernelDied: no kernel listens at `path`. VersionMismatch: it is of another version.
        AccessDenied: it does not let this process in. InvalidHandle: `path` is no socket of a kernel.
        PhysicalMemoryExhaustion: one of the two has no descriptors left, or Linux no memory for it.
        """
        self.path = path
        self.pid = os.getpid()
        self._encoder = encoder or msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(messages.Reply)
        self._ids = itertools.count(1)
        self._pending: dict[int, Pending] = {}
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
        self._state = RLock()
        self._notices: deque[bytes] = deque()
        self._error: KernelError | None = None
        self._lost_in_child = False
        self._sock = handshake.open_socket(path)
        self._poll = select.poll()
        self._poll.register(self._sock, select.POLLIN)
        try:
            self.number, self.kernel_pid = self._introduce(control, timeout)
        except BaseException as error:
            files.shut(self._sock)
            if isinstance(error, OSError):
                raise shortage(error, f"cannot connect to {path!r}") from None
            raise
        forks.lose_in_child(self)

    def _introduce(self, control: bool, timeout: float | None) -> tuple[int, int]:
        hello = messages.Hello(PROTOCOL, VERSION, self.pid, procfs.start_time(self.pid), control)
        self._send(self._encoder.encode(hello), None, Pending(None, None))
        welcome, ring = handshake.welcome(self._sock, self.path, timeout)
        if ring is not None:
            self._ring = ring
            self._rings = [ring]
            self._spin = SpinBudget(welcome.spin)
        #: What its forked children show to the kernel.
        self.secret = welcome.secret
        return welcome.process, welcome.kernel

    # ---- requests ---------------------------------------------------------------------------

    def next_id(self) -> int:
        """A number for a request."""
        return next(self._ids)

    def request(
        self,
        message: Any,
        *,
        timeout: float | None = None,
        name: str = "",
        holds: object = None,
        late: Callable[[Any], None] | None = None,
        into: list[Any] | None = None,
    ) -> tuple[Any, list[int]]:
        """Sends a request, and waits for its answer: (value, descriptors, which are the caller's).

        `holds` is kept until the kernel has answered, `late` is called with the value of an answer
        that nobody waits for any more. `into`: both are appended to it as well, so that the caller has
        them whatever interrupts it. SyscallTimeout: no answer (to the syscall `name`) within
        `timeout` seconds. KernelDied, ProcessKilled: there will be none. PhysicalMemoryExhaustion: Linux has
        no memory to send it, or to wait for the answer. Else the kernel's own error.
        """
        if self._error is not None or self._lost_in_child:
            self.check()
        number = message.id
        data = self._encoder.encode(message)
        deadline = None if timeout is None else time.monotonic() + timeout
        level = self._reading.level()
        pending = Pending(holds, late)
        try:
            self._pending[number] = pending
            if deadline is not None or not self._exchange(data, pending):
                self._send(data, deadline, pending)
            if pending.reply is None:
                self._wait(pending, deadline)
            reply = pending.reply
            assert reply is not None
            if isinstance(reply, messages.Failed):
                raise messages.exception_of(reply.error)
            if into is not None:
                into.extend((reply.value, pending.descriptors))
            self._pending.pop(number, None)
            return reply.value, pending.descriptors
        except TimeoutError as error:
            self._give_up(number, pending)
            if isinstance(error, KernelError):  # a handler's own
                raise
            raise SyscallTimeout(name, timeout, why=f"no answer to {name!r} within {timeout} s") from None
        except BaseException as error:
            self._reading.restore(level)
            self._give_up(number, pending)
            if isinstance(error, OSError) and not isinstance(error, KernelError):
                raise shortage(error, "cannot speak with the kernel") from None
            raise

    def notice(self, message: Any) -> None:
        """Sends a request that wants no answer; later if it cannot be sent now. Safe in a destructor: never waits."""
        if self._error is None and self.pid == os.getpid():
            self._notices.append(self._encoder.encode(message))
            self._flush_notices()

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

    def check(self) -> None:
        """InvalidHandle: this is a forked child. KernelDied, ProcessKilled: the connection has ended."""
        if self.pid != os.getpid():
            raise InvalidHandle(
                None,
                why=f"this connection belongs to process {self.pid}; a forked child needs its own: "
                f"realmap.connect({self.path!r})",
            )
        if self._error is not None:
            raise self._ended()

    def _ended(self) -> KernelError:
        assert self._error is not None
        return type(self._error)(*self._error.facts().values(), why=self._error.why)

    def _give_up(self, number: int, pending: Pending) -> None:
        """Nobody waits for this answer any more. Where it has come already, or never will, that is all."""
        with self._state:
            pending.abandoned = True
            sent = len(pending.sent) >= pending.parts
            over = pending.reply is not None or self._error is not None or not sent
        if over:
            self._dispose(number, pending)

    def _dispose(self, number: int, pending: Pending) -> None:
        """Gives back what an abandoned answer brought. Done again where an interrupt came in between."""
        channel.close_all(pending.descriptors)
        if pending.late is not None and isinstance(pending.reply, messages.Done):
            pending.late(pending.reply.value)
        self._pending.pop(number, None)

    # ---- sending ----------------------------------------------------------------------------

    def _exchange(self, message: bytes, pending: Pending) -> bool:
        """The common case in short: sends by the ring, and hands on the answer if it comes while it is worth spinning.

        False: nothing was sent; it goes another way.
        """
        ring, got = self._ring, 0
        level = self._reading.level()
        if ring is None or self._notices or not self._reading.take():
            return False
        try:
            inbox = self._inbox
            if inbox or self._mail:
                self._hand_on()
            spins = self._spin
            patience = spins.nanoseconds() if spins.busy_until else spins.budget
            got = ring._exchange(message, patience, inbox, self._sock.fileno(), pending.sent)
            if got == 3:
                if patience < spins.most:
                    spins.won()
                first = inbox[0] if inbox else b""
                try:
                    reply = self._decoder.decode(first)
                except msgspec.MsgspecError:
                    reply = None  # not sound: it is handed on below
                if isinstance(reply, messages.Done) and self._pending.get(reply.id) is pending:
                    if reply.descriptors:
                        self._await_carrier(pending)
                    pending.reply = reply
                    if inbox and inbox[0] is first:  # else a call within this one has handed it on
                        inbox.popleft()
                if inbox:
                    self._hand_on()
            elif got == 4:
                spins.overloaded()
            elif got == 6:
                spins.lost()
                pending.spun = True
        except ValueError:
            self.check()  # it may be the parent's ring
            raise
        finally:
            self._reading.restore(level)
        if len(self._pending) > 1:
            self._pass_on()
        return got != 0

    def _send(self, message: bytes, deadline: float | None, pending: Pending) -> None:
        if self._notices:
            self._flush_notices()
        ring, sent = self._ring, pending.sent
        if ring is not None and len(message) <= LONGEST:
            # In one call of C: an interrupt cannot come between sending and noting that it was sent.
            sent.extend(filter(None, map(ring._offer, (message,), (self._sock.fileno(),))))
            if sent:
                return
        parts = channel.datagrams(message)
        if len(parts) == 1:
            self._send_part(parts[0], deadline, sent)
            return
        pending.parts = len(parts)
        with self._sending:  # the parts of one message must not mix with those of another
            for part in parts:
                self._send_part(part, deadline, sent)

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

    def _wait(self, pending: Pending, deadline: float | None) -> None:
        level = self._reading.level()
        while pending.reply is None:
            if self._error is not None:
                raise self._ended()
            if self._reading.take():  # it leads: it reads for all
                try:
                    while pending.reply is None:
                        if self._error is not None:
                            raise self._ended()
                        self._receive(self._slice(deadline), spinning=not pending.spun)
                        pending.spun = False
                finally:
                    self._reading.restore(level)
                    self._pass_on()
            elif pending.event is None:
                event = Lock()
                event.acquire()
                pending.event = event  # seen by the leader from now on: so try to lead once more
            else:
                pending.event.acquire(timeout=self._slice(deadline) / 1000)

    def _pass_on(self) -> None:
        """Lets the next one lead."""
        for other in list(self._pending.values()):
            if other.reply is None and other.event is not None:
                other.wake()
                return

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

    def _dispatch(self, received: Received | bytes) -> None:
        ancillary: list[tuple[int, int, bytes]] = []
        try:
            if isinstance(received, bytes):
                message: bytes | None = received
            elif received[0]:
                ancillary = received[1]
                message = self._assembler.feed(received[0])
            else:
                self._end(KernelDied(self.path, why=f"the kernel at {self.path!r} has died"))
                return
            reply = self._decoder.decode(message) if message is not None else None
        except (channel.NotAMessage, msgspec.MsgspecError) as error:
            self._end(VersionMismatch(VERSION, "unknown", why=f"the kernel said what is no message: {error}"))
            return
        if reply is None:
            return
        if reply.__class__ is messages.Bye:
            self._end(messages.exception_of(reply.error))
            return
        pending = self._pending.get(reply.id)
        # Every answer has its request: where it has not, or has one already, this is the second
        # time that we see it, after an interrupt. Its descriptors are somebody's already.
        if pending is None:
            return
        if pending.reply is not None:
            if pending.abandoned:
                self._dispose(reply.id, pending)
            return
        if ancillary and not pending.descriptors and not pending.carried:
            # First the list, then what it owns, in one call of C: this may be the second time, after an interrupt.
            pending.descriptors = channel.Descriptors()
            pending.descriptors.extend(channel.descriptors_in(ancillary))
        if isinstance(reply, messages.Carrier):
            pending.carried = True
            return
        if isinstance(reply, messages.Done) and reply.descriptors and isinstance(received, bytes):
            self._await_carrier(pending)
        with self._state:
            pending.reply = reply
            abandoned = pending.abandoned
        if abandoned:
            self._dispose(reply.id, pending)
        elif pending.event is not None:
            pending.wake()

    def _await_carrier(self, pending: Pending) -> None:
        """The descriptors of an answer were sent by the socket before it came by the ring: they are there."""
        self._receive_datagram(None)
        while not pending.carried and self._error is None:
            self._receive_datagram(SLICE)

    def _end(self, error: KernelError) -> None:
        """The connection is over: whoever waits, and whoever calls later, gets `error`."""
        if self._error is None:
            self._error = error
        for pending in list(self._pending.values()):
            pending.wake()
        self._pending.clear()

    def _lost(self, error: OSError) -> KernelError:
        """Sending failed: the kernel may have said why before it closed."""
        level = self._reading.level()
        while self._error is None and self._reading.take():
            try:
                if not self._readable(0):
                    break
                self._receive(0)
            finally:
                self._reading.restore(level)
        if self._error is None:
            self._end(KernelDied(self.path, why=f"the kernel at {self.path!r} has died ({error.strerror})"))
        return self._ended()

    # ---- the end ----------------------------------------------------------------------------

    def close(self) -> None:
        """Ends the connection. Again: nothing."""
        self._end(ProcessKilled(self.pid, why="this Process was closed"))
        files.shut(self._sock)
        self._ring, self._rings = None, []  # unmapped when nobody waits on it any more

    @property
    def is_lost(self) -> bool:
        """Whether this is a forked child: the connection is the parent's."""
        return self._lost_in_child

    @property
    def has_ended(self) -> bool:
        """Whether it is of no use any more: closed, or the kernel has gone."""
        return self._error is not None

    def lose(self) -> None:
        """In a forked child: the parent's socket is not held open (`check` says the rest)."""
        self._lost_in_child = True
        files.shut(self._sock)

    def __del__(self) -> None:
        sock = getattr(self, "_sock", None)
        if sock is not None:
            files.shut(sock)
