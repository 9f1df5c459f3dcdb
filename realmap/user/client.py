"""The connection of a user process to its kernel. May be used from many threads.

There is no thread of its own: of those that wait for an answer, one reads the socket and hands
the others theirs (it leads); when it has its own, the next one leads.

An answer can be given up (a timeout, Ctrl-C). Its request stays known until the kernel has
answered: what it sent along is held until then, and what the answer brings is given back.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from threading import Lock, RLock
from typing import TYPE_CHECKING, Any

import msgspec

from realmap._core import wake_up
from realmap.errors import (
    InvalidHandle,
    KernelDied,
    KernelError,
    ProcessKilled,
    SyscallTimeout,
    VersionMismatch,
)
from realmap.host import files, forks, procfs
from realmap.host.translate import shortage
from realmap.user import handshake
from realmap.user.handshake import SLICE
from realmap.user.post import Post, Received
from realmap.wire import channel, messages
from realmap.wire.messages import PROTOCOL, VERSION
from realmap.wire.ring import SpinBudget

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from realmap.user.flow import Flow


class Pending(msgspec.Struct):  # a Struct because it is made in C: one for every call
    """A request on its way: its answer when it is there, and what happens to an answer that comes too late."""

    holds: object
    late: Callable[[Any], object] | None
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

    def wake(self) -> bool:
        """Wakes the thread, or the event loop, that waits; whether one does."""
        try:
            self.event.release()
        except AttributeError:  # nobody waits
            return False
        except RuntimeError:  # it was woken before; or its loop was closed
            return not getattr(self.event, "is_closed", False)
        return True


class Client(Post):
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
        #: Those who wait for answers in event loops.
        self.flows: dict[AbstractEventLoop, Flow] = {}
        self._state = RLock()
        self._error: KernelError | None = None
        self._lost_in_child = False
        super().__init__(path, timeout)
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
        late: Callable[[Any], object] | None = None,
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
            self.give_up(number, pending)
            if isinstance(error, KernelError):  # a handler's own
                raise
            raise SyscallTimeout(name, timeout, why=f"no answer to {name!r} within {timeout} s") from None
        except BaseException as error:
            self._reading.restore(level)
            self.give_up(number, pending)
            if isinstance(error, OSError) and not isinstance(error, KernelError):
                raise shortage(error, "cannot speak with the kernel") from None
            raise

    # ---- the same in steps, for those who wait in an event loop (user/flow.py) ------------------

    def enter(self, message: Any, holds: object) -> tuple[bytes, Pending]:
        """A request that is about to be sent: its bytes, and where its answer will be. TypeError: it cannot travel."""
        self.check()
        data = self._encoder.encode(message)
        pending = self._pending[message.id] = Pending(holds, None)
        return data, pending

    def send(self, message: bytes, pending: Pending) -> None:
        """Sends it, and waits until it can be sent."""
        self._send(message, None, pending)

    def finish(self, number: int, pending: Pending) -> Any:
        """The value of an answer that is there. KernelDied, ProcessKilled: none will come. Else the kernel's error."""
        if pending.reply is None:
            self.check()
        assert pending.reply is not None
        if isinstance(pending.reply, messages.Failed):
            raise messages.exception_of(pending.reply.error)
        self._pending.pop(number, None)
        return pending.reply.value

    def notice(self, message: Any) -> None:
        """Sends a request that wants no answer; later if it cannot be sent now. Safe in a destructor: never waits."""
        if self._error is None and self.pid == os.getpid():
            self._notices.append(self._encoder.encode(message))
            self._flush_notices()

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

    def give_up(self, number: int, pending: Pending) -> None:
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

    def _exchange(self, message: bytes, pending: Pending) -> bool:
        """The common case in short: sends by the ring, and hands on the answer if it comes while it is worth spinning.

        False: nothing was sent; it goes another way.
        """
        ring, got = self._ring, 0
        level = self._reading.level()
        if ring is None or self._notices or not self._reading.take():
            return False
        try:
            if self.flows:  # a loop may have said that this side sleeps
                wake_up(self._rings)
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
            self.pass_on()
        return got != 0

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
                    self.pass_on()
            elif pending.event is None:
                event = Lock()
                event.acquire()
                pending.event = event  # seen by the leader from now on: so try to lead once more
            else:
                pending.event.acquire(timeout=self._slice(deadline) / 1000)

    def pass_on(self) -> None:
        """Lets the next one lead."""
        for other in list(self._pending.values()):
            # Of who has given up, nobody waits any more.
            if other.reply is None and other.event is not None and not other.abandoned and other.wake():
                return

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
