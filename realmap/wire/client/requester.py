"""Asking by an endpoint, whoever is behind it: requests by number, and their answers.

May be used from many threads, and from signal handlers and destructors: it has no lock. Whose turn it is to read, and
what belongs to whom while something is on its way, is the endpoint's (`_core/endpoint.c`).

An answer can be given up (a timeout, Ctrl-C). Its request stays known until it has been answered: what it sent
along is held until then, and what the answer brings is given back.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from realmap._core import (
    ANSWERED,
    FAILED,
    LOST_IN_CHILD,
    OPEN,
    TIMED_OUT,
    TOO_DEEP,
    TOO_LONG,
    TOO_MUCH,
    Answer,
    Endpoint,
    flaw_of,
)
from realmap.errors import InvalidSize, KernelError, SyscallTimeout
from realmap.host import forks
from realmap.host.signals import pass_on
from realmap.host.translate import shortage
from realmap.wire import messages
from realmap.wire.messages import FLAWS, Done
from realmap.wire.status import Patience

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from realmap.wire.client.waiter import Waiter

#: What becomes of the value of an answer that nobody took. Where it returns bytes, they are said to who answered.
Late = Callable[[Any], object]
_decode = msgspec.msgpack.Decoder(messages.Reply).decode
_bye = msgspec.msgpack.Decoder(messages.Bye).decode


class Requester(ABC):
    """One end of a connection: the one that asks. Who derives from it says what its end is called."""

    def __init__(self, endpoint: Endpoint, encoder: msgspec.msgpack.Encoder, next_id: Callable[[], int]) -> None:
        self.pid = os.getpid()
        self.encoder = encoder
        #: A number for a request.
        self.next_id = next_id
        #: Those who wait for answers in event loops.
        self.waiters: dict[AbstractEventLoop, Waiter] = {}
        self.lost_in_child = False
        self.endpoint = endpoint
        forks.lose_in_child(self)

    # ---- requests ---------------------------------------------------------------------------

    def encode(self, message: Any) -> bytes:
        """Its bytes. TypeError: something in it cannot travel. InvalidSize: it is too much."""
        try:
            data = self.encoder.encode(message)
        except RecursionError:
            raise TypeError(f"this cannot travel: {FLAWS[TOO_DEEP]}") from None
        except OverflowError:
            raise TypeError("an integer beyond 64 bits cannot travel; send it as text or bytes") from None
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

        `holds` is kept until it has been answered. `late`: what becomes of an answer that nobody took, because it
        was given up, or dropped before `Answer.take`. Without a `timeout` it waits as long as the other side lives.

        SyscallTimeout: no answer (to the syscall `name`) within `timeout` seconds. PhysicalMemoryExhaustion: Linux has
        no memory to send it. As `check`: there will be none. Else the error that is the answer.
        """
        unwanted = None if late is None else partial(self._give_back, late)
        answer = self.endpoint.request(message.id, self.encode(message), timeout, holds, unwanted)
        if answer.outcome == TIMED_OUT:
            assert not isinstance(timeout, Patience)  # which raises
            raise self.unanswered(name, timeout)
        return self.value(answer), answer

    def _give_back(self, late: Late, data: bytes) -> object:
        return late(_decode(data).value)

    def value(self, answer: Answer) -> Any:
        """The value of an answer. As `check`: there is none. Else the error that it is."""
        if answer.outcome != ANSWERED:
            if answer.outcome == FAILED:
                raise shortage(OSError(answer.error, os.strerror(answer.error)), "cannot send a request")
            self.check(answer.unread)
        if (value := answer.value) is not NotImplemented:
            return value
        try:
            reply = _decode(answer.data or b"")
            if type(reply) is Done:
                return reply.value
            assert isinstance(reply, messages.Failed)
            error = messages.exception_of(reply.error)
        except messages.UNREADABLE as failure:
            pass_on(failure)
            self.endpoint.reject()
            raise self.ended() from None
        raise error

    def notice(self, message: Any) -> None:
        """Sends a request that wants no answer; later if it cannot be sent now. Safe in a destructor: never waits."""
        self.endpoint.notice(self.encode(message))

    # ---- the end ----------------------------------------------------------------------------

    def check(self, unread: bool = False) -> None:
        """As `elsewhere`: this is a forked child. As `ended`: the connection is of no use any more. `unread`: whether
        nobody can have read what was asked.
        """
        if self.pid != os.getpid():
            raise self.elsewhere()
        if self.has_ended:
            raise self.ended(unread)

    @abstractmethod
    def unanswered(self, name: str, timeout: float | None) -> SyscallTimeout:
        """What is raised where nobody has answered in time."""

    @abstractmethod
    def elsewhere(self) -> KernelError:
        """What is raised in a forked child, whose it is not."""

    @abstractmethod
    def ended(self, unread: bool = False) -> KernelError:
        """What is raised where it is of no use any more."""

    def farewell(self) -> KernelError:
        """Why the other side has ended it, as that said last. UNREADABLE: it made no sense."""
        return messages.exception_of(_bye(self.endpoint.bye or b"").error)

    @property
    def has_ended(self) -> bool:
        return self.endpoint.end not in (OPEN, LOST_IN_CHILD)

    def close(self) -> None:
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
