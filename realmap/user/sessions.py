"""Calls that other user processes answer: sessions with servers, and which of them takes a call.

    me.call(name) ── no route ──▶ the kernel ── UnknownSyscall ──▶ Open ──▶ a session, in the route of that name
                └─── a route ──▶ Lend, once a mapping and session ──▶ the server, by a ring of their own

What a call takes is a generator of `Step`s, each a request: `run` makes them from a thread, `arun` from a task.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import time
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from realmap._core import CLOSED, DIED, ERRNO, NONSENSE, SAID_BYE, STOLEN, Answer, Endpoint
from realmap.errors import InvalidHandle, KernelError, ProcessKilled, ServerDied, SyscallTimeout, UnknownSyscall
from realmap.host import procfs
from realmap.host.signals import pass_on
from realmap.host.translate import shortage
from realmap.serving import nesting
from realmap.user.arguments import call_of
from realmap.user.buffer import Buffer, UserWindow, buffers_in, require_own
from realmap.wire import messages
from realmap.wire.client.requester import Requester
from realmap.wire.seat import BUSY, CHANGES, THREADS, WAITING, SeatPage
from realmap.wire.status import look

if TYPE_CHECKING:
    from realmap.user.process import Process
    from realmap.wire.client.waiter import Waiter

#: Of so many sessions, the last ones, a mapping knows that it is lent to them; one more is told again.
LENT_TO = 64
#: What the page of a session that was closed says: nobody is there.
NONE: Sequence[int] = (0,) * 8


class Step(NamedTuple):
    """A request, and of whom."""

    of: Requester
    message: Any
    holds: object = None


#: Each step is sent its answer.
Steps = Generator[Step, tuple[Any, Answer], Any]


def run(steps: Steps, name: str, timeout: float | None) -> Any:
    """Makes the requests of a call to `name`, within `timeout` seconds in all; what it comes to."""
    until, left = None if timeout is None else time.monotonic() + timeout, timeout
    try:
        step = next(steps)
        while True:
            try:
                got = step.of.request(step.message, timeout=left, name=name, holds=step.holds)
            except BaseException as error:
                step = steps.throw(error)
            else:
                step = steps.send(got)
            left = None if until is None else max(0.0, until - time.monotonic())
    except StopIteration as end:
        return end.value


@functools.cache
def waiters() -> Callable[[Requester], Waiter]:
    """`Waiter.of`. PhysicalMemoryExhaustion: no descriptor is left to load it by."""
    try:
        from realmap.wire.client.waiter import Waiter  # asyncio takes a while to import, and most programs do without
    except OSError as error:
        raise shortage(error, "cannot load what awaits an answer") from None
    return Waiter.of


async def arun(steps: Steps, name: str, timeout: float | None) -> Any:
    """`run`, for asyncio."""
    until, left = None if timeout is None else time.monotonic() + timeout, timeout
    try:
        step = next(steps)
        while True:
            try:
                number, data = step.message.id, step.of.encode(step.message)
                got = await waiters()(step.of).request(number, data, timeout=left, name=name, holds=step.holds)
            except BaseException as error:
                step = steps.throw(error)
            else:
                step = steps.send(got)
            left = None if until is None else max(0.0, until - time.monotonic())
    except StopIteration as end:
        return end.value


class Server(Requester):
    """A session with one seat of a server, as its caller has it."""

    def __init__(self, process: Process, name: str, opened: list[Any], descriptors: list[int]) -> None:
        """By what `Open` was answered. PhysicalMemoryExhaustion: no descriptors are left, or no memory."""
        #: Of the session, of the server's seat, and the server's pid.
        self.number: int
        self.seat: int
        self.server: int
        #: All that this one serves.
        self.names: list[str]
        self.number, self.seat, self.server, spin, self.names = opened
        self.name = name
        self.process = process
        client = self._kernel = process._own_client
        #: Whose numbers its requests have.
        self.counter = client.endpoint
        try:
            if len(descriptors) < (3 if spin else 2):  # Linux delivers what it has room for, and cuts off the rest
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            socket, *ring, page = descriptors
            endpoint = Endpoint._of(socket)
            if isinstance(endpoint, int):
                raise OSError(endpoint, os.strerror(endpoint))
            if ring and (number := endpoint.join(ring[0], int(spin * 1000))):
                raise OSError(number, os.strerror(number))
            #: Of the seat's page, which is unmapped with this.
            self.words: Sequence[int] = SeatPage(page, writable=False).words
        except OSError as error:
            raise shortage(error, f"cannot open a session with a server of {name!r}") from None
        super().__init__(endpoint, client.encoder, client.next_id)

    @property
    def load(self) -> int:
        """How many calls more than its threads it has; below 0: a thread is free."""
        words = self.words
        calls, pending = words[BUSY] + words[WAITING], self.endpoint.pending
        return (calls if calls > pending else pending) - words[THREADS]

    def has(self, args: Any) -> bool:
        """Whether it needs nothing more for these arguments; False also where that takes a closer look."""
        for value in args:
            kind = type(value)
            if kind is Buffer:
                windows = value._windows
                if len(windows) > 1 or self.number not in windows[0].lent_to or value.process is not self.process:
                    return False
            elif kind is list or kind is dict or kind is tuple:
                return False
        return True

    def close(self) -> None:
        """Ends the session. Again: nothing. Where it just goes, the kernel sees that its socket is closed."""
        if self.words is not NONE:
            self.words = NONE
            self._kernel.notice(messages.Close(0, self.number))
        super().close()

    def _after_fork_in_child(self) -> None:
        super()._after_fork_in_child()
        self.words = NONE

    # ---- what its end is called -------------------------------------------------------------

    def unanswered(self, name: str, timeout: float | None, what: str = "answered") -> SyscallTimeout:
        """What is raised where it has not answered in time, or not done `what` it is to do first."""
        stopped = False
        with contextlib.suppress(ProcessLookupError):
            stopped = procfs.is_stopped(self.server)
        is_so = " is stopped (SIGSTOP):" if stopped else ""
        why = f"process {self.server}, which serves {self.name!r},{is_so} has not {what} within {timeout} s"
        return SyscallTimeout(name, timeout, why=why)

    def elsewhere(self) -> KernelError:
        """What is raised in a forked child."""
        why = f"this session belongs to process {self.pid}; a forked child needs its own: me.session({self.name!r})"
        return InvalidHandle(None, why=why)

    def ended(self, unread: bool = False) -> KernelError:
        """Why the session is of no use any more."""
        end = self.endpoint.end
        if self._kernel.has_ended:
            return self._kernel.ended()
        if end == CLOSED:
            return ProcessKilled(self.pid, why="this session was closed")
        if end == STOLEN:
            why = "the descriptor of this session was closed by another part of this program (os.closerange?)"
            return ProcessKilled(self.pid, why=why)
        if end == SAID_BYE:
            try:
                return self.farewell()
            except messages.UNREADABLE as error:
                pass_on(error)
            end = NONSENSE
        said = {DIED: "has ended, or serves no more", NONSENSE: "said what is no message"}
        how = said.get(end) or f"cannot be spoken to ({os.strerror(end - ERRNO)})"
        began = "nothing was done" if unread else "whether its handler had begun is not known"
        why = f"process {self.server}, which served it, {how}: {began}"
        return _seen(ServerDied(self.name, self.server, not unread, why=why))


def _seen(error: ServerDied) -> ServerDied:
    error._here = True
    return error


class Route:
    """Who serves one name, as far as this process has sessions with them."""

    def __init__(self) -> None:
        self.servers: tuple[Server, ...] = ()
        #: Their `changes` when there was nobody else.
        self.nobody_else = -1


NOBODY = Route()


class Routes:
    """The sessions of one process that its calls take. Without a lock: what two threads open at once is one too many,
    and is closed.
    """

    def __init__(self, process: Process) -> None:
        self._process = process
        #: By name.
        self.known: dict[str, Route] = {}

    def close(self) -> None:
        for name in list(self.known):
            for server in self.known.pop(name, NOBODY).servers:
                server.close()

    def plain(self, route: Route, name: str, args: tuple[Any, ...]) -> Any:
        """A call of a few plain values, by a server that is free: what it comes to. NotImplemented, and nothing was
        done: none is free, or as `Endpoint.call`.
        """
        server = self._free(route)
        if server is None:
            return NotImplemented
        got = server.endpoint.call(name, args, server.counter)
        if type(got) is not Answer:
            return got
        try:
            return server.value(got)
        except ServerDied as error:
            refusal = self._lost(server, name, error)
        request = call_of(self._process._own_client, name, args, None, {})
        return run(self.steps(request, refusal, server), name, None)

    def call(self, request: messages.Call, timeout: float | None) -> Any:
        """Makes a call; as `steps` has it, but in one go where a server is free, and has what it needs."""
        server = self._free(self.known.get(request.name, NOBODY))
        if server is None or not server.has(request.args):
            return run(self.steps(request), request.name, timeout)
        try:
            return server.request(request, timeout=timeout, name=request.name, holds=request.args)[0]
        except ServerDied as error:
            refusal = self._lost(server, request.name, error)
        return run(self.steps(request, refusal, server), request.name, timeout)

    @staticmethod
    def _free(route: Route) -> Server | None:
        """One that has a thread free. None: none, or a handler of a service asks, which must not wait for itself."""
        if nesting.here.get() is None:
            for server in route.servers:
                words, endpoint = server.words, server.endpoint
                # `load`, without a call: this is asked at every one.
                if words[BUSY] + words[WAITING] < words[THREADS] > endpoint.pending and not endpoint.end:
                    return server
        return None

    def _lost(self, server: Server, name: str, error: ServerDied) -> ServerDied:
        """The call to `name` goes to another server where that one has ended before it began; else this raises."""
        if not error._here and (error.pid, error.name) != (server.server, name):  # another's, that its handler called
            raise error
        self._forget(server)
        if error.name != name:  # the session was opened for another one
            error = _seen(ServerDied(name, error.pid, error.began, why=error.why))
        if error.began:
            raise error
        return error.with_traceback(None)  # which would hold the arguments

    def steps(self, request: messages.Call, refusal: KernelError | None = None, lost: Server | None = None) -> Steps:
        """Of a call to whichever server is least busy; to another one where that has ended before it began.

        `refusal`: what has been said so far, which is raised where nobody (else) serves this name. `lost`: was tried.
        """
        process, name = self._process, request.name
        tried = [lost.seat] if lost is not None else []
        while True:
            try:
                server = yield from self._choose(name, tried)
            except UnknownSyscall as error:
                raise refusal or error from None
            try:
                return (yield from steps_of(process, server, request))
            except ServerDied as error:
                refusal = self._lost(server, name, error)
                tried.append(server.seat)

    def _choose(self, name: str, tried: list[int]) -> Generator[Step, tuple[Any, Answer], Server]:
        route = self.known.get(name) or Route()
        best, least = None, 0
        for server in route.servers:
            if server.has_ended:
                self._forget(server)
            elif server.seat not in tried:
                load = server.load
                if load < 0:
                    return server
                if best is None or load < least:
                    best, least = server, load
        changes = sum(server.words[CHANGES] for server in route.servers)
        if best is not None and route.nobody_else == changes:
            return best
        try:
            server = yield from self.open(name, [*tried, *(server.seat for server in route.servers)])
        except KernelError:
            if best is None:
                raise
            route.nobody_else = changes
            return best
        for each in {name, *server.names}:
            route = self.known.setdefault(each, Route())
            for known in route.servers:
                if known.seat == server.seat and not known.has_ended:
                    if each == name:  # another thread was quicker
                        return known
                    break
            else:
                route.servers = (*route.servers, server)
        return server

    def open(self, name: str, but: list[int]) -> Generator[Step, tuple[Any, Answer], Server]:
        """A session of one's own. UnknownSyscall: no process serves this, but for those seats."""
        client = self._process._own_client
        opened, answer = yield Step(client, messages.Open(client.next_id(), name, but))
        return Server(self._process, name, opened, answer.descriptors)

    def _forget(self, server: Server) -> None:
        """Its calls go elsewhere from now on; those on their way still have it."""
        for name in {server.name, *server.names}:
            route = self.known.get(name)
            if route is not None:
                route.servers = tuple(each for each in route.servers if each is not server)
                if not route.servers:
                    self.known.pop(name, None)


