"""The connection of a process to its kernel: requests by number, answers, and what it means where there is none.

May be used from many threads, and from signal handlers and destructors: it has no lock. Whose turn it is to read, and
what belongs to whom while something is on its way, is the endpoint's (`_core/endpoint.c`).

An answer can be given up (a timeout, Ctrl-C). Its request stays known until the kernel has answered: what it sent
along is held until then, and what the answer brings is given back.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from realmap._core import (
    ANSWERED,
    CLOSED,
    DIED,
    ERRNO,
    FAILED,
    LOST_IN_CHILD,
    NONSENSE,
    OPEN,
    SAID_BYE,
    STOLEN,
    TIMED_OUT,
    TOO_DEEP,
    TOO_LONG,
    TOO_MUCH,
    Answer,
    Endpoint,
    flaw_of,
)
from realmap.errors import (
    InvalidHandle,
    InvalidSize,
    KernelDied,
    KernelError,
    ProcessKilled,
    VersionMismatch,
)
from realmap.host import forks
from realmap.host.translate import shortage
from realmap.wire import messages, status
from realmap.wire.client import handshake
from realmap.wire.messages import FLAWS, VERSION, Done
from realmap.wire.status import Patience

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from realmap.wire.client.waiter import Waiter

#: What becomes of the value of an answer that nobody took. Where it returns bytes, they are said to the kernel.
Late = Callable[[Any], object]


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
        """Connects and introduces itself, within `timeout` seconds, or else as `Patience` says (SyscallTimeout).

        KernelDied: no kernel listens at `path`. VersionMismatch: it is of another version.
        AccessDenied: it does not let this process in. InvalidHandle: `path` is no socket of a kernel.
        PhysicalMemoryExhaustion: one of the two has no descriptors left, or Linux no memory for it.
        """
        self.path = path
        self.pid = os.getpid()
        self._encoder = encoder or msgspec.msgpack.Encoder()
        self._decode = msgspec.msgpack.Decoder(messages.Reply).decode
        self._bye = msgspec.msgpack.Decoder(messages.Bye)
        #: A number for a request.
        self.next_id: Callable[[], int] = itertools.count(1).__next__
        #: Those who wait for answers in event loops.
        self.waiters: dict[AbstractEventLoop, Waiter] = {}
        self.lost_in_child = False
        self.endpoint: Endpoint = handshake.open_endpoint(path, timeout)
        forks.lose_in_child(self)
        welcome = handshake.introduce(self.endpoint, path, control, self._encoder, timeout)
        self.number, self.kernel_pid = welcome.process, welcome.kernel
        #: What its forked children show to the kernel.
        self.secret = welcome.secret

    # ---- requests ---------------------------------------------------------------------------

    def encode(self, message: Any) -> bytes:
        """Its bytes. TypeError, OverflowError: something in it cannot travel. InvalidSize: it is too much."""
        try:
            data = self._encoder.encode(message)
        except RecursionError:
            raise TypeError(f"this cannot travel: {FLAWS[TOO_DEEP]}") from None
        if flaw := flaw_of(data):
            if flaw in (TOO_MUCH, TOO_LONG):
                raise InvalidSize(len(data), why=FLAWS[flaw])
            raise TypeError(f"this cannot travel: {FLAWS[flaw]}")
        return data

    def request(
        self,
        message: Any,
        *,
        timeout: float | Patience | None = None,
        name: str = "",
        holds: object = None,
        late: Late | None = None,
    ) -> tuple[Any, Answer]:
        """Sends a request, and waits for its answer: its value, and what owns the descriptors that came with it.

        `holds` is kept until the kernel has answered. `late`: what becomes of an answer that nobody took, because it
        was given up, or dropped before `Answer.take`. Without a `timeout` it waits as long as the kernel lives.

        SyscallTimeout: no answer (to the syscall `name`) within `timeout` seconds. KernelDied, ProcessKilled: there
        will be none. PhysicalMemoryExhaustion: Linux has no memory to send it. Else the kernel's own error.
        """
        unwanted = None if late is None else partial(self._give_back, late)
        answer = self.endpoint.request(message.id, self.encode(message), timeout, holds, unwanted)
        if answer.outcome == TIMED_OUT:
            assert not isinstance(timeout, Patience)  # which raises
            raise status.unanswered(self.path, name, timeout)
        return self.value(answer), answer

    def _give_back(self, late: Late, data: bytes) -> object:
        return late(self._decode(data).value)

    def value(self, answer: Answer) -> Any:
        """The value of an answer. KernelDied, ProcessKilled: there is none. Else the kernel's error."""
        if answer.outcome != ANSWERED:
            if answer.outcome == FAILED:
                raise shortage(OSError(answer.error, os.strerror(answer.error)), "cannot speak with the kernel")
            self.check()
        try:
            reply = self._decode(answer.data or b"")
        except msgspec.MsgspecError:
            self.endpoint.reject()
            raise self._ended() from None
        if type(reply) is Done:
            return reply.value
        assert isinstance(reply, messages.Failed)
        raise messages.exception_of(reply.error)

    def notice(self, message: Any) -> None:
        """Sends a request that wants no answer; later if it cannot be sent now. Safe in a destructor: never waits."""
        self.endpoint.notice(self.encode(message))

    # ---- the end ----------------------------------------------------------------------------

    def check(self) -> None:
        """InvalidHandle: this is a forked child. KernelDied, ProcessKilled: the connection has ended."""
        if self.pid != os.getpid():
            raise InvalidHandle(
                None,
                why=f"this connection belongs to process {self.pid}; a forked child needs its own: "
                f"realmap.connect({self.path!r})",
            )
        if self.has_ended:
            raise self._ended()

    def _ended(self) -> KernelError:
        """Why the connection is of no use any more."""
        end = self.endpoint.end
        if end == SAID_BYE:
            with contextlib.suppress(msgspec.MsgspecError):
                return messages.exception_of(self._bye.decode(self.endpoint.bye or b"").error)
            end = NONSENSE
        if end == CLOSED:
            return ProcessKilled(self.pid, why="this Process was closed")
        if end == STOLEN:
            why = "the descriptor of this connection was closed by another part of this program (os.closerange?)"
            return ProcessKilled(self.pid, why=f"{why}; connect again: realmap.connect({self.path!r})")
        if end == NONSENSE:
            return VersionMismatch(VERSION, "unknown", why="the kernel said what is no message")
        why = status.why_it_died(self.path)
        return KernelDied(self.path, why=why if end == DIED else f"{why} ({os.strerror(end - ERRNO)})")

    @property
    def has_ended(self) -> bool:
        """Whether it is of no use any more: closed, or the kernel has gone."""
        return self.endpoint.end not in (OPEN, LOST_IN_CHILD)

    def close(self) -> None:
        """Ends the connection. Again: nothing."""
        self.endpoint.close()
        self.forget_closed_loops()

    def forget_closed_loops(self) -> None:
        """Nobody waits in those any more."""
        for loop in [each for each in list(self.waiters) if each.is_closed()]:
            if (left := self.waiters.pop(loop, None)) is not None:
                left.abandon()

    def _after_fork_in_child(self) -> None:
        """In a forked child: the parent's socket is not held open (`check` says the rest)."""
        self.lost_in_child = True
        self.endpoint.lose()
        for waiter in list(self.waiters.values()):
            waiter.after_fork_in_child()
