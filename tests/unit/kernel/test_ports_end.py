"""How a seat, a session and a grant end, as the kernel sees it: raw clients play server and caller."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable

import pytest
from conftest import PAGE, wait_until
from raw_client import RawClient, RawSession
from stage import Stage, run, stage, word

from realmap import ServerDied, UnknownSyscall
from realmap.wire import channel, messages
from realmap.wire.news import Gone, Granted, Opened, Revoked
from realmap.wire.seat import GRANTS

__all__ = ["run", "stage"]


def test_unmapped_and_moved_are_revoked(stage: Stage) -> None:
    other = stage.caller.map(PAGE)
    granted = []
    for address in (stage.address, other):
        stage.session.lend(address)
        news = stage.hear()
        assert isinstance(news, Granted)
        granted.append(news.serial)
    before = word(stage.session.fds[-1], GRANTS)
    stage.caller.ask(messages.Unmap, stage.address, 3 * PAGE)
    assert stage.hear() == Revoked(stage.session.number, granted[0])
    moved, _ = stage.caller.ask(messages.Move, other, other, other + PAGE)
    assert stage.hear() == Revoked(stage.session.number, granted[1])
    assert word(stage.session.fds[-1], GRANTS) == before + 2
    assert stage.kernel.books.peers.totals()["grants"] == 0
    stage.session.lend(moved)  # the same mapping, elsewhere
    again = stage.hear()
    assert isinstance(again, Granted) and (again.serial, again.address) == (granted[1], moved)


def end_of_server(stage: Stage) -> None:
    stage.host.sock.close()


def end_of_seat(stage: Stage) -> None:
    stage.server.sock.close()


def end_of_line(stage: Stage) -> None:
    stage.line.shutdown(socket.SHUT_RDWR)


def end_by_a_word(stage: Stage) -> None:
    stage.server.tell(Gone(stage.session.number))


def end_of_caller(stage: Stage) -> None:
    stage.caller.sock.close()


def end_of_session(stage: Stage) -> None:
    stage.caller.say(messages.Close(0, stage.session.number))


def end_of_callers_line(stage: Stage) -> None:
    stage.session.sock.close()


def end_of_kernel(stage: Stage) -> None:
    stage.kernel.stop()


@pytest.mark.parametrize("end", [end_of_server, end_of_seat, end_of_line, end_by_a_word])
def test_whatever_ends_a_server_ends_its_callers_sessions(stage: Stage, end: Callable[[Stage], None]) -> None:
    """Also while a forked child has the sockets."""
    stage.session.lend(stage.address)
    inherited = [os.dup(stage.line.fileno()), os.dup(stage.server.sock.fileno())] if end is end_of_server else []
    end(stage)
    wait_until(lambda: stage.session.has_ended and not stage.kernel.books.peers.totals()["grants"])
    with pytest.raises(ServerDied):
        stage.session.lend(stage.address)
    assert stage.caller.ask(messages.Unmap, stage.address, 3 * PAGE) == (None, [])
    channel.close_all(inherited)


@pytest.mark.parametrize("end", [end_of_caller, end_of_session, end_of_callers_line, end_of_line])
def test_whatever_ends_a_caller_is_told_to_its_server(stage: Stage, end: Callable[[Stage], None]) -> None:
    stage.session.lend(stage.address)
    stage.hear()
    inherited = [] if end is end_of_callers_line else [os.dup(stage.session.sock.fileno())]
    end(stage)
    assert stage.hear() == Gone(stage.session.number)
    poll = select.poll()
    poll.register(stage.line, 0)
    assert poll.poll(0), "the line is shut"
    wait_until(lambda: not stage.kernel.books.peers.totals()["grants"])
    with RawClient(stage.kernel.path) as other, RawSession(other, "name"):  # it serves on
        assert isinstance(stage.hear(), Opened)
    channel.close_all(inherited)


def test_the_end_of_the_kernel_ends_everything(stage: Stage) -> None:
    stage.session.lend(stage.address)
    stage.hear()
    end_of_kernel(stage)
    assert stage.session.has_ended
    with pytest.raises(EOFError):
        stage.hear()


def test_a_server_that_closes_in_good_order_gets_no_new_sessions_and_keeps_those_it_has(stage: Stage) -> None:
    stage.server.sock.shutdown(socket.SHUT_WR)
    wait_until(lambda: not stage.kernel.books.ports.is_served("name"))
    with pytest.raises(UnknownSyscall):
        stage.caller.ask(messages.Open, "name", [])
    stage.session.lend(stage.address)
    assert isinstance(stage.hear(), Granted)
    stage.session.sock.send(b"still")
    assert stage.line.recv(10) == b"still"
    stage.server.sock.close()
    wait_until(lambda: stage.session.has_ended)
