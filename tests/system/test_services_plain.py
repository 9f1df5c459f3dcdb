"""Calls of a few plain values to a service: they take a short way, and nothing else about them is otherwise."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from enum import StrEnum
from functools import partial
from typing import Any

import placed
import pytest
from conftest import BOUND, wait_until

import realmap
from realmap import Call, KernelHandle, Process, ServerDied, SpawnedProcess, UnknownSyscall
from realmap.host import forks
from realmap.wire import messages
from realmap.wire.client.requester import Requester

CARRIERS = ("ring", "socket")
Ask = Callable[..., Any]


class Odd(int):
    """A number that is more than that."""


class Name(str):
    """A text that is more than that."""


class Names(StrEnum):
    """A name that is more than a text."""

    ECHO = "echo_plain"


class Stop(Exception):
    """A signal handler's."""


def echo_plain(call: Call, *args: Any) -> Any:
    """The one argument again; of several, all."""
    return args[0] if len(args) == 1 else list(args)


def raise_it(call: Call, kind: str) -> None:
    """Raises."""
    raise {"ours": UnknownSyscall("its own", why="raised"), "other": ValueError("raised")}[kind]


def kill_it(call: Call) -> None:
    """SIGKILL."""
    os.kill(os.getpid(), signal.SIGKILL)


def serve(me: Process) -> None:
    """In a process of its own."""
    handlers = echo_plain, raise_it, kill_it, placed.pid_here, placed.wait, placed.go
    with suppress(realmap.KernelError), me.serve(*handlers, threads=2) as service:
        service.wait()


@pytest.fixture(scope="module")
def kernel(request: pytest.FixtureRequest) -> Iterator[KernelHandle]:
    """One that has no handlers itself."""
    with realmap.boot(spin=0 if request.param == "socket" else 100) as handle:
        handle.stats()
        yield handle


@pytest.fixture
def spawn(kernel: KernelHandle, me: Process) -> Iterator[Callable[[int], list[SpawnedProcess]]]:
    """So many servers, with one of which this process has a session."""
    made: list[SpawnedProcess] = []

    def start(count: int) -> list[SpawnedProcess]:
        made.extend(kernel.spawn(serve) for _ in range(count))
        wait_until(lambda: kernel.stats()["seats"] == count, "their service")
        me.call("echo_plain", timeout=BOUND)
        return made

    yield start
    placed.kill_all(made)


