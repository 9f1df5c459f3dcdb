"""`Service`: this process serves others. See `Process.serve`."""

from __future__ import annotations

import errno
import itertools
import os
import resource
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Self, SupportsIndex

from realmap.errors import KernelDied, PhysicalMemoryExhaustion
from realmap.host.signals import Flag
from realmap.host.translate import shortage
from realmap.memory.lands import LENT_LAND
from realmap.memory.lending import LentLand
from realmap.pages import usize
from realmap.serving import nesting
from realmap.serving.registry import registry
from realmap.serving.user_buffer import UserBuffer
from realmap.user.service.seat import Seat
from realmap.user.service.server import Server
from realmap.wire import messages

if TYPE_CHECKING:
    from realmap.user.process import Process

#: LentLand is shared out in so many parts: each service of this process has one, in turn.
PARTS = 16
#: What one caller lends takes one in so many of the descriptors that this process may open, at most.
SHARE = 4
_part = itertools.count()


class Service:
    """Handlers that run in this process, for whoever calls them by their names. A context manager, and one for
    `async with`, which keeps its event loop going while it closes.

    Their threads are its own: this one may wait (`wait`), or go on. In a forked child it is closed.
    """

    def __init__(
        self,
        process: Process,
        handlers: Iterable[Callable[..., Any]],
        threads: SupportsIndex,
        queue: SupportsIndex,
        lazy_unmap: SupportsIndex,
    ) -> None:
        """As `Process.serve`."""
        self._handlers = registry(handlers, UserBuffer, may_be_async=True)
        if not self._handlers:
            raise ValueError("a service has a handler, at least")
        count, waiting = usize(threads, "threads"), usize(queue, "queue")
        if not count:
            raise ValueError("a service has a thread, at least")
        length = LENT_LAND.length // PARTS
        land = LentLand(LENT_LAND.start + next(_part) % PARTS * length, length, lazy_unmap=lazy_unmap)
        self._process = process
        self._ended = Flag()
        self._closed = False
        self._pid = os.getpid()
        client = process._own_client
        share = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // SHARE
        request = messages.Serve(client.next_id(), list(self._handlers), count, waiting, share)
        number, answer = client.request(request, name="serve")
        try:
            if len(answer.descriptors) < 2:  # Linux delivers what it has room for, and cuts off the rest
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            seat = Seat(number, process.path, *answer.descriptors)
            self._seat = seat.number
            try:
                self._server = Server(seat, self._handlers, land, count, waiting, share)
                self._server.ended = self._ended.set
                self._server.open()
            except BaseException:
                seat.close()
                raise
        except OSError as error:
            raise shortage(error, "cannot serve") from None
        except RuntimeError as error:
            raise PhysicalMemoryExhaustion(why=f"no thread for a service: {error}") from None
        answer.take()

    @property
    def names(self) -> tuple[str, ...]:
        """What it serves."""
        return tuple(self._handlers)

    @property
    def calls(self) -> int:
        """How many calls have come so far."""
        return sum(syscall.calls for syscall in self._handlers.values())

    @property
    def has_ended(self) -> bool:
        """Whether it was closed, or its kernel has ended."""
        return self._ended.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until it has ended, at most `timeout` seconds; whether it has.

        KernelDied, ProcessKilled: because its kernel, or this Process, has. Ctrl-C ends the wait, not the service.
        """
        ended = self._ended.wait(timeout)
        if ended and not self._closed and self._pid == os.getpid():
            self._process._client.check()
            why = "the kernel has ended, or has given up this service, which did not read its socket"
            raise KernelDied(self._process.path, why=why) from self._server.error
        return ended

    def close(self, timeout: float | None = None) -> None:
        """Ends it: calls that are at work end first, those that wait go to another server, or are ServerDied to their
        callers. Again: nothing. In a handler of its own it does not wait for itself: it ends once that has returned.

        TimeoutError: some are at work after `timeout` seconds (None: as long as they take); it ends with them.
        """
        if self._pid != os.getpid():
            return
        self._closed = True
        self._server.end_soon()
        here = nesting.within(self._process.path)
        if here is not None and self._seat in here.seats:
            return
        if not self._ended.wait(timeout):
            raise TimeoutError(f"calls of {', '.join(self._handlers)} are at work after {timeout} s")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        import asyncio  # it takes a while, and most programs do without

        await asyncio.to_thread(self.close)

    def __repr__(self) -> str:
        state = "ended" if self.has_ended else f"{self.calls} calls so far"
        return f"<Service of {', '.join(self._handlers)}: {state}>"
