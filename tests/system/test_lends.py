"""What is lent to a server: as it is unmapped; to one that does not read; and how much of its descriptors it takes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from conftest import BOUND, PAGE, wait_until

import realmap
from realmap import Buffer, Call, KernelHandle, Process, UserBuffer
from realmap.host import procfs
from realmap.system import SpawnedProcess
from realmap.user import sessions
from realmap.wire import messages


def look(call: Call, data: UserBuffer) -> bytes:
    """The first byte."""
    return data.copy_in(1)


@pytest.fixture
def server(kernel: KernelHandle, me: Process) -> Iterator[Callable[..., SpawnedProcess]]:
    """Starts a process that serves `look`."""
    made: list[SpawnedProcess] = []

    def serve(process: Process) -> None:
        with suppress(realmap.KernelDied, realmap.ProcessKilled), process.serve(look) as service:
            service.wait()

    def start() -> SpawnedProcess:
        made.append(kernel.spawn(serve))
        me.session("look", timeout=BOUND).close()
        return made[-1]

    yield start
    for each in made:
        with suppress(ProcessLookupError):
            os.kill(each.pid, signal.SIGCONT)
        each.kill()
        each.join()
    made.clear()


def test_a_server_that_is_stopped_and_takes_no_more_that_it_is_lent(me: Process, server: Any) -> None:
    only = server()
    with me.session("look", timeout=BOUND) as session:
        os.kill(only.pid, signal.SIGSTOP)
        wait_until(lambda: procfs.is_stopped(only.pid))
        client, number, lent = me._own_client, session._server.number, []
        with pytest.raises(realmap.SyscallTimeout):
            for _ in range(5000):  # until its socket is full
                lent.append(me.map(PAGE))
                client.request(messages.Lend(client.next_id(), number, lent[-1].address), timeout=0.3, name="look")
        for call in (session.call, lambda *args, **named: asyncio.run(session.acall(*args, **named))):
            with pytest.raises(
                realmap.SyscallTimeout, match=r"is stopped \(SIGSTOP\): has not read what it is lent"
            ) as caught:
                call("look", me.map(PAGE), timeout=0.2)
            assert caught.value.name == "look"
        os.kill(only.pid, signal.SIGCONT)
        assert session.call("look", me.map(PAGE), timeout=BOUND) == b"\0"


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
