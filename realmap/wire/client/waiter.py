"""Waiting for answers in an asyncio event loop: the same requests and the same answers, no thread of its own.

    a thread waits    takes its turn, reads for all, hands on (_core/turn.c)
    a task waits      its loop watches the socket; whoever reads an answer tells the loop, which wakes the task

While a loop watches and no thread reads, the kernel is told that this side sleeps. Its first answer comes with a bell
by the socket, which the loop sees; all that come until the loop has looked come by the ring alone.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from realmap._core import ON_ITS_WAY, Answer, Bell

if TYPE_CHECKING:
    from realmap.wire.client.requester import Requester


#: When it is tried again where Linux had no memory or no descriptor, in seconds.
SOON = 0.05
#: A timeout of more seconds than these is as long as none.
LONGEST = 1e9
#: After so many requests it is looked for answers, whether they were told of or not: half of what the ring holds.
MANY = 16


class Waiter:
    """The requests of one connection whose answers are awaited in one loop. Used in that loop only."""

    def __init__(self, client: Requester, loop: asyncio.AbstractEventLoop) -> None:
        self._client = client
        self._loop = loop
        #: What whoever reads rings, from any thread: an answer is there, or somebody has to read from now on.
        self._bell = Bell(self._look, loop.call_soon_threadsafe, loop.is_closed)
        self._waiting: dict[Answer, asyncio.Future[None]] = {}
        self._looking = False
        self._watching = 0

    @classmethod
    def of(cls, client: Requester) -> Waiter:
        """That of the running loop. RuntimeError: none runs."""
        loop = asyncio.get_running_loop()
        waiter = client.waiters.get(loop)
        if waiter is None:
            client.forget_closed_loops()
            waiter = client.waiters[loop] = cls(client, loop)
        return waiter

    async def request(
        self, message: Any, *, timeout: float | None, name: str, holds: object = None
    ) -> tuple[Any, Answer]:
        """As `Requester.request`, where nothing has to be given back."""
        client = self._client
        data = client.encode(message)
        if client.endpoint.end:
            client.check(unread=True)
        future = self._loop.create_future()
        task, timer = asyncio.current_task(self._loop), None
        cancelled = task.cancelling() if task is not None else 0
        answer = client.endpoint.start(message.id, data, holds, self._bell)
        self._waiting[answer] = future
        try:
            if timeout is not None:
                # Cancelled by C: a signal handler that raises in there would be the timer's end.
                timer = self._loop.call_later(min(timeout, LONGEST), future.cancel)
            # Who is alone is often answered by now; of many, the others are seen when the loop comes round, or before
            # there is no room in the ring for more.
            if len(self._waiting) % MANY == 1 or not (self._watching and client.endpoint.is_armed):
                self._look()
            if answer.outcome == ON_ITS_WAY:
                await future
        except asyncio.CancelledError:
            if task is None or task.cancelling() > cancelled:
                raise
        finally:
            self._waiting.pop(answer, None)
            if timer is not None:
                timer.cancel()
            if not self._waiting:
                self._watch(0)
            if given_up := answer.outcome == ON_ITS_WAY:
                client.endpoint.give_up(answer)
        if given_up:
            raise client.unanswered(name, timeout)
        return client.value(answer), answer

    # ---- looking ------------------------------------------------------------------------------

    def _look(self) -> None:
        """Reads what is there, wakes whose answer has come, and has the loop tell of more."""
        if self._looking:
            return
        self._looking = True
        try:
            watch = self._client.endpoint.read(self._bell)
            while (answer := self._bell.first()) is not None:
                future = self._waiting.get(answer)
                if future is not None and not future.done():
                    future.set_result(None)
                self._waiting.pop(answer, None)
                self._bell.drop(answer)
            if not self._waiting:
                watch = 0
            self._watch(1 if watch == 3 else watch)
            if watch == 3:
                self._loop.call_later(SOON, self._bell)
        finally:
            self._looking = False

    def _watch(self, what: int) -> None:
        """0: nothing; 1: the socket for what comes; 2: and for room to send. Noted when done: a handler may come."""
        if what == self._watching:
            return
        fd = self._bell.watch(self._client.endpoint) if what else self._bell.fileno()
        if fd < 0:
            if what:  # no descriptor is left: there may be one again
                self._loop.call_later(SOON, self._bell)
            return
        if what:
            self._loop.add_reader(fd, self._bell)
        if what == 2:
            self._loop.add_writer(fd, self._bell)
        elif self._watching == 2:
            self._loop.remove_writer(fd)
        if not what:
            self._loop.remove_reader(fd)
            self._bell.close()
        self._watching = what

    def after_fork_in_child(self) -> None:
        """In a forked child: the parent's socket is not held open; who waits is told, should the loop go on there."""
        self._bell.close()
        with contextlib.suppress(RuntimeError):  # it is closed
            self._loop.call_soon(self._bell)

    def abandon(self) -> None:
        """Its loop was closed while tasks waited there."""
        self._bell.close()
        for answer in self._waiting:
            self._client.endpoint.give_up(answer)
        self._waiting.clear()
