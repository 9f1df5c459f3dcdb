"""Servers that do not read, and grants that nobody can be told of: raw clients play server and caller."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import pytest
from conftest import PAGE, wait_until
from raw_client import RawClient, RawServer, RawSession
from stage import Stage, run, stage

import realmap
from realmap import InvalidAddress, Kernel, LimitReached, ServerDied
from realmap.wire import messages
from realmap.wire.news import Granted, News

__all__ = ["run", "stage"]


def fill(stage: Stage) -> list[RawSession]:
    """Sessions until the seat's socket takes no more."""
    made = []
    (desk,) = stage.kernel._seats._desks.values()
    while not desk.news:
        made.append(stage.enter_context(RawSession(stage.caller, "name")))
    return made


def test_a_server_that_does_not_read_keeps_nobody_waiting_but_who_lends_to_it(run: Callable[..., Kernel]) -> None:
    with Stage(run(sessions=4096, grants=100_000)) as stage:
        sessions = fill(stage)
        last = sessions[-1]
        assert stage.caller.ask(messages.Query, stage.address)[0]
        # What comes and goes before it can be told of is not told.
        for _ in range(100):
            stage.enter_context(RawSession(stage.caller, "name")).sock.close()
        (desk,) = stage.kernel._seats._desks.values()
        wait_until(lambda: len(desk.news) == 1)
        stage.caller.say(messages.Lend(1, last.number, stage.address))
        stage.caller.say(messages.Unmap(0, stage.address, 3 * PAGE))
        with pytest.raises(InvalidAddress, match="before its server was told"):
            stage.caller.hear()
        again = stage.caller.map(PAGE)
        stage.caller.say(messages.Lend(2, last.number, again))
        told: list[News] = []
        while not told or not isinstance(told[-1], Granted):
            told.append(stage.hear())
        assert [news.session for news in told[:-1]] == [session.number for session in sessions]
        assert told[-1].session == last.number and told[-1].address == again
        assert stage.caller.hear() == (None, [])


def test_who_lends_before_it_can_be_told_is_told_how_that_ended(run: Callable[..., Kernel]) -> None:
    with Stage(run(sessions=4096)) as stage:
        last = fill(stage)[-1]

        def lend() -> None:
            stage.caller.say(messages.Lend(1, last.number, stage.address))

        for _ in range(64):
            lend()
        with pytest.raises(LimitReached, match="64 requests wait already"):
            stage.caller.ask(messages.Lend, last.number, stage.address)
        stage.server.sock.close()
        for _ in range(64):
            with pytest.raises(ServerDied) as caught:
                stage.caller.hear()
            assert caught.value.pid == os.getpid() and not caught.value.began


def test_no_descriptors_for_a_grant(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    from realmap.host import segment

    (mapping,) = [each for process in stage.kernel.books.processes for each in process.memory]
    opened, real = [], os.open

    def short(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if str(path).startswith("/proc/self/fd/"):
            opened.append(path)
            if len(opened) > 1:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(segment.os, "open", short)
    with pytest.raises(realmap.PhysicalMemoryExhaustion):
        stage.session.lend(stage.address)
    monkeypatch.undo()
    assert stage.kernel.books.peers.totals()["grants"] == 0 and mapping.frames.refcount == 1
    stage.session.lend(stage.address)


def test_what_was_lent_is_not_used_again(run: Callable[..., Kernel]) -> None:
    """Its server may keep the frames: the process's next small mapping has others."""
    kernel = run(spin=50)
    with RawClient(kernel.path) as host, RawServer(host, "name"), realmap.connect(kernel.path) as me:
        buffer = me.map(100)
        buffer[:] = b"x" * 100
        (process,) = [each for each in kernel.books.processes if len(each.memory)]
        (mapping,) = process.memory
        client = me._own_client
        open_ = messages.Open(client.next_id(), "name")
        (number, *_), answer = client.request(open_)
        client.request(messages.Lend(client.next_id(), number, buffer.address))
        buffer.unmap()
        wait_until(lambda: mapping.frames.freed, "the end of its frames")
        assert not process.memory.stock.count
        del answer