def steps_of(process: Process, server: Server, request: messages.Call) -> Steps:
    """Of a call to one server: what it brings is lent first."""
    here = nesting.within(process.path)
    if here is not None and here.seats:
        request = messages.NestedCall(
            request.id, request.name, request.args, request.timeout, request.names, tuple(here.seats)
        )
    for buffer in buffers_in(request.args):
        require_own(process, buffer)
        for window in buffer._windows:
            assert isinstance(window, UserWindow)
            if server.number not in window.lent_to:
                yield from _lend(process, server, request.name, buffer, window)
    if here is None or not here.is_handler:
        value, _ = yield Step(server, request, holds=request.args)
        return value
    wait = server.number, request.id, time.monotonic_ns()
    here.waits[wait] = None
    try:
        value, _ = yield Step(server, request, holds=request.args)
    finally:
        del here.waits[wait]
    return value


def _lend(process: Process, server: Server, name: str, buffer: Buffer, window: UserWindow) -> Steps:
    window.recycles = 0  # somebody else will have it mapped
    client = process._own_client
    try:
        # `holds`: where another thread unmaps it now, what is mapped there next is not lent in its place.
        yield Step(client, messages.Lend(client.next_id(), server.number, window._base), holds=(buffer,))
    except ServerDied as error:  # the kernel has noticed first
        raise _seen(ServerDied(server.name, server.server, False, why=error.why)) from None
    except SyscallTimeout as error:
        status = look(process.path)
        if status is not None and status.is_stuck:
            raise
        raise server.unanswered(name, error.timeout, "read what it is lent") from None
    window.lent_to = (*window.lent_to[1 - LENT_TO :], server.number)


