"""Waiting for answers in an asyncio event loop: the same requests and the same answers, no thread of its own.

    a thread waits    takes its turn, reads for all, hands on (_core/turn.c)
    a task waits      its loop watches the socket; whoever reads an answer wakes it

While tasks wait and no thread reads, the kernel is told that this side sleeps, so that what it answers comes by the
socket, which the loop sees.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

from realmap._core import ON_ITS_WAY, Answer
from realmap.errors import SyscallTimeout
from realmap.host import files

if TYPE_CHECKING:
    from realmap.wire.client.client import Client


class Waiter:
    """The requests of one connection whose answers are awaited in one loop. Used in that loop only."""

    def __init__(self, client: Client, loop: asyncio.AbstractEventLoop) -> None:
        self._client = client
        self._loop = loop
        #: What whoever reads calls, from any thread: an answer is there, or somebody has to read from now on.
        #: RuntimeError: the loop is closed; nobody waits there any more.
        self._bell = self._look_soon
        self._waiting: dict[asyncio.Future[None], Answer] = {}
        self._looking = False
        self._watched = -1
        self._watching = 0

    @classmethod
    def of(cls, client: Client) -> Waiter:
        """That of the running loop. RuntimeError: none runs."""
        loop = asyncio.get_running_loop()
        waiter = client.waiters.get(loop)
        if waiter is None:
            for other in [each for each in list(client.waiters) if each.is_closed()]:
                if (left := client.waiters.pop(other, None)) is not None:
                    left._abandon()
            waiter = client.waiters[loop] = cls(client, loop)
        return waiter

    async def request(self, message: Any, *, timeout: float | None, name: str, holds: object) -> Any:
        """As `Client.request`, for an answer without descriptors."""
        client = self._client
        data = client.encode(message)
        client.check()
        answer = client.endpoint.start(message.id, data, holds, self._bell)
        scope = asyncio.timeout(timeout)
        try:
            async with scope:
                await self._over(answer)
        except TimeoutError:
            if not scope.expired():  # a signal handler's own
                raise
            raise SyscallTimeout(name, timeout, why=f"no answer to {name!r} within {timeout} s") from None
        finally:
            if answer.outcome == ON_ITS_WAY:
                client.endpoint.give_up(answer)
        return client.value(answer)

    async def _over(self, answer: Answer) -> None:
        future = self._loop.create_future()
        self._waiting[future] = answer
        try:
            self._look()
            await future
        finally:
            self._waiting.pop(future, None)
            if not self._waiting:
                self._watch(0)

    # ---- looking ------------------------------------------------------------------------------

    def _look_soon(self) -> None:
        self._loop.call_soon_threadsafe(self._look)

    def _look(self) -> None:
        """Reads what is there, wakes whose answer has come, and has the loop tell of more."""
        if self._looking:
            return
        self._looking = True
        try:
            watch = 0
            if self._wake_those_answered():
                watch = self._client.endpoint.read(self._bell)
                if not self._wake_those_answered():
                    watch = 0
            self._watch(watch)
        finally:
            self._looking = False

    def _wake_those_answered(self) -> bool:
        """Whether anybody waits still."""
        for future, answer in list(self._waiting.items()):
            if answer.outcome != ON_ITS_WAY:
                self._waiting.pop(future, None)
                if not future.done():
                    future.set_result(None)
        return bool(self._waiting)

    def _watch(self, what: int) -> None:
        """0: nothing; 1: the socket for what comes; 2: and for room to send."""
        if what == self._watching or (what and self._client.endpoint.fileno() < 0):
            return
        if what and self._watched < 0:
            # Of its own: that of a connection which is closed meanwhile may be another's a moment later.
            self._watched = os.dup(self._client.endpoint.fileno())
        if self._watching == 2:
            self._loop.remove_writer(self._watched)
        if what and not self._watching:
            self._loop.add_reader(self._watched, self._look)
        if what == 2:
            self._loop.add_writer(self._watched, self._look)
        self._watching = what
        if not what:
            self._loop.remove_reader(self._watched)
            self._close()

    def _close(self) -> None:
        if self._watched >= 0:
            files.close(self._watched)
            self._watched = -1

    def _abandon(self) -> None:
        """Its loop was closed while tasks waited there."""
        self._close()
        for answer in self._waiting.values():
            self._client.endpoint.give_up(answer)
        self._waiting.clear()
