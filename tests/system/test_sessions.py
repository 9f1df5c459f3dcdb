"""Services from the caller's side: which server takes a call, where it goes when one dies, sessions, what is lent."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import time
from contextlib import suppress
from typing import Any

import placed
import pytest
from conftest import BOUND, PAGE, in_threads, wait_until
from forked import in_a_child
from serving import in_thread, kernel, spawn

import realmap
from realmap import KernelHandle, Process, ProcessKilled, ServerDied, UnknownSyscall

__all__ = ["kernel", "spawn"]
CARRIERS = ("ring", "socket")


def test_what_cannot_travel_by_a_session_either(me: Process, spawn: Any) -> None:
    spawn(1)
    with me.session("echo") as session:
        for call in (me.call, session.call):
            with pytest.raises(TypeError, match="beyond 64 bits"):
                call("echo", 2**70)


def test_a_timeout_is_told_as_it_was_asked_for(me: Process, spawn: Any) -> None:
    spawn(1, 3)
    with me.session("wait") as session:
        with pytest.raises(realmap.SyscallTimeout, match=r"has not answered within 0\.07 s"):
            session.call("wait", "asked", timeout=0.07)
        with pytest.raises(realmap.SyscallTimeout, match=r"within 0\.07 s"):
            asyncio.run(session.acall("wait", "asked", timeout=0.07))
        for _ in range(2):
            session.call("go", "asked")


# ---- which server -------------------------------------------------------------------------


def test_the_one_that_is_idle_takes_the_call(me: Process, spawn: Any) -> None:
    """With one session it stays there; where that server is busy, another one is asked for."""
    servers = {each.pid for each in spawn(3, 1)}
    first = me.call("pid_here", timeout=BOUND)
    assert {me.call("pid_here", timeout=BOUND) for _ in range(20)} == {first}

    def beside_one_that_is_busy() -> bool:
        busy, came = in_thread(lambda: me.call("nap", 0.5, timeout=BOUND))
        wait_until(lambda: came or ("nap" in me._known and me._known["nap"].servers[0].endpoint.pending))
        others = {me.call("nap", 0.0, timeout=BOUND) for _ in range(20)}
        was_busy = not came
        busy.join()
        assert not was_busy or (came[0] not in others and others < servers)
        return was_busy

    wait_until(beside_one_that_is_busy, "one that was busy all the while")


def test_many_calls_at_once_are_shared_out(me: Process, spawn: Any) -> None:
    servers = {each.pid for each in spawn(2, 1)}
    seen: set[int] = set()

    def work(_: int) -> None:
        for _ in range(30):
            seen.add(me.call("nap", 0.002, timeout=BOUND))

    in_threads(4, work)
    assert seen == servers


def test_a_server_that_comes_later_is_found(me: Process, spawn: Any) -> None:
    (first,) = spawn(1, 1)
    assert me.call("pid_here") == first.pid
    (second,) = spawn(1, 1)
    seen: set[int] = set()
    end = time.monotonic() + BOUND
    while seen != {first.pid, second.pid} and time.monotonic() < end:
        in_threads(3, lambda _: seen.add(me.call("nap", 0.01, timeout=BOUND)))
    assert seen == {first.pid, second.pid}


def test_a_server_that_died_while_it_was_idle_is_noticed_by_nobody(
    me: Process, kernel: KernelHandle, spawn: Any
) -> None:
    servers = spawn(3)
    for left in (2, 1):
        pid = me.call("pid_here", timeout=BOUND)
        next(each for each in servers if each.pid == pid).kill()
        next(each for each in servers if each.pid == pid).join()
        wait_until(lambda left=left: kernel.stats()["seats"] == left)
        assert me.call("pid_here", timeout=BOUND) != pid


def test_a_server_that_died_at_work(me: Process, spawn: Any) -> None:
    spawn(2)
    buffer = me.map(3 * PAGE)
    with pytest.raises(ServerDied, match="serve") as caught:
        me.call("die", buffer.slice(1, 2 * PAGE), timeout=BOUND)
    assert (caught.value.name, caught.value.began) == ("die", True)
    assert str(caught.value).endswith("whether its handler had begun is not known (name die)")
    assert isinstance(caught.value, ConnectionError)
    assert me.call("pid_here", timeout=BOUND) != caught.value.pid
    assert pickle.loads(pickle.dumps(caught.value)).pid == caught.value.pid


def test_the_last_server_dies_and_another_one_comes(me: Process, kernel: KernelHandle, spawn: Any) -> None:
    (only,) = spawn(1)
    assert me.call("pid_here") == only.pid
    only.kill()
    only.join()
    with pytest.raises((ServerDied, UnknownSyscall)):
        me.call("pid_here", timeout=BOUND)
    wait_until(lambda: not kernel.stats()["seats"])
    with pytest.raises(UnknownSyscall, match="pid_here"):
        me.call("pid_here", timeout=BOUND)
    (other,) = spawn(1)
    assert me.call("pid_here", timeout=BOUND) == other.pid


def test_everybody_who_waits_is_told(me: Process, kernel: KernelHandle, spawn: Any) -> None:
    (only,) = spawn(1, 1)
    waiting = [in_thread(lambda: me.call("wait", "for ever", timeout=BOUND)) for _ in range(5)]
    wait_until(lambda: me._known.get("wait") and sum(each.endpoint.pending for each in me._known["wait"].servers) == 5)

    async def ask() -> None:
        with pytest.raises(ServerDied):
            await me.acall("wait", "for ever", timeout=BOUND)

    task = in_thread(lambda: asyncio.run(ask()))
    wait_until(lambda: sum(each.endpoint.pending for each in me._known["wait"].servers) == 6)
    began = time.monotonic()
    only.kill()
    for thread, came in waiting:
        thread.join(BOUND)
        assert isinstance(came[0], ServerDied)
    task[0].join(BOUND)
    assert task[1] == [None]
    assert time.monotonic() - began < BOUND / 2


# ---- sessions -----------------------------------------------------------------------------


def test_a_session_is_with_one_server(me: Process, kernel: KernelHandle, spawn: Any) -> None:
    servers = {each.pid: each for each in spawn(2)}
    with me.session("peek") as session, me.session("digest") as other:
        assert {session.pid, other.pid} == set(servers)
        assert [session.call("pid_here") for _ in range(5)] == [session.pid] * 5
        assert asyncio.run(other.acall("pid_here")) == other.pid
        assert (session.name, str(session.pid) in repr(session)) == ("peek", True)
        buffer = me.map(10_000)
        buffer[:3] = b"abc"
        assert session.call("peek", data=buffer, length=3) == b"abc"
        assert asyncio.run(other.acall("peek", buffer.slice(1, 2))) == b"bc"
        with pytest.raises(UnknownSyscall, match="nobody"):
            session.call("nobody_has_this")
        with pytest.raises(TypeError):
            pickle.dumps(session)
        servers[session.pid].kill()
        servers[session.pid].join()
        for began in (None, False):
            with pytest.raises(ServerDied) as caught:
                session.call("peek", buffer, timeout=BOUND)
            assert caught.value.pid == session.pid
            assert began is None or caught.value.began is began
        assert "ended" in repr(session)
        assert other.call("pid_here") == other.pid
    session.close()
    with pytest.raises(ServerDied):
        session.call("pid_here")
    with pytest.raises(ProcessKilled, match="closed"):
        other.call("pid_here")


def test_sessions_that_cannot_be(me: Process, kernel: KernelHandle) -> None:
    for name in ("nobody_has_this", "of_the_kernel", ""):
        with pytest.raises(UnknownSyscall):
            me.session(name)
    for odd in (None, 5, b"nop"):
        with pytest.raises(TypeError, match="str"):
            me.session(odd)  # type: ignore[arg-type]


def test_a_session_that_is_let_go_ends(me: Process, kernel: KernelHandle, spawn: Any) -> None:
    spawn(1)
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        me.session("peek").call("pid_here")
    gc.collect()
    wait_until(lambda: kernel.stats()["sessions"] == 0)
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_closing_a_process_ends_its_sessions(me: Process, kernel: KernelHandle, spawn: Any) -> None:
    spawn(1, 3)  # both that wait may have begun
    other = kernel.connect()
    session = other.session("peek")
    waiting = in_thread(lambda: session.call("wait", "closed", timeout=BOUND))
    routed = in_thread(lambda: other.call("wait", "closed", timeout=BOUND))
    wait_until(
        lambda: session._server.endpoint.pending and other._known and other._known["wait"].servers[0].endpoint.pending
    )
    other.close()
    for thread, came in (waiting, routed):
        thread.join(BOUND)
        assert isinstance(came[0], ProcessKilled)
    wait_until(lambda: kernel.stats()["sessions"] == 0)
    for _ in range(2):
        me.call("go", "closed")


def test_a_forked_child_has_no_session(me: Process, spawn: Any) -> None:
    (only,) = spawn(1)
    session = me.session("peek")
    assert me.call("pid_here") == only.pid

    def work() -> None:
        nonlocal session
        with pytest.raises(realmap.InvalidHandle):
            session.call("pid_here")
        session.close()
        del session
        assert me.call("pid_here", timeout=BOUND) == only.pid

    in_a_child(work)
    assert session.call("pid_here", timeout=BOUND) == only.pid  # the child has closed nothing of ours
    assert me.call("pid_here", timeout=BOUND) == only.pid


def test_more_sessions_than_a_process_may_have() -> None:
    with realmap.boot(limits=realmap.Limits(sessions=2)) as kernel, kernel.connect() as me:
        servers = [kernel.spawn(placed.serve, 1) for _ in range(3)]
        wait_until(lambda: kernel.stats()["seats"] == 3)
        me.call("nap", 0.0)
        with me.session("peek"), pytest.raises(realmap.LimitReached, match="sessions"):
            me.session("peek")
        with me.session("peek"):
            in_threads(4, lambda _: me.call("nap", 0.01, timeout=BOUND))  # who is there has to do
        for server in servers:
            server.kill()
            server.join()


def test_a_descriptor_that_was_stolen_costs_one_call_at_most(me: Process, spawn: Any) -> None:
    spawn(1)
    me.call("pid_here")
    (server,) = me._known["pid_here"].servers
    os.close(server.endpoint.fileno())
    with suppress(ProcessKilled):
        me.call("long_text", 1, timeout=BOUND)
        me.call("echo", "x" * 5_000, timeout=BOUND)
    wait_until(lambda: _answers(me), "an answer")


def _answers(me: Process) -> bool:
    try:
        return me.call("echo", "x" * 5_000, timeout=1) == [["x" * 5_000], {}]
    except realmap.KernelError:
        return False


def test_one_session_for_all_that_a_server_serves(me: Process, kernel: KernelHandle, spawn: Any) -> None:
    spawn(1)
    buffer = me.map(PAGE)
    assert me.call("peek", buffer, 1) == b"\0"
    assert me.call("echo", 1) == [[1], {}]
    assert len(kernel.snapshot().sessions) == 1
    assert len(kernel.snapshot().grants) == 1
    buffer.unmap()
