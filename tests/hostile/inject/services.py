"""Part D: SIGKILL of the server, the caller or the kernel at named points of a call to a service, and what is left.

A point is a step of one side, in Python: the process dies as it is about to take it, or right after it. The call takes
a range that begins and ends within a page, of a mapping with more pieces than one message has descriptors.

    bystander ══▶ its own server     another name; its bytes and its calls must go on
    waiter    ══▶ server             at work there when it happens: must be told, or go on
    caller    ══▶ server             the call that the point is of
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import served
from kills import Rounds, Tally
from served import BOUND, Reaped, Served

import realmap
from realmap import PAGE_SIZE, Call, KernelDied, KernelError, ProcessKilled, UserBuffer
from realmap.host import procfs
from realmap.kernel.seats import Seats
from realmap.memory import LentMapping
from realmap.memory.lands import LENT_LAND
from realmap.serving.line import Line
from realmap.user import sessions
from realmap.user.service import callers, server
from realmap.user.service.session import Session
from realmap.wire import messages
from realmap.wire.client.requester import Requester
from realmap.wire.news import Gone, Granted, Opened

#: The caller's mapping, and the range in it: bytes.
LENGTH, OFFSET, SIZE = 70 * PAGE_SIZE, 5, 68 * PAGE_SIZE
#: Whether the call that the point is of has begun: one byte, for all processes.
_begun = mmap.mmap(-1, 1)


def die() -> None:
    """As by somebody else: at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def dies(owner: Any, step: str, *, after: bool = False, nth: int = 1, of: Callable[..., object] | None = None) -> None:
    """Has this process die as it takes a step for the `nth` time, or right after. `of`: of these arguments only."""
    real, count = getattr(owner, step), 0

    def instead(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        here = _begun[0] and (of is None or of(*args, **kwargs))
        count += bool(here)
        if here and count == nth and not after:
            die()
        value = real(*args, **kwargs)
        if here and count == nth:
            die()
        return value

    setattr(owner, step, instead)


def asks(kind: type, *, sent: bool) -> None:
    """The caller dies as it is about to ask for this, or once that is `sent`."""

    def of(self: Requester, message: Any, **_: object) -> bool:
        if isinstance(message, kind) and sent and (kind is not messages.Call or isinstance(self, sessions.Server)):
            self.notice(message)
        return isinstance(message, kind) and (kind is not messages.Call or isinstance(self, sessions.Server))

    dies(Requester, "request", of=of)


_strike: list[Callable[[str, Call], None]] = []


def strikes(place: str, whom: Callable[[Call], int]) -> None:
    """The handler kills somebody, there."""

    def strike(here: str, call: Call) -> None:
        if here == place:
            os.kill(whom(call), signal.SIGKILL)

    _strike.append(strike)


def at(place: str, call: Call) -> None:
    """Where the handler is."""
    for strike in _strike:
        strike(place, call)


def _own(call: Call) -> int:
    return os.getpid()


def _callers(call: Call) -> int:
    return call.process.pid


def _says(kind: type, first: Callable[[Any], object] = lambda _: True) -> Callable[..., bool]:
    return lambda self, desk, message, rights: isinstance(message, kind) and bool(first(message))


def _last(granted: Granted) -> bool:
    return granted.first + len(granted.pieces) == granted.count


class Point(NamedTuple):
    """`who` dies; `arm` has it do so, in process `where` (by default that one). `ends`: who is killed from outside
    first, so that it dies over that.
    """

    name: str
    who: str
    arm: Callable[[], None]
    where: str = ""
    ends: str = ""


POINTS = [
    Point("server before it hears of a session", "server", lambda: dies(callers.Callers, "_enter")),
    Point("server after it heard of a session", "server", lambda: dies(callers.Callers, "_enter", after=True)),
    Point("server before it takes a grant", "server", lambda: dies(Session, "enter")),
    Point("server between the parts of a grant", "server", lambda: dies(Session, "enter", nth=2)),
    Point("server after it took a grant", "server", lambda: dies(Session, "enter", nth=2, after=True)),
    Point("server before the handler begins", "server", lambda: dies(server.Server, "_begin")),
    Point("server before its window is mapped", "server", lambda: dies(LentMapping, "_open")),
    Point("server after its window is mapped", "server", lambda: dies(LentMapping, "_open", after=True)),
    Point("server in the handler, with a lent window", "server", lambda: strikes("mapped", _own)),
    Point("server before its edges are copied back", "server", lambda: dies(LentMapping, "drop")),
    Point("server after its window is dropped", "server", lambda: strikes("dropped", _own)),
    Point("server before it answers", "server", lambda: dies(Line, "send_short")),
    Point("server after it answered", "server", lambda: dies(Line, "send_short", after=True)),
    Point("caller before it asks for a session", "caller", lambda: asks(messages.Open, sent=False)),
    Point("caller before Open is answered", "caller", lambda: asks(messages.Open, sent=True)),
    Point("caller with the session's descriptors", "caller", lambda: dies(sessions.Server, "__init__")),
    Point("caller after it opened a session", "caller", lambda: dies(sessions.Server, "__init__", after=True)),
    Point("caller before it lends", "caller", lambda: asks(messages.Lend, sent=False)),
    Point("caller before Lend is answered", "caller", lambda: asks(messages.Lend, sent=True)),
    Point("caller before it calls", "caller", lambda: asks(messages.Call, sent=False)),
    Point("caller after it called", "caller", lambda: asks(messages.Call, sent=True)),
    Point("caller while its bytes are mapped", "caller", lambda: strikes("mapped", _callers), "server"),
    Point("caller while the answer is made", "caller", lambda: strikes("dropped", _callers), "server"),
    Point("caller as it closes a session", "caller", lambda: dies(sessions.Server, "close")),
    Point("kernel before it makes a session", "kernel", lambda: dies(Seats, "_connect")),
    Point("kernel before a server hears of a session", "kernel", lambda: dies(Seats, "_send", of=_says(Opened))),
    Point(
        "kernel before Open is answered",
        "kernel",
        lambda: dies(Seats, "_send", of=_says(Opened), after=True),
    ),
    Point("kernel before it grants", "kernel", lambda: dies(Seats, "_send", of=_says(Granted))),
    Point(
        "kernel between the parts of a grant",
        "kernel",
        lambda: dies(Seats, "_send", of=_says(Granted, lambda message: message.first)),
    ),
    Point(
        "kernel before Lend is answered",
        "kernel",
        lambda: dies(Seats, "_send", of=_says(Granted, _last), after=True),
    ),
    Point("kernel as a session is closed", "kernel", lambda: dies(Seats, "_end_session")),
    Point("kernel before a server hears of its end", "kernel", lambda: dies(Seats, "_send", of=_says(Gone))),
    Point("kernel as it notices a server's death", "kernel", lambda: dies(Seats, "_end_seat"), ends="server"),
    Point(
        "kernel between the sessions of a dead server",
        "kernel",
        lambda: dies(Seats, "_end_session", nth=2),
        ends="server",
    ),
    Point("kernel as it notices a caller's death", "kernel", lambda: dies(Seats, "_end_session"), ends="caller"),
]
BY_NAME = {point.name: point for point in POINTS}


# ---- who takes part -----------------------------------------------------------------------


class Part(Reaped):
    """A forked process that says what it is at, and goes on when it is told to."""

    def __init__(self, folder: Path, work: Callable[[Part], None]) -> None:
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if not self.pid:
            self._sock.close()
            self._sock = theirs
            served.divert(folder / f"part.{os.getpid()}")
            try:
                work(self)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(0)
        theirs.close()
        self._sock.settimeout(BOUND)

    def say(self, what: Any = None) -> None:
        with suppress(OSError):
            self._sock.send(json.dumps(what).encode())

    def hear(self) -> Any:
        """What the other side says next; None: it has ended, or says nothing within the bound."""
        try:
            data = self._sock.recv(1 << 16)
        except OSError:
            return None
        return json.loads(data) if data else None

    def end(self) -> None:
        if self.ended is None:
            os.kill(self.pid, signal.SIGKILL)
            served.wait_until(lambda: self.ended is not None)
        self._sock.close()


def serve(part: Part, path: str, name: str, arm: Callable[[], None]) -> None:
    """Serves until the kernel ends, or it is killed."""
    gate: SimpleQueue[None] = SimpleQueue()

    def reverse(call: Call, data: UserBuffer) -> int:
        with data.mirror() as mirror:
            mirror[:] = bytes(mirror)[::-1]
            at("mapped", call)
        at("dropped", call)
        return len(data)

    def hold(call: Call) -> int:
        part.say("holds")
        gate.get()
        return os.getpid()

    def go(call: Call) -> int:
        gate.put(None)
        return os.getpid()

    handlers = [realmap.syscall(name=name + each.__name__, blocking=each is hold)(each) for each in (reverse, hold, go)]
    with realmap.connect(path) as me:
        arm()
        service = me.serve(*handlers, threads=3)
        part.say("serves")
        with suppress(KernelDied, ProcessKilled):
            service.wait()
        part.say("ended")


def call(part: Part, path: str, name: str, arm: Callable[[], None]) -> None:
    """Calls when it is told to, and says what came of that."""
    with realmap.connect(path) as me:
        buffer = me.map(LENGTH, fragment=PAGE_SIZE)
        content = os.urandom(LENGTH)
        buffer[:] = content
        arm()
        part.say("ready")
        if part.hear() is None:
            return
        outcome = _outcome(lambda: me.call(name + "reverse", buffer.slice(OFFSET, SIZE)))
        whole = buffer[:OFFSET] == content[:OFFSET] and buffer[OFFSET + SIZE :] == content[OFFSET + SIZE :]
        done = buffer[OFFSET : OFFSET + SIZE] == content[OFFSET : OFFSET + SIZE][::-1]
        part.say([outcome, whole, done])
        if part.hear() == "close":
            me._routes.close()
            part.say("closed")
        part.hear()


def wait_there(part: Part, path: str, name: str) -> None:
    """Is at work in the server, and says what came of that."""
    with realmap.connect(path) as me:
        part.say(_outcome(lambda: me.call(name + "hold")))
        part.hear()


def _outcome(act: Callable[[], object]) -> str:
    try:
        act()
    except (KernelError, OSError) as error:
        return type(error).__name__
    return "done"


class Bystanders:
    """A server of another name, and who calls it: whatever happens, they go on while the kernel lives."""

    def __init__(self, folder: Path, path: str) -> None:
        self._server = Part(folder, lambda part: serve(part, path, "other ", lambda: None))
        self._server.hear()
        self._caller = Part(folder, lambda part: self._work(part, path))
        self._caller.hear()

    @staticmethod
    def _work(part: Part, path: str) -> None:
        with realmap.connect(path) as me, me.map(3 * PAGE_SIZE, fragment=PAGE_SIZE) as canary:
            content = os.urandom(len(canary))
            canary[:] = content
            part.say()
            while part.hear() is not None:
                me.call("other reverse", canary.slice(1, PAGE_SIZE + 1))
                content = content[:1] + content[1 : PAGE_SIZE + 2][::-1] + content[PAGE_SIZE + 2 :]
                part.say(canary[:] == content)

    def wrong(self) -> list[str]:
        self._caller.say("go on")
        return [] if self._caller.hear() is True else ["the bystander's call, or its bytes, went wrong"]

    def end(self) -> None:
        self._caller.end()
        self._server.end()


# ---- the rounds ---------------------------------------------------------------------------


class Services(Rounds[Point]):
    """By functions of ours that kill when they are called."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._folder = folder
        self._say = say
        self._kernel: Served | None = None
        self._others: Bystanders | None = None
        self._turn = 0

    def _serve(self, point: Point) -> Served:
        if point.who == "kernel":
            self.end()
        if self._kernel is None:
            armed = point.arm if point.who == "kernel" else lambda: None
            self._kernel = Served(self._folder, spin=100.0 * (self._turn % 2), prepare=armed)
            self._others = Bystanders(self._folder, self._kernel.path)
        return self._kernel

    def _round(self, point: Point, tally: Tally) -> list[str]:
        self._turn += 1
        _begun[0] = 0
        kernel, name = self._serve(point), f"{self._turn} "
        path = kernel.path
        books, opened = kernel.books(), served.descriptors(kernel.pid)
        arm = {point.where or point.who: point.arm}.get
        parts = [Part(self._folder, lambda part: serve(part, path, name, arm("server", lambda: None)))]
        try:
            return self._act(point, tally, kernel, path, name, parts) + self._lives(kernel, books, opened, parts, point)
        finally:
            for part in parts:
                part.end()

    def _act(self, point: Point, tally: Tally, kernel: Served, path: str, name: str, parts: list[Part]) -> list[str]:
        arm = {point.where or point.who: point.arm}.get
        serving = parts[0]
        if serving.hear() != "serves":
            return ["it does not serve"]
        waiting = Part(self._folder, lambda part: wait_there(part, path, name))
        parts.append(waiting)
        calling = Part(self._folder, lambda part: call(part, path, name, arm("caller", lambda: None)))
        parts.append(calling)
        if serving.hear() != "holds" or calling.hear() != "ready":
            return ["nobody waits there"]
        if point.ends:  # it has a session of its own
            calling.say("go on")
            calling.hear()
        _begun[0] = 1
        if point.ends:
            os.kill({"server": serving, "caller": calling}[point.ends].pid, signal.SIGKILL)
        else:
            calling.say("go on")
        got = None if point.ends else calling.hear()
        if got is not None:
            calling.say("close")
            calling.hear()
        dead: dict[str, Any] = {"server": serving, "caller": calling, "kernel": kernel}
        if served.wait_until(lambda: dead[point.who].ended is not None, 5.0):
            tally.hits += dead[point.who].ended == -signal.SIGKILL
        wrong = [] if got is None or got[1] else ["bytes beside the buffer have changed"]
        told = {"server": {"ServerDied", "UnknownSyscall"}, "caller": set(), "kernel": {"KernelDied", "ServerDied"}}
        if got is not None and got[0] not in told[point.who] and not (got[0] == "done" and got[2]):
            wrong.append(f"the caller was told {got}")
        if got is None and point.who != "caller" and not point.ends:
            wrong.append("the caller was told nothing")
        return wrong + self._told(point, path, name, serving, waiting)

    def _told(self, point: Point, path: str, name: str, serving: Part, waiting: Part) -> list[str]:
        """Who was at work in the server: it is told, or goes on."""
        if point.who == "caller":
            with realmap.connect(path) as me:  # first: by then its call is at work, if it ever will be
                me.call(name + "go", timeout=BOUND)
            said = waiting.hear()
            wrong = [] if said == "done" else [f"who waited there was told {said}"]
            return wrong + [f"{each} is mapped in the server" for each in _lent(serving.pid)]
        said = waiting.hear()
        right = {"server": ["ServerDied"], "kernel": ["ServerDied", "KernelDied"]}[point.who]
        wrong = [] if said in right else [f"who waited there was told {said}"]
        if point.who == "kernel" and point.ends != "server" and serving.hear() != "ended":
            wrong.append("the server does not notice that the kernel is dead")
        return wrong

    def _lives(
        self, kernel: Served, books: dict[str, int], opened: list[str], parts: list[Part], point: Point
    ) -> list[str]:
        """Afterwards nothing of it is left, and the bystanders have what they had."""
        for part in parts:
            part.end()
        wrong = [f"a name is left: {name}" for name in served.names(kernel.pid)]
        if point.who == "kernel":
            self.end()
            return wrong
        if kernel.ended is not None:
            return [f"the kernel died too (exit status {kernel.ended})"]
        served.wait_until(lambda: kernel.books() == books and not served.opened_since(opened, kernel.pid))
        if (now := kernel.books()) != books:
            wrong.append(f"books: {books} became {now}")
        if more := served.opened_since(opened, kernel.pid):
            wrong.append(f"kernel's descriptors: {more} beside {opened}")
        if not (report := kernel.audit()):
            wrong.append(f"audit: {report}")
        assert self._others is not None
        return wrong + self._others.wrong()

    def end(self) -> None:
        """Ends the kernel and the bystanders. Again: nothing."""
        if self._others is not None:
            self._others.end()
        if self._kernel is not None:
            self._kernel.end()
        self._kernel = self._others = None


def _lent(pid: int) -> list[str]:
    """What a server still has mapped of others, when it had the time to unmap it."""

    def there() -> list[str]:
        maps = procfs.maps(pid, LENT_LAND.start, LENT_LAND.end)
        return [f"{each.start:#x} {each.perms}" for each in maps if each.perms != "---p"]

    return [] if served.wait_until(lambda: not there()) else there()
