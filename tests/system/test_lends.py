"""What is lent to a server: as it is unmapped; to one that does not read; and how much of its descriptors it takes."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from conftest import BOUND, PAGE, wait_until
from placed import kill_all

import realmap
from realmap import Buffer, Call, KernelHandle, LimitReached, Process, UserBuffer
from realmap.host import procfs
from realmap.system import SpawnedProcess
from realmap.user import sessions
from realmap.wire import messages


def look(call: Call, data: UserBuffer) -> bytes:
    """The first byte."""
    return data.copy_in(1)


def look_too(user: Process) -> bytes:
    """Somebody else, who lends as much as one may."""
    found: bytes = user.call("look", user.map(100 * PAGE, fragment=PAGE), timeout=BOUND)
    return found


@pytest.fixture
def server(kernel: KernelHandle, me: Process) -> Iterator[Callable[..., SpawnedProcess]]:
    """Starts a process that serves `look`."""
    made: list[SpawnedProcess] = []

    def serve(process: Process, descriptors: int | None) -> None:
        at_work, let_go = threading.Event(), threading.Event()

        @realmap.syscall(blocking=True)
        def keep_at_it(call: Call, data: UserBuffer) -> None:
            """Until it is let go."""
            with data.mirror():
                at_work.set()
                let_go.wait(BOUND)

        @realmap.syscall(blocking=True)
        def end_it(call: Call, ends: bool) -> None:
            """Once that is at work: lets it go, where this `ends` it."""
            at_work.wait(BOUND)
            if ends:
                let_go.set()

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors or soft, hard))
        with (
            suppress(realmap.KernelDied, realmap.ProcessKilled),
            process.serve(look, keep_at_it, end_it, threads=9) as service,
        ):
            service.wait()

    def start(descriptors: int | None = None) -> SpawnedProcess:
        made.append(kernel.spawn(serve, descriptors))
        me.session("look", timeout=BOUND).close()
        return made[-1]

    yield start
    kill_all(made)


def test_a_server_that_is_stopped_and_takes_no_more_that_it_is_lent(me: Process, server: Any) -> None:
    only = server()
    with me.session("look", timeout=BOUND) as session:
        os.kill(only.pid, signal.SIGSTOP)
        wait_until(lambda: procfs.is_stopped(only.pid))
        client, number, lent, unheard = me._own_client, session._server.number, [], 0
        while unheard < 2:  # until its socket is full, and not the kernel slow
            lent.append(me.map(PAGE))
            try:
                client.request(messages.Lend(client.next_id(), number, lent[-1].address), timeout=0.3, name="look")
                unheard = 0
            except realmap.SyscallTimeout:
                me.query(lent[-1].address)  # it goes on now, if it was the kernel that stood still
                unheard += 1
        for call in (session.call, lambda *args, **named: asyncio.run(session.acall(*args, **named))):
            with pytest.raises(
                realmap.SyscallTimeout, match=r"is stopped \(SIGSTOP\): has not read what it is lent"
            ) as caught:
                call("look", me.map(PAGE), timeout=0.2)
            assert caught.value.name == "look"
        os.kill(only.pid, signal.SIGCONT)
        assert session.call("look", me.map(PAGE), timeout=BOUND) == b"\0"
    for each in lent:  # not left to a collection, which an audit would find half done
        each.unmap()


def test_a_buffer_that_is_unmapped_as_it_is_lent(
    me: Process, kernel: KernelHandle, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another thread, between two steps: what is mapped there next is not lent in its place."""
    server()
    me.map(PAGE).unmap()
    buffer, again = me.map(PAGE), []  # used again: its end needs no message, nor does the next one's beginning
    address = buffer.address
    real = sessions.require_own

    def unmaps(process: Process, buffer: Buffer) -> None:
        real(process, buffer)
        monkeypatch.undo()
        buffer.unmap()
        again.append(me.map(PAGE))

    with me.session("look", timeout=BOUND) as session:
        monkeypatch.setattr(sessions, "require_own", unmaps)
        with pytest.raises(realmap.InvalidAddress, match="unmapped"):
            session.call("look", buffer, timeout=BOUND)
        assert again[0].address == address and kernel.stats()["grants"] == 0
        again[0][0] = 7
        assert session.call("look", again[0], timeout=BOUND) == b"\7"


def test_a_caller_takes_a_share_of_its_servers_descriptors_and_no_more(
    me: Process, kernel: KernelHandle, server: Any
) -> None:
    """A quarter of what it may open; what goes beyond is told to who lends it, and everything else goes on."""
    only = server(400)

    open_first = len(os.listdir(f"/proc/{only.pid}/fd"))
    most, more = me.map(100 * PAGE, fragment=PAGE), me.map(101 * PAGE, fragment=PAGE)
    with pytest.raises(LimitReached, match=r"descriptors of what process .* 100 at most, and this takes 101") as caught:
        me.call("look", more, timeout=BOUND)
    assert (caught.value.what, caught.value.limit) == ("descriptors", 100)
    assert len(os.listdir(f"/proc/{only.pid}/fd")) < open_first + 10
    assert me.call("look", most, timeout=BOUND) == b"\0"
    with pytest.raises(LimitReached):
        me.call("look", me.map(1), timeout=BOUND)
    assert kernel.spawn(look_too).result(BOUND) == b"\0"
    most.unmap()
    assert me.call("look", me.map(1), timeout=BOUND) == b"\0"


def test_a_caller_that_unmaps_what_its_calls_are_at_work_on_takes_no_more_either(
    me: Process, kernel: KernelHandle, server: Any
) -> None:
    """The kernel does not count that any more; the server does, ends that session, and serves others."""
    server(400)
    data, more = me.map(60 * PAGE, fragment=PAGE), me.map(60 * PAGE, fragment=PAGE)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(me.call, "keep_at_it", data, timeout=BOUND)
        me.call("end_it", False, timeout=BOUND)
        data.unmap()
        with pytest.raises(LimitReached, match="60 descriptors are in use") as caught:
            me.call("look", more, timeout=BOUND)
        assert (caught.value.what, caught.value.limit) == ("descriptors", 100)
        assert isinstance(first.exception(BOUND), LimitReached)  # its session has ended
    assert kernel.spawn(look_too).result(BOUND) == b"\0"
    me.call("end_it", True, timeout=BOUND)
    wait_until(lambda: looks(me))


def looks(me: Process) -> bool:
    """Whether it is served again."""
    try:
        return me.call("look", me.map(60 * PAGE, fragment=PAGE), timeout=BOUND) == b"\0"
    except LimitReached:
        return False
