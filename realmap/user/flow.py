"""Waiting for answers in an asyncio event loop: the same requests and the same answers, no thread of its own.

    a thread waits    takes its turn, reads for all, hands on (user/client.py)
    a task waits      its loop watches the socket; whoever reads an answer wakes it

While tasks wait and no thread reads, the kernel is told that this side sleeps, so that what it answers takes the
socket, which the loop sees.
"""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING, Any

from realmap.errors import KernelError, SyscallTimeout
from realmap.host import files
from realmap.host.translate import shortage

if TYPE_CHECKING:
    from realmap.user.client import Client, Pending


class Waker:
    """What wakes a task as a lock wakes a thread: from any thread, once or more."""

    __slots__ = ("_flow",)

    def __init__(self, flow: Flow) -> None:
        self._flow = flow

    def release(self) -> None:
        """Has the loop look. RuntimeError: it is closed; nobody waits there any more."""
        self._flow.look_soon()

    @property
    def is_closed(self) -> bool:
        """Whether nobody waits there any more."""
        return self._flow.is_closed


class Flow:
    """The requests of one connection whose answers are awaited in one loop. Used in that loop only."""

    def __init__(self, client: Client, loop: asyncio.AbstractEventLoop) -> None:
        self._client = client
        self._loop = loop
        self._thread = threading.get_ident()
        self._waker = Waker(self)
        self._waiting: dict[asyncio.Future[None], tuple[int, Pending]] = {}
        self._looking = False
        self._watched = -1

    @classmethod
    def of(cls, client: Client) -> Flow:
        """That of the running loop. RuntimeError: none runs."""
        loop = asyncio.get_running_loop()
        flow = client.flows.get(loop)
        if flow is None:
            for other in [each for each in list(client.flows) if each.is_closed()]:
                if (left := client.flows.pop(other, None)) is not None:
                    left._abandon()
            flow = client.flows[loop] = cls(client, loop)
        return flow

    async def request(self, message: Any, *, timeout: float | None, name: str, holds: object) -> Any:
        """As `Client.request`, for an answer without descriptors."""
        client, number = self._client, message.id
        self._thread = threading.get_ident()
        data, pending = client.enter(message, holds)
        try:
            async with asyncio.timeout(timeout):
                if not client.send_at_once(data, pending.sent):
                    await self._send(data, pending)
                await self._answer(number, pending)
            return client.finish(number, pending)
        except TimeoutError as error:
            client.give_up(number, pending)
            if isinstance(error, KernelError):  # a handler's own
                raise
            raise SyscallTimeout(name, timeout, why=f"no answer to {name!r} within {timeout} s") from None
        except BaseException as error:
            client.give_up(number, pending)
            if isinstance(error, OSError) and not isinstance(error, KernelError):
                raise shortage(error, "cannot speak with the kernel") from None
            raise

    async def _send(self, data: bytes, pending: Pending) -> None:
        """What is long, or finds the socket full, is sent on a thread, which may have to wait."""
        sending = self._loop.run_in_executor(None, self._client.send, data, pending)
        try:
            await asyncio.shield(sending)
        except asyncio.CancelledError:
            while not sending.done():  # only then is it known whether it was sent
                try:
                    await asyncio.wait([sending])
                except asyncio.CancelledError:
                    continue
            raise

    async def _answer(self, number: int, pending: Pending) -> None:
        future = self._loop.create_future()
        self._waiting[future] = number, pending
        pending.event = self._waker  # seen by whoever reads from now on: so look once more
        try:
            self._look()
            await future
        finally:
            self._waiting.pop(future, None)
            self._rest()

    # ---- looking ------------------------------------------------------------------------------

    def look_soon(self) -> None:
        """From any thread: an answer is there, or somebody has to read from now on."""
        if threading.get_ident() != self._thread:
            self._loop.call_soon_threadsafe(self._look)
        elif not self._looking:
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        """Reads what is there, wakes whose answer has come, and has the loop tell of more."""
        if self._looking:
            return
        self._looking = True
        try:
            client = self._client
            while self._wake_those_answered():
                if not client.read_all():  # another reads, and wakes us
                    self._watch(False)
                    return
                self._wake_those_answered()
                if not self._waiting or client.sleep_in_a_loop():
                    break
            if self._waiting:
                self._watch(True)
        finally:
            self._looking = False
            self._rest()

    def _rest(self) -> None:
        """Where nobody waits here any more, others may have to read: threads, or another loop."""
        if not self._waiting and not self._looking:
            self._watch(False)
            self._client.pass_on()

    def _wake_those_answered(self) -> bool:
        """Whether anybody waits still."""
        ended = self._client.has_ended
        for future, (_, pending) in list(self._waiting.items()):
            if pending.reply is not None or ended:
                del self._waiting[future]
                if not future.done():
                    future.set_result(None)
        return bool(self._waiting)

    def _watch(self, watch: bool) -> None:
        if watch and self._watched < 0 and self._client.fileno() >= 0:
            # Of its own: that of a connection which is closed meanwhile may be another's a moment later.
            self._watched = os.dup(self._client.fileno())
            self._loop.add_reader(self._watched, self._look)
        elif not watch and self._watched >= 0:
            self._loop.remove_reader(self._watched)
            files.close(self._watched)
            self._watched = -1

    @property
    def is_closed(self) -> bool:
        """Whether its loop is."""
        return self._loop.is_closed()

    def _abandon(self) -> None:
        """Its loop was closed while tasks waited there."""
        if self._watched >= 0:
            files.close(self._watched)
            self._watched = -1
        for number, pending in self._waiting.values():
            self._client.give_up(number, pending)
        self._waiting.clear()