class Session:
    """One server of a name, for all calls that are made by it. Made by `Process.session`. A context manager.

    `me.call(name)` takes whichever server is free; here it is the same one each time, which may keep something in
    between. It may be used from many threads. A forked child needs its own.
    """

    def __init__(self, process: Process, server: Server) -> None:
        self._process = process
        self._server = server

    @property
    def name(self) -> str:
        """What it was opened for."""
        return self._server.name

    @property
    def pid(self) -> int:
        """The server's pid."""
        return self._server.server

    def call(self, name: str, /, *args: Any, timeout: float | None = None, **kwargs: Any) -> Any:
        """`Process.call`, of this server, which may serve other names as well.

        UnknownSyscall: it does not serve this. ServerDied: it has ended, or serves no more. ProcessKilled: the session
        was closed. InvalidHandle: this is a forked child. Else as there.
        """
        if timeout is None and not kwargs and nesting.here.get() is None:
            got = self._server.endpoint.call(name, args, self._server.counter)
            if got is not NotImplemented:
                return self._server.value(got) if type(got) is Answer else got
        return run(self._steps(name, args, timeout, kwargs), name, timeout)

    async def acall(self, name: str, /, *args: Any, timeout: float | None = None, **kwargs: Any) -> Any:
        """`call`, for asyncio."""
        return await arun(self._steps(name, args, timeout, kwargs), name, timeout)

    def _steps(self, name: str, args: Any, timeout: float | None, kwargs: dict[str, Any]) -> Steps:
        self._server.check(unread=True)
        return steps_of(self._process, self._server, call_of(self._process._client, name, args, timeout, kwargs))

    def close(self) -> None:
        """Ends it; the server is told. Again: nothing."""
        self._server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise TypeError("a Session is this process's own and cannot be pickled; open another one there")

    def __repr__(self) -> str:
        ended = ", ended" if self._server.has_ended else ""
        return f"<Session {self._server.number} with process {self.pid}, which serves {self.name!r}{ended}>"
