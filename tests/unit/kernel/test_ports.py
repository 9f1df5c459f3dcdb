"""Services between processes, as the kernel sees them: raw clients play server and caller."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import socket
import time
from collections.abc import Callable

import msgspec
import pytest
from conftest import BOUND, PAGE, wait_until
from raw_client import RawClient, RawServer, RawSession
from stage import TOTALS, Stage, run, stage, word

import realmap
from realmap import (
    InvalidAddress,
    InvalidMemState,
    InvalidSize,
    Kernel,
    KernelError,
    LimitReached,
    ServerDied,
    UnknownSyscall,
)
from realmap._core import Durations
from realmap.kernel.ports import MOST, NAMES, REMEMBERED
from realmap.observe.control import Control
from realmap.rights import MemoryType
from realmap.wire import channel, messages
from realmap.wire.news import Granted, Opened, Served
from realmap.wire.records import GrantInfo, SessionInfo
from realmap.wire.ring import RingEnd
from realmap.wire.seat import BUSY, CHANGES, GRANTS, THREADS, WAITING, WORDS, SeatPage

__all__ = ["run", "stage"]


# ---- what is made ----------------------------------------------------------------------------------


@pytest.mark.parametrize("spin", [0, 50])
def test_caller_and_server_get_two_ends_of_a_line(run: Callable[..., Kernel], spin: float) -> None:
    path = run(spin).path
    with RawClient(path) as host, RawServer(host, "name", "other", threads=3) as server:
        assert word(server.page, THREADS) == 3
        with RawClient(path) as caller, RawSession(caller, "other") as session:
            opened, (line, *ring) = server.hear()
            assert opened == Opened(session.number, caller.number, os.getpid(), os.geteuid())
            assert (session.seat, session.pid, session.spin) == (server.number, os.getpid(), spin)
            session.sock.send(b"hello")
            assert os.read(line, 10) == b"hello"
            os.write(line, b"you")
            assert session.sock.recv(10) == b"you"
            assert len(ring) == bool(spin) and len(session.fds) == 1 + bool(spin)
            if spin:
                ours, theirs = RingEnd.serve(ring[0]), RingEnd.join(session.fds[0])
                theirs._send(b"by the ring", session.sock.fileno())
                assert ours._pop() == b"by the ring"
                ours._close()
                theirs._close()
            page = SeatPage(server.page, writable=True)
            page.words[BUSY] = 7
            page.close()
            assert word(session.fds[-1], BUSY) == 7
            with pytest.raises(PermissionError):
                SeatPage(session.fds[-1], writable=True)
            channel.close_all([line, *ring])


@pytest.mark.parametrize("rights", [realmap.u_rw, realmap.u_r])
def test_a_server_gets_the_frames_and_no_more_rights_than_its_caller(stage: Stage, rights: int) -> None:
    size = 70 * PAGE
    address = stage.caller.map(size, int(rights), PAGE)
    frames = stage.kernel.books.processes
    (mapping,) = [each for process in frames for each in process.memory if each.address == address]
    mapping.frames.write(0, memoryview(b"".join(bytes([at]) * PAGE for at in range(70))), address)
    before = word(stage.session.fds[-1], GRANTS)
    stage.session.lend(address + 5)
    heard = [stage.server.hear() for _ in range(2)]
    assert word(stage.session.fds[-1], GRANTS) == before + 2
    seen = b""
    for (granted, fds), first in zip(heard, (0, 64), strict=True):
        assert isinstance(granted, Granted)
        assert (granted.session, granted.serial) == (stage.session.number, mapping.serial)
        assert (granted.address, granted.length, granted.rights) == (address, size, rights)
        assert (granted.kind, granted.first, granted.count) == (int(MemoryType.HEAP), first, 70)
        assert len(fds) == len(granted.pieces)
        for fd, (offset, length) in zip(fds, granted.pieces, strict=True):
            seen += os.pread(fd, length, offset)
            writable = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
            assert writable == (rights == realmap.u_rw)
            if not writable:
                with pytest.raises(PermissionError):
                    mmap.mmap(fd, PAGE, prot=mmap.PROT_WRITE)
        channel.close_all(fds)
    assert seen == mapping.frames.read(0, size, address)
    assert "lent" in " ".join(mapping.frames.holders())
    stage.session.lend(address)  # again: nothing is said
    stage.session.lend(stage.address)
    granted = stage.hear()
    assert isinstance(granted, Granted) and granted.address == stage.address


def test_part_of_a_segment_is_granted_as_that(stage: Stage) -> None:
    token, _ = stage.caller.ask(messages.Share, stage.address, 3 * PAGE, 3, None, None, 0.0)
    (address, *_), fds = stage.caller.ask(messages.Attach, token, PAGE, PAGE, None)
    channel.close_all(fds)
    stage.session.lend(address)
    granted, fds = stage.server.hear()
    assert isinstance(granted, Granted) and granted.pieces == [(0, PAGE)]
    (mapping,) = [
        each for process in stage.kernel.books.processes for each in process.memory if each.address == stage.address
    ]
    assert os.fstat(fds[0]).st_ino == mapping.frames.segments[1].inode
    channel.close_all(fds)


# ---- who is chosen ---------------------------------------------------------------------------------


def test_the_idle_one_is_chosen_then_who_has_fewest_sessions_then_in_turn(run: Callable[..., Kernel]) -> None:
    path = run().path
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(RawClient(path))
        servers = [stack.enter_context(RawServer(host, "name")) for _ in range(3)]
        seats = [server.number for server in servers]
        caller = stack.enter_context(RawClient(path))

        def chosen(*but: int) -> int:
            return stack.enter_context(RawSession(caller, "name", but)).seat

        assert [chosen() for _ in range(6)] == seats * 2
        pages = [SeatPage(server.page, writable=True) for server in servers]
        pages[0].words[BUSY] = pages[1].words[WAITING] = 1
        assert [chosen() for _ in range(3)] == [seats[2]] * 3
        assert chosen(seats[2]) == seats[0]
        assert chosen(seats[2]) == seats[1]
        with pytest.raises(UnknownSyscall, match="no other process serves 'name'"):
            chosen(*seats)
        with pytest.raises(UnknownSyscall, match="neither the kernel nor any process serves 'nobody'"):
            caller.ask(messages.Open, "nobody", [])
        for page in pages:
            page.words[BUSY] = 2**64 - 1  # it lies: it is served less
            page.close()
        assert chosen() in seats


def test_a_page_tells_that_a_seat_of_its_names_comes_or_goes(stage: Stage) -> None:
    page = stage.session.fds[-1]
    assert word(page, CHANGES) == 1
    with RawServer(stage.host, "stranger"):
        assert word(page, CHANGES) == 1
    with RawServer(stage.host, "another", "name") as rival:
        assert word(page, CHANGES) == 2
        rival.sock.shutdown(socket.SHUT_WR)  # it closes in good order
        wait_until(lambda: word(page, CHANGES) == 3)
    wait_until(lambda: word(page, CHANGES) == 4)


def test_a_server_that_scribbles_over_its_page_keeps_nobody_from_serving(stage: Stage) -> None:
    page = SeatPage(stage.server.page, writable=True)
    for each in range(WORDS):
        page.words[each] = 2**64 - 1
    page.close()
    with RawServer(stage.caller, "name") as other:
        assert word(stage.server.page, CHANGES) == 0
        stage.session.lend(stage.address)
        assert word(stage.server.page, GRANTS) == 0
        stage.host.sock.close()
        wait_until(lambda: [each.number for each in stage.kernel.books.ports] == [other.number])


# ---- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "threads", "queue", "error", "why"),
    [
        ([], 1, 0, InvalidSize, "1 to"),
        (["n"] * (NAMES + 1), 1, 0, InvalidSize, "1 to"),
        ([""], 1, 0, KernelError, "has 1 to"),
        (["n" * 201], 1, 0, KernelError, "has 1 to"),
        (["a", "b", "a"], 1, 0, KernelError, "twice: 'a'"),
        (["a", "nop"], 1, 0, KernelError, "the kernel has a syscall 'nop'"),
        (["a"], 0, 0, InvalidSize, "at least one thread"),
        (["a"], -1, 0, InvalidSize, "at least one thread"),
        (["a"], MOST + 1, 0, InvalidSize, "at most"),
        (["a"], 1, -1, InvalidSize, "a queue of 0 or more"),
        (["a"], 1, 2**64 - 1, InvalidSize, "at most"),
    ],
)
def test_what_cannot_be_served(
    stage: Stage, names: list[str], threads: int, queue: int, error: type[KernelError], why: str
) -> None:
    with pytest.raises(error, match=why):
        stage.host.ask(messages.Serve, names, threads, queue)
    with RawServer(stage.host, "a"):  # nothing of it is left
        pass


def test_a_name_is_the_kernels_or_a_processs(stage: Stage) -> None:
    def name(call: realmap.Call) -> None:
        pass

    for replace in (False, True):
        with pytest.raises(KernelError, match="a process serves 'name' already"):
            stage.kernel.register(name, replace=replace)
    stage.server.sock.close()
    wait_until(lambda: not stage.kernel.books.ports.is_served("name"))
    stage.kernel.register(name)
    with pytest.raises(KernelError, match="the kernel has a syscall 'name'"):
        stage.host.ask(messages.Serve, ["name"], 1, 0)


def test_what_cannot_be_lent(stage: Stage) -> None:
    def lend(session: int, address: int) -> None:
        stage.caller.ask(messages.Lend, session, address)

    number = stage.session.number
    for address in (0, -1, 2**64 - 1, stage.address + 3 * PAGE):
        with pytest.raises(InvalidAddress, match="nothing is mapped there"):
            lend(number, address)
    private = stage.caller.map(PAGE, kind=MemoryType.NORMAL)
    with pytest.raises(InvalidMemState, match="private memory cannot be lent"):
        lend(number, private)
    for session in (0, -1, number + 1, 2**64 - 1):
        with pytest.raises(ServerDied, match=f"no session {session}") as caught:
            lend(session, stage.address)
        assert not caught.value.began
    with pytest.raises(ServerDied):  # it is somebody else's
        stage.host.ask(messages.Lend, number, stage.address)
    stage.host.say(messages.Close(1, number))
    stage.session.lend(stage.address)  # nothing else has become of it


@pytest.mark.parametrize(
    "told",
    [
        b"\xc1",
        b"\x90" * (channel.CHUNK + 100),
        msgspec.msgpack.encode(Served({}, [], [])) + b"\0",
        msgspec.msgpack.encode(Opened(1, 2, 3, 4)),
        msgspec.msgpack.encode([5, {"name": [1, 0, [5, 496, 1]]}, [], []]),
        msgspec.msgpack.encode([5, {"name": [1, 0, [5, 3]]}, [], []]),
        msgspec.msgpack.encode([5, {"name": [1, 0, [5, 3, 2**63, 4, 2**63]]}, [], []]),
        msgspec.msgpack.encode([5, {"name": [1, 0, [-5, 3, 1]]}, [], []]),
        msgspec.msgpack.encode([5, {"name": [-1, 0, [0]]}, [], []]),
        b"\x94\x05" + b"\x91" * 5000,
    ],
    ids=str,
)
def test_a_server_that_tells_what_is_no_message_loses_its_seat(stage: Stage, told: bytes) -> None:
    stage.server.tell(told)
    with pytest.raises((EOFError, ConnectionResetError)):
        stage.server.hear()
    wait_until(lambda: stage.session.has_ended)
    with pytest.raises(UnknownSyscall):
        stage.caller.ask(messages.Open, "name", [])
    assert stage.host.ask(messages.Query, stage.address)  # its process goes on


def test_what_a_server_tells_is_in_the_books(stage: Stage) -> None:
    told = Served({"name": (3, 1, [9000, 20, 2, 30, 1])}, [(stage.session.number, 5, "name", 7.5)], [(1, 2, 3, 4, 5)])
    stage.server.tell(told)
    (seat,) = stage.kernel.books.ports
    wait_until(lambda: seat.served == told)


def test_servers_that_count_too_high_leave_the_snapshot_as_it_is(stage: Stage) -> None:
    with RawServer(stage.host, "name") as second, RawServer(stage.host, "name") as third:
        for each in (stage.server, second, third):
            each.tell(Served({"name": (2**62 - 1, 2**62 - 1, [0])}, [], []))
        with Control(stage.kernel.path) as control:
            wait_until(lambda: {each.name: each.count for each in control.snapshot().calls}["name"] == 2**63 - 1)


def test_limits(run: Callable[..., Kernel]) -> None:
    path = run(seats=2, sessions=3, grants=2).path
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(RawClient(path))
        server, _ = [stack.enter_context(RawServer(host, "name")) for _ in range(2)]
        for client in (host, stack.enter_context(RawClient(path))):  # of each pid, over all its connections
            with pytest.raises(LimitReached, match=r"2 services; the kernel's limit \(seats\) is 2"):
                RawServer(client, "more")
        sessions = [stack.enter_context(RawSession(host, "name")) for _ in range(3)]
        with pytest.raises(LimitReached, match=r"\(sessions\) is 3"):
            RawSession(host, "name")
        with pytest.raises(LimitReached, match="excludes no more seats"):
            host.ask(messages.Open, "name", [0] * 4)
        addresses = [host.map(PAGE) for _ in range(2)]
        for session in sessions[:2]:
            session.lend(addresses[0])
        with pytest.raises(LimitReached, match=r"\(grants\) is 2"):
            sessions[0].lend(addresses[1])
        host.say(messages.Close(0, sessions[1].number))
        sessions[0].lend(addresses[1])
        server.sock.close()
        wait_until(lambda: sessions[0].has_ended)
        stack.enter_context(RawServer(host, "name"))
        stack.enter_context(RawSession(host, "name"))


def test_a_caller_has_so_many_descriptors_of_its_server_and_no_more(run: Callable[..., Kernel]) -> None:
    """Over all sessions between the two processes; what goes beyond is not sent."""
    with contextlib.ExitStack() as stack:
        stage = stack.enter_context(Stage(run()))
        server = stack.enter_context(RawServer(stage.host, "few", descriptors=5))
        first, second = [stack.enter_context(RawSession(stage.caller, "few")) for _ in range(2)]
        stage.session.lend(stage.address)  # to another seat of that process
        words = "has 3 descriptors of what process .*, 5 at most, and this takes 3"
        with pytest.raises(LimitReached, match=words) as caught:
            first.lend(stage.address)
        assert (caught.value.what, caught.value.limit) == ("descriptors", 5)
        one, other = stage.caller.map(PAGE), stage.caller.map(PAGE)
        first.lend(one)
        first.lend(one)  # again: it is there
        second.lend(one)
        with pytest.raises(LimitReached):
            second.lend(other)
        stage.caller.say(messages.Unmap(0, one, PAGE))
        second.lend(other)
        stage.session.sock.close()
        wait_until(lambda: len(stage.kernel._seats._lines) == 2)
        first.lend(stage.address)
        told = []
        while len(told) < 8:
            news, fds = server.hear()
            channel.close_all(fds)
            told.append(news)
        granted = [(each.session, each.address) for each in told if isinstance(each, Granted)]
        assert granted == [
            (first.number, one),
            (second.number, one),
            (second.number, other),
            (first.number, stage.address),
        ]
        peer = stage.kernel.books.peers.process(os.getpid())
        assert peer.lent == {os.getpid(): 4}
    wait_until(lambda: not peer.lent)


def test_the_books_tell_who_serves_whom_and_what_is_lent(run: Callable[..., Kernel]) -> None:
    kernel = run()
    with Stage(kernel) as stage, Control(kernel.path) as control, RawServer(stage.host, "name", "more") as other:
        stage.session.lend(stage.address)
        stage.hear()
        number, caller = stage.session.number, stage.caller.number
        lent = [(caller, stage.address + 5, 100, 4096, 3), (0, 0, 5, 8192, 1)]
        calls = [(number, 7, "name", time.monotonic() - 1.0), (number, 8, "name", None), (number + 1, 9, "name", None)]
        counts = Durations()
        counts.since(time.monotonic_ns() - 10**9)
        for server in (stage.server, other):
            told = {"name": (5, 2, counts.counts()), "nop": (1, 1, [0])}
            server.tell(Served(told, calls if server is stage.server else [], lent, kept=[(12288, PAGE)]))
        wait_until(lambda: control.stats()["lent"] == 4)
        found = control.snapshot()
        assert [msgspec.structs.astuple(each) for each in found.seats] == [
            (stage.server.number, stage.host.number, ["name"], 2, 0, False, 1, 1),
            (other.number, stage.host.number, ["name", "more"], 1, 0, False, 0, 0),
        ]
        assert found.sessions == [SessionInfo(number, stage.server.number, caller)]
        (grant,) = found.grants
        (process,) = [each for each in found.processes if each.number == caller]
        (mapping,) = process.mappings
        assert grant == GrantInfo(number, mapping.frames, 0, stage.address, 3 * PAGE, mapping.rights)
        assert [(each.process, each.address, each.at, each.kept) for each in found.lent[:3]] == [
            (caller, stage.address + 5, 4096, False),
            (None, 0, 8192, False),
            (None, 0, 12288, True),
        ]
        one, two = [each for each in found.running if each.server is not None]
        assert (one.process, one.syscall, one.server, two.seconds) == (caller, "name", stage.host.number, None)
        assert one.seconds is not None and 1.0 <= one.seconds < BOUND
        by_name = {each.name: each for each in found.calls}
        assert by_name["nop"].servers is None and not by_name["nop"].count
        assert (by_name["name"].count, by_name["name"].failed, by_name["name"].servers) == (10, 4, 2)
        assert by_name["name"].p50 == pytest.approx(1.0, rel=0.2)
        assert by_name["more"].p50 is None and by_name["more"].servers == 1
        stats = control.stats()
        assert [stats[name] for name in (*TOTALS, "lent", "lent_bytes")] == [2, 1, 1, 4, 210]
        stage.server.sock.close()
        wait_until(lambda: control.stats()["seats"] == 1)
        (left,) = [each for each in control.snapshot().calls if each.name == "name"]
        assert (left.count, left.servers) == (10, 1)  # what was done is not undone


def test_what_servers_did_is_known_after_the_last_one_has_gone(run: Callable[..., Kernel]) -> None:
    kernel = run()
    with RawClient(kernel.path) as host, Control(kernel.path) as control:

        def serve(*names: str, calls: int) -> None:
            with RawServer(host, *names) as server:
                seat = list(kernel.books.ports)[-1]
                server.tell(Served({name: (calls, 1, [9000, 20, 2]) for name in names}, [], []))
                wait_until(lambda: seat.served.names)
            wait_until(lambda: not list(kernel.books.ports))

        def counted() -> dict[str, tuple[int, int | None]]:
            return {each.name: (each.count, each.servers) for each in control.snapshot().calls if each.count}

        serve("name", calls=5)
        assert counted() == {"name": (5, 0)}
        serve("name", "never called", calls=0)
        serve("name", "other", calls=3)
        assert counted() == {"name": (8, 0), "other": (3, 0)}
        (found,) = [each for each in control.snapshot().calls if each.name == "name"]
        assert found.failed == 2 and found.p50 is not None
        names = [f"name {number}" for number in range(REMEMBERED - 1)]
        serve(*names, calls=1)
        assert counted() == {"other": (3, 0)} | dict.fromkeys(names, (1, 0))
        with RawServer(host, "other"):
            assert counted()["other"] == (3, 1)
        wait_until(lambda: not list(kernel.books.ports))
        kernel.register(realmap.syscall(name="other")(lambda call: None))
        assert [each.count for each in control.snapshot().calls if each.name == "other"] == [0]