@pytest.fixture(params=["name", "session"])
def ask(request: pytest.FixtureRequest, me: Process, spawn: Any) -> Iterator[Ask]:
    """Calls one server, by the name of what it serves or by a session."""
    spawn(1)
    if request.param == "name":
        yield me.call
    else:
        with me.session("echo_plain") as session:
            yield session.call


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of calls that have not taken the short way."""
    names: list[str] = []
    encode = Requester.encode

    def note(self: Requester, message: Any) -> bytes:
        if isinstance(message, messages.Call):
            names.append(message.name)
        return encode(self, message)

    monkeypatch.setattr(Requester, "encode", note)
    return names


def outcome(act: Callable[[], Any]) -> tuple[type, str]:
    """What comes of it, an error too."""
    try:
        got = act()
    except Exception as error:
        got = error
    return type(got), repr(got)


PLAIN = [None, True, -1, -(1 << 63), (1 << 63) - 1, -0.0, float("nan"), "", "ß" * 500, b"", bytes(300)]
LESS_PLAIN = [
    *(Odd(1), Name("x"), (1 << 64) - 1, 1 << 64, -(1 << 63) - 1, "\ud800", "x" * 3000, bytes(3000)),
    *([1], {"a": 1}, (1,), bytearray(b"x"), {1}, object, 1j),
]


def test_plain_values_take_the_short_way(ask: Ask, encoded: list[str]) -> None:
    for value in PLAIN:  # not each a test: a server is started for it
        assert outcome(lambda value=value: ask("echo_plain", value)) == (type(value), repr(value))
        assert ask("echo_plain", value, 2) == ask("echo_plain", value, 2) or value != value
        assert encoded == [], value


def test_what_is_less_plain_comes_to_the_same_as_by_the_other_way(ask: Ask, encoded: list[str]) -> None:
    for value in LESS_PLAIN:
        for values in ([value], [0] * 15 + [value]):
            short, long = (outcome(partial(ask, "echo_plain", *values, **more)) for more in ({}, {"timeout": BOUND}))
            assert short == long
        assert not encoded or set(encoded) == {"echo_plain"}
        assert ask("echo_plain", "still there") == "still there"


def test_names_that_are_more_or_less_than_a_text(ask: Ask) -> None:
    assert ask(Names.ECHO, 5) == 5
    with pytest.raises(TypeError, match="is a str"):
        ask(["echo_plain"], 5)
    with pytest.raises((UnknownSyscall, ServerDied)):
        ask("echo_plainly", 5)


def test_more_than_a_message_carries(ask: Ask) -> None:
    with pytest.raises(realmap.InvalidSize, match="put more into a buffer"):
        ask("echo_plain", bytes(2 << 20))


@pytest.mark.parametrize("kind", ["ours", "other"])
def test_what_a_handler_raises_comes_as_itself_and_from_one_call(me: Process, kind: str) -> None:
    with me.serve(raise_it, echo_plain) as service:
        assert me.call("echo_plain", kind) == kind
        with pytest.raises(UnknownSyscall if kind == "ours" else realmap.SyscallFailed, match="raised"):
            me.call("raise_it", kind)
        assert service.calls == 2


def test_a_server_that_dies_in_the_call(me: Process, kernel: KernelHandle, ask: Ask, spawn: Any) -> None:
    with pytest.raises(ServerDied) as caught:
        ask("kill_it")
    assert (caught.value.name, caught.value.began) == ("kill_it" if ask == me.call else "echo_plain", True)
    with pytest.raises((ServerDied, UnknownSyscall)):
        ask("echo_plain")
    wait_until(lambda: kernel.stats()["seats"] == 0)


def test_a_server_that_has_died_is_noticed_by_nobody(me: Process, kernel: KernelHandle, spawn: Any) -> None:
    servers = spawn(2)
    first = me.call("pid_here")
    dead = next(each for each in servers if each.pid == first)
    dead.kill()
    dead.join()
    kernel.settle(BOUND)  # until then it has that socket, too: of what is sent there nobody knows whether it was read
    assert me.call("pid_here") == next(each.pid for each in servers if each is not dead)


def test_a_signal_handler_that_raises_in_the_call(me: Process, ask: Ask) -> None:
    def stop(*_: object) -> None:
        raise Stop

    before = signal.signal(signal.SIGALRM, stop)
    try:
        for name in ("one", "two"):
            with pytest.raises(Stop):
                signal.setitimer(signal.ITIMER_REAL, 0.01)
                ask("wait", name)
            assert ask("echo_plain", name) == name  # the other thread of the server; no answer is taken for another's
            me.call("go", name)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_signal_handler_that_calls_in_the_call(ask: Ask) -> None:
    came: list[Any] = []

    def call(*_: object) -> None:
        came.append(ask("echo_plain", "within"))
        ask("go", "outer")

    before = signal.signal(signal.SIGALRM, call)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        assert ask("wait", "outer") == "outer"
    finally:
        signal.signal(signal.SIGALRM, before)
    assert came == ["within"]


def test_a_forked_child_calls_by_a_connection_of_its_own(me: Process, spawn: Any) -> None:
    spawn(1)
    with me.session("echo_plain") as session:
        assert (me.call("echo_plain", 1), session.call("echo_plain", 2)) == (1, 2)
        child = forks.fork()
        if not child:
            status = 1
            try:
                with suppress(realmap.InvalidHandle):
                    session.call("echo_plain", 3)
                    os._exit(2)
                status = 0 if me.call("echo_plain", 4) == 4 else 3
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        assert (me.call("echo_plain", 5), session.call("echo_plain", 6)) == (5, 6)


def test_a_session_that_was_closed(me: Process, spawn: Any) -> None:
    spawn(1)
    session = me.session("echo_plain")
    assert session.call("echo_plain", 1) == 1
    session.close()
    with pytest.raises(realmap.ProcessKilled, match="this session was closed"):
        session.call("echo_plain", 2)


def test_a_call_that_waits_for_itself(me: Process) -> None:
    def around_plain(call: Call, number: int) -> int:
        return 1 + (me.call("around_plain", number - 1) if number else 0)

    with me.serve(around_plain):
        assert me.call("around_plain", 0) == me.call("around_plain", 0) == 1
        with pytest.raises(realmap.LimitReached, match="wait for itself"):
            me.call("around_plain", 1)


def test_a_server_that_is_at_work_for_others_is_not_waited_for(me: Process) -> None:
    """With one thread that is taken, it is asked whether somebody else serves the name."""
    began, end = threading.Event(), threading.Event()

    def stay_plain(call: Call, long: bool) -> str:
        if long:
            began.set()
            end.wait(BOUND)
        return "stayed"

    with me.serve(stay_plain), ThreadPoolExecutor(1) as pool:
        assert me.call("stay_plain", False) == "stayed"
        long = pool.submit(me.call, "stay_plain", True)
        assert began.wait(BOUND)
        with me.serve(_other):
            assert me.call("stay_plain", False) == "other"
        end.set()
        assert long.result(BOUND) == "stayed"


@realmap.syscall(name="stay_plain")
def _other(call: Call, long: bool) -> str:
    return "other"


def test_threads_that_call_at_once_have_their_own_answers(ask: Ask) -> None:
    def work(mine: int) -> list[int]:
        return [ask("echo_plain", mine * 1000 + turn) for turn in range(200)]

    with ThreadPoolExecutor(4) as pool:
        for mine, got in enumerate(pool.map(work, range(4))):
            assert got == [mine * 1000 + turn for turn in range(200)]
