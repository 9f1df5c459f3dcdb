"""Who has the loop: taking it from a handler that does not come back, and what is done on time."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from conftest import BOUND, scaled, wait_until

import realmap
from realmap import Call, Kernel, Limits, syscall
from realmap.kernel import kernel as kernel_module
from realmap.kernel.connection import Connection
from realmap.serving import standby
from realmap.serving.loop import Loop, Lost
from realmap.serving.standby import Relay, Taken
from realmap.wire import messages
from realmap.wire.status import Page


class Runs:
    """A relay whose loop says what happens to it."""

    def __init__(self) -> None:
        self.relay: Relay[str] = Relay(self.run)
        #: Of each run: what was taken, and the function that goes on with it.
        self.began: SimpleQueue[Taken[str] | None] = SimpleQueue()
        self.orders: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.threads: list[int] = []
        self.calls = 0

    def run(self, taken: Taken[str] | None) -> None:
        self.threads.append(threading.get_ident())
        self.relay.stand_by()
        self.began.put(taken)
        self.orders.get()()
        self.relay.end()

    def away(self, seconds: threading.Event) -> None:
        """A handler that comes back when that is set."""
        relay = self.relay
        self.calls += 1
        call = object()
        relay.away[call] = f"call {self.calls}"
        if relay.parked:
            relay.wake()
        seconds.wait(BOUND)
        if relay.away.pop(call, None) is None:
            raise Lost


def test_a_handler_that_comes_back_keeps_the_loop() -> None:
    runs, back = Runs(), threading.Event()
    back.set()
    runs.relay.start()
    assert runs.began.get(timeout=BOUND) is None
    runs.orders.put(lambda: [runs.away(back) for _ in range(1000)] and None)
    wait_until(lambda: runs.relay._ended)
    runs.relay.join(BOUND)
    assert len(runs.threads) == 1


def test_a_handler_that_does_not_loses_it_and_its_thread_stands_by_where_nobody_else_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs, back = Runs(), threading.Event()
    runs.relay.start()
    assert runs.began.get(timeout=BOUND) is None
    wait_until(lambda: runs.relay.parked, "its rest")
    monkeypatch.setattr(runs.relay, "stand_by", lambda: False)  # no thread to be had from now on
    before = time.monotonic()
    runs.orders.put(lambda: runs.away(back))
    taken = runs.began.get(timeout=BOUND)
    assert taken is not None
    assert taken.work == "call 1"
    assert 0.018 < time.monotonic() - before
    assert before <= taken.since <= time.monotonic()
    assert runs.relay._standby is None
    late = runs.threads[0]
    back.set()
    wait_until(lambda: runs.relay._standby is not None)
    assert runs.relay._standby is not None
    assert runs.relay._standby.ident == late
    again = threading.Event()
    runs.orders.put(lambda: runs.away(again))
    taken = runs.began.get(timeout=BOUND)
    assert taken is not None
    assert taken.work == "call 2"
    assert runs.threads[2] == late
    again.set()
    runs.orders.put(lambda: None)
    wait_until(lambda: runs.relay._ended)
    runs.relay.join(BOUND)


class Watched:
    """A kernel in this process whose every step on the books is on the thread that has the loop, and no other."""

    def __init__(self, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wrong: list[str] = []
        self.kernel = kernel
        for owner, name in (
            (kernel.loop, "_attend"),
            (kernel.clients, "_take"),
            (kernel.clients, "rearm"),
            (kernel.dispatch, "handle"),
            (kernel.dispatch, "send"),
            (kernel.dispatch, "_end"),
            (kernel.watchdog, "_look"),
        ):
            monkeypatch.setattr(owner, name, self.checked(name, getattr(owner, name)))
        kernel.clients.handle = kernel.dispatch.handle

    def checked(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if threading.get_ident() != self.kernel.loop.thread:
                self.wrong.append(name)
            return function(*args)

        return call


counts: Counter[int] = Counter()


@syscall
def about(call: Call, number: int, seconds: float) -> int:
    """Comes back about when it loses the loop."""
    counts[number] += 1
    time.sleep(seconds)
    return number


@syscall
def nop(call: Call) -> None:
    """Nothing."""


def race(kernel: Kernel, calls: int) -> None:
    """Clients that all call what comes back about when it loses the loop: each call is answered, once, by its own."""
    counts.clear()
    clients = 4
    got: list[list[int]] = [[] for _ in range(clients)]

    def use(which: int) -> None:
        with realmap.connect(kernel.path) as me:
            for number in range(which, calls, clients):
                seconds = (standby.LOOKS - 1 + number % 13 / 12) * standby.LOOK
                got[which].append(me.call("about", number, seconds, timeout=BOUND))
                if number % 3 == 0:
                    me.map(3333).unmap()

    threads = [threading.Thread(target=use, args=(which,)) for which in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10 * BOUND)
    assert got == [list(range(which, calls, clients)) for which in range(clients)]
    assert counts == Counter(range(calls))
    wait_until(lambda: not len(kernel.books.processes))
    wait_until(lambda: not kernel.dispatch.running)
    (syscall,) = (each for each in kernel.books.syscalls.values() if each.name == "about")
    assert (syscall.calls, syscall.failed, syscall.given_up) == (calls, 0, 0)
    assert 0 < syscall.late <= calls
    assert not len(kernel.dispatch.given_up)
    assert not kernel.dispatch._late
    assert not kernel.frames.segments


@pytest.mark.parametrize("calls", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_many_that_come_back_about_when_they_lose_it(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    monkeypatch.setattr(standby, "LOOK", 0.001)
    kernel = Kernel(syscalls=[about, nop])
    watched = Watched(kernel, monkeypatch)
    with kernel:
        race(kernel, scaled(calls) if calls > 1000 else calls)
    assert not watched.wrong


def test_a_socket_that_was_being_read_to_its_end_is_read_on_by_who_has_taken_the_loop() -> None:
    """Else what came by the ring after it would overtake the rest of it."""
    kernel = Kernel(syscalls=[nop])
    kernel.loop.open()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    handled: list[int] = []

    def handle(_: Connection, request: messages.Request, *__: Any) -> None:
        handled.append(request.id)
        if request.id < 3:
            raise Lost

    with theirs:
        connection = Connection(ours, kernel.books.peers.process(os.getpid()))
        connection.process = kernel.books.admit(os.getpid(), os.getuid())
        kernel.clients.handle = handle
        for id in range(1, 6):
            theirs.send(b"\0" + msgspec.msgpack.encode(messages.Call(id, "nop", [])))
        connection.behind = True
        for _ in range(2):
            with pytest.raises(Lost):
                kernel.clients._catch_up(connection)
        assert handled == [1, 2]
        assert connection.behind
        for _ in range(4):
            kernel.clients._catch_up(connection)
        assert handled == [1, 2, 3, 4, 5]
        assert not connection.behind
        connection.close()
    kernel.loop.close()


def test_a_kernel_goes_on_where_no_thread_is_to_be_had_and_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_module, "AGAIN", 0.02)
    kernel = Kernel(syscalls=[nop])
    refusals: list[int] = []
    stand_by = kernel.relay.stand_by

    def refuse() -> bool:
        refusals.append(1)
        return len(refusals) > 3 and stand_by()

    monkeypatch.setattr(kernel.relay, "stand_by", refuse)
    with kernel, realmap.connect(kernel.path) as me:
        assert me.call("nop", timeout=BOUND) is None
        wait_until(lambda: kernel.relay._standby is not None)
        assert len(refusals) == 4


def test_no_thread_for_a_standby_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    relay: Relay[str] = Relay(lambda _: None)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", none)
        assert not relay.stand_by()
    assert relay.stand_by()
    relay.end()
    relay.join(BOUND)


def test_nobody_takes_the_loop_from_a_handler_while_it_changes_which_handlers_there_are() -> None:
    @syscall
    def more(call: Call) -> None:
        call.kernel.register(another)  # type: ignore[attr-defined]

    @syscall
    def another(call: Call) -> int:
        return 1

    to_be_taken: list[int] = []
    with Kernel(syscalls=[more]) as kernel, realmap.connect(kernel.path) as me:
        add = kernel.registration._add

        def noted(*found: Any) -> None:
            to_be_taken.append(len(kernel.relay.away))
            add(*found)

        kernel.registration._add = noted  # type: ignore[method-assign]
        me.call("more")
        assert (to_be_taken, me.call("another")) == ([0], 1)


def test_a_destructor_on_the_loops_thread_changes_handlers_and_asks_who_is_connected() -> None:
    """It waits for nobody: it would be itself."""
    seen: list[Any] = []
    with Kernel(syscalls=[nop]) as kernel, realmap.connect(kernel.path) as me:

        def destructor() -> None:
            seen.append([each.pid for each in kernel.processes()])
            kernel.unregister("nop")

        kernel.loop.post(destructor)
        wait_until(lambda: "nop" not in kernel.books.syscalls)
        with pytest.raises(realmap.UnknownSyscall):
            me.call("nop", timeout=BOUND)
    assert seen == [[os.getpid()]]


def test_an_idle_kernel_sleeps() -> None:
    """Nothing has a time at which it would wake, and nobody looks."""
    with Kernel(syscalls=[nop], limits=Limits(seconds=0.1)) as kernel:
        with realmap.connect(kernel.path) as me:
            me.call("nop")
            me.share(me.map(3333), seconds=0.2)
            wait_until(lambda: not len(kernel.handles))
        wait_until(lambda: kernel.relay.parked and kernel.loop._timeout() is None, "its sleep")


@pytest.fixture
def loop() -> Iterator[Loop]:
    """An open one, which nobody runs."""
    made = Loop(Page())
    made.open()
    yield made
    made.close()


def test_jobs_run_in_the_order_of_their_time(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    began = time.monotonic()
    with monkeypatch.context() as patched:  # all of them at one moment
        patched.setattr("realmap.serving.loop.time", SimpleNamespace(monotonic=lambda: began))
        loop.after(0.03, lambda: ran.append("last"))
        loop.after(0.03, loop.end)
        loop.after(0.001, lambda: ran.append("first"))
        loop.after(0.002, lambda: 1 // 0)  # a bug of ours ends nothing
    loop.run([], lambda _: None, 0)
    assert ran == ["first", "last"]
    assert time.monotonic() - began >= 0.03
    assert loop._timeout() is None


def test_a_forked_child_has_nobody_to_answer_to(loop: Loop) -> None:
    pid = os.fork()
    if not pid:
        loop.after_fork_in_child()
        try:
            loop.post(lambda: os._exit(1))
        except Lost:
            os._exit(0)
        os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0


def test_the_watchdog_survives_whatever_it_runs_into(monkeypatch: pytest.MonkeyPatch) -> None:
    gate: SimpleQueue[None] = SimpleQueue()

    @syscall(blocking=True)
    def wait(call: Call) -> None:
        gate.get()

    with Kernel(syscalls=[wait], limits=Limits(seconds=0.1)) as kernel, realmap.connect(kernel.path) as me:
        failures: list[float] = []

        def fail(before: float) -> None:
            failures.append(before)
            raise RuntimeError("dictionary changed size during iteration")

        monkeypatch.setattr(kernel.clients, "drop_silent", fail)
        for _ in range(2):
            with pytest.raises(realmap.SyscallTimeout, match="the kernel's limit"):
                me.call("wait", timeout=BOUND)
        assert failures
        gate.put(None)  # on a busy machine, one may never have begun
        gate.put(None)
        wait_until(lambda: not len(kernel.dispatch.given_up))
