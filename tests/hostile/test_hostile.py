"""Clients that do not speak as they should: the kernel drops them, and lives."""

from __future__ import annotations

import array
import datetime
import itertools
import os
import random
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from conftest import BOUND, PAGE, tried_with, wait_until

import realmap
from realmap import (
    InvalidAddress,
    InvalidSize,
    KernelError,
    KernelHandle,
    PhysicalMemoryExhaustion,
    Process,
    ProcessKilled,
)
from realmap.host import procfs
from realmap.kernel import snapshots
from realmap.memory import KERNEL_LAND, USER_LAND
from realmap.observe.control import Control
from realmap.wire import channel, messages
from realmap.wire.messages import Call, Map, Move, Query, Unmap, buffer_ext

#: What comes by the ring has its own hostile clients in test_ring.py; these speak by the socket alone.
CARRIERS = ("socket",)


class Raw:
    """A client that says what it likes."""

    def __init__(self, kernel: KernelHandle, greet: bool = True) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(BOUND)
        self.sock.connect(kernel.path)
        if greet:
            pid = os.getpid()
            self.say(messages.Hello(messages.PROTOCOL, "test", pid, procfs.start_time(pid)))
            assert b"welcome" in self.sock.recv(1 << 16)

    def say(self, message: Any) -> None:
        self.sock.send(b"\0" + msgspec.msgpack.encode(message))

    def answer(self) -> Any:
        data = self.sock.recv(1 << 17)
        return msgspec.msgpack.decode(data[1:], type=messages.Reply) if data else None

    def ask(self, message: Any) -> Any:
        self.say(message)
        reply = self.answer()
        if isinstance(reply, messages.Done):
            return reply.value
        assert isinstance(reply, messages.Failed)
        raise messages.exception_of(reply.error)


@pytest.fixture
def raw(kernel: KernelHandle, me: Process) -> Iterator[Raw]:
    client = Raw(kernel)
    yield client
    client.sock.close()
    wait_until(lambda: kernel.stats()["processes"] == 1)


GARBAGE = [
    b"",
    b"\0",
    b"\0" + b"garbage",
    b"\0" + os.urandom(100),
    b"\7x",
    b"\2middle of nothing",
    b"\3end of nothing",
    b"\0" + b"x" * (channel.CHUNK + 1),
    b"\0" + msgspec.msgpack.encode([99, 1]),
    b"\0" + msgspec.msgpack.encode([1]),
    b"\0" + msgspec.msgpack.encode([1, "id", "nop", []]),
    b"\0" + msgspec.msgpack.encode([1, 1, "echo", [{1: 2}]]),
    b"\0" + msgspec.msgpack.encode([1, 1, "echo", [[[]] * 60_000]]),
    b"\0" + msgspec.msgpack.encode([1, 1, "echo", [datetime.datetime(2031, 5, 7, tzinfo=datetime.UTC)]]),
    b"\0" + msgspec.msgpack.encode({"type": "hello"}),
    b"\0" + b"\xdd\xff\xff\xff\xff",  # an array of 4 294 967 295 items, it says
    b"\0" + b"\xc6\xff\xff\xff\xff",  # 4 GiB of bytes, it says
    b"\0" + b"\x91" * 60_000,  # arrays within arrays
    b"\0" + msgspec.msgpack.encode([1, 1, "echo", [msgspec.msgpack.Ext(1, b"short")]]),
    b"\0" + msgspec.msgpack.encode([1, 1, "echo", [msgspec.msgpack.Ext(77, bytes(16))]]),
    b"\0" + msgspec.msgpack.encode([2, 1, -1 << 63, 5, 11, None, None, True])[:-3],
]


@pytest.mark.parametrize("greet", [True, False], ids=["after", "instead of"])
def test_what_is_no_message_ends_that_client_only(kernel: KernelHandle, me: Process, greet: bool) -> None:
    for data in GARBAGE:
        with tried_with(data[:100]), Raw(kernel, greet).sock as sock:
            sock.send(data)
            said = sock.recv(1 << 16)
            if said and greet:
                bye = msgspec.msgpack.decode(said[1:], type=messages.Reply)
                assert isinstance(bye, messages.Bye)
                assert type(messages.exception_of(bye.error)) is ProcessKilled
                said = sock.recv(1 << 16)
            assert said == b"" or not greet
            assert me.call("echo", 1) == [1]


def test_a_message_that_grows_without_end(kernel: KernelHandle, me: Process) -> None:
    client = Raw(kernel)
    with pytest.raises(OSError, match=r"reset|[Bb]roken"):
        client.sock.send(b"\1" + bytes(channel.CHUNK))
        for _ in range(1000):
            client.sock.send(b"\2" + bytes(channel.CHUNK))
    client.sock.close()
    assert me.call("echo", 1) == [1]


def test_random_bytes(kernel: KernelHandle, me: Process) -> None:
    rng = random.Random(5)
    sample = [
        msgspec.msgpack.encode(message)
        for message in (
            Call(1, "echo", [1, buffer_ext(USER_LAND.start, 5)]),
            Map(2, 5, 5, 11, None, None, True),
            Unmap(3, USER_LAND.start, PAGE),
            Query(4, USER_LAND.start),
        )
    ]
    for _ in range(300):
        client = Raw(kernel)
        data = bytearray(rng.choice(sample))
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        client.sock.send(b"\0" + data)
        client.sock.close()
    assert me.call("echo", 1) == [1]
    wait_until(lambda: kernel.stats()["processes"] == 1)
    wait_until(lambda: not kernel.stats()["segments"])  # large ones may still be on their way to somebody who has gone


@pytest.mark.parametrize(
    ("address", "length", "error"),
    [
        (0, 5, InvalidAddress),
        (KERNEL_LAND.start, 5, InvalidAddress),
        (USER_LAND.end, 5, InvalidAddress),
        (USER_LAND.start + (1 << 40), 5, InvalidAddress),
        ((1 << 64) - 1, 5, InvalidAddress),
        (USER_LAND.start, 0, InvalidSize),
        (USER_LAND.start, (1 << 64) - 1, InvalidSize),
        (USER_LAND.start, PAGE + 1, InvalidAddress),
    ],
)
def test_buffers_that_are_not_its_own(
    kernel: KernelHandle, raw: Raw, address: int, length: int, error: type[KernelError]
) -> None:
    own = raw.ask(Map(1, PAGE, 5, 11, None, None, True))[0]
    assert own == USER_LAND.start
    with pytest.raises(error):
        raw.ask(Call(2, "sha256", [buffer_ext(address, length)]))
    assert raw.ask(Call(3, "sha256", [buffer_ext(own, PAGE)]))


NONSENSE = [
    Map(1, 0, 5, 11, None, None, True),
    Map(1, -5, 5, 11, None, None, True),
    Map(1, (1 << 64) - 1, 5, 11, None, None, True),
    Map(1, PAGE, 99, 11, None, None, True),
    Map(1, PAGE, -1, 11, None, None, True),
    Map(1, PAGE, 16, 11, None, None, True),
    Map(1, PAGE, 5, 99, None, None, True),
    Map(1, PAGE, 5, 3, None, None, True),
    Map(1, PAGE, 5, 11, 0, None, True),
    Map(1, PAGE, 5, 11, 5, None, True),
    Map(1, PAGE, 5, 11, -PAGE, None, True),
    Map(1, PAGE, 5, 11, None, "../../etc/passwd", True),
    Map(1, PAGE, 5, 11, None, "", True),
    Unmap(1, USER_LAND.start, PAGE),
    Unmap(1, -1, PAGE),
    Unmap(1, 0, 0),
    messages.More(1, USER_LAND.start, 0),
    messages.More(1, -1, -1),
    Move(1, USER_LAND.start, 0, 1 << 63),
    Query(1, 0),
    Query(1, -1),
    Call(1, "", []),
    Call(1, "no such call", []),
    messages.Ask(1, "no such service"),
]


def test_nonsense_is_answered_with_an_error_of_ours(raw: Raw) -> None:
    for message in NONSENSE:
        with tried_with(message):
            with pytest.raises(KernelError):
                raw.ask(message)
            assert raw.ask(Call(2, "nop", [])) is None


@pytest.mark.parametrize("args", [None, 5, "text", {}, {"x": []}, buffer_ext(USER_LAND.start, PAGE)])
@pytest.mark.parametrize("name", ["echo", "slow_sha256"])
def test_arguments_that_are_no_list_fail_their_call_and_nothing_else(raw: Raw, name: str, args: Any) -> None:
    own = raw.ask(Map(1, PAGE, 5, 11, None, None, True))[0]
    with pytest.raises(KernelError, match="arguments") as caught:
        raw.ask(Call(2, name, args))
    assert type(caught.value) is KernelError
    assert raw.ask(Call(3, "echo", [buffer_ext(own, PAGE)])) == [[own, PAGE]]


def test_moves_and_segments_beyond(raw: Raw) -> None:
    address = raw.ask(Map(1, 3 * PAGE, 5, 11, PAGE, None, True))[0]
    for first in (3, 1 << 40):
        assert raw.ask(messages.More(2, address, first)) is None
    with pytest.raises(KernelError):
        raw.ask(messages.More(3, address, -1))
    for start, end in ((-(1 << 63), (1 << 64) - PAGE), (address, address + 1), (address + PAGE, address), (1, PAGE)):
        with pytest.raises(InvalidAddress):
            raw.ask(Move(4, address, start, end))
    moved = raw.ask(Move(4, address, 0, (1 << 64) - PAGE))
    assert raw.ask(Unmap(5, moved, 3 * PAGE)) is None


def test_descriptors_that_nobody_asked_for_are_dropped(kernel: KernelHandle, raw: Raw) -> None:
    before = kernel.stats()["descriptors"]
    rights = array.array("i", [0] * 200)
    for number in range(1, 20):
        data = b"\0" + msgspec.msgpack.encode(Call(number, "nop", []))
        raw.sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        assert isinstance(raw.answer(), messages.Done)
    assert kernel.stats()["descriptors"] <= before  # a connection of the last test may have been about to close


def test_one_that_never_reads_is_not_waited_for(kernel: KernelHandle, me: Process) -> None:
    client = Raw(kernel)
    client.sock.setblocking(False)
    sent = 0
    with pytest.raises(BlockingIOError):
        while True:
            client.say(Call(sent + 1, "long_text", [30_000]))
            sent += 1
    assert sent > 20
    for _ in range(50):
        assert me.call("echo", 1) == [1]
    client.sock.close()


def test_one_that_asks_for_snapshots_and_reads_none(kernel: KernelHandle, me: Process) -> None:
    before = kernel.stats()["descriptors"]
    with me.map(PAGE) as buffer:
        client = Raw(kernel)
        client.sock.settimeout(1.0)
        with suppress(TimeoutError):  # it is not listened to any more
            for number in range(1, 5000):
                client.say(messages.Ask(number, "books"))
        for _ in range(20):
            assert me.call("echo", 1) == [1]
            assert len(kernel.snapshot().processes) == 2
        assert kernel.stats()["descriptors"] < before + 4 * snapshots.MOST
        assert buffer.refcount == 1
        client.sock.close()
    wait_until(lambda: kernel.stats()["descriptors"] <= before, "all of its copies to be closed")


def test_one_that_says_nothing_and_one_that_leaves_at_once(kernel: KernelHandle, me: Process) -> None:
    silent = [Raw(kernel, greet=False) for _ in range(10)]
    for _ in range(50):
        Raw(kernel, greet=False).sock.close()
    assert me.call("echo", 1) == [1]
    for client in silent:
        client.sock.close()


def test_a_control_connection_is_no_process(kernel: KernelHandle, me: Process) -> None:
    control = Raw(kernel, greet=False)
    pid = os.getpid()
    control.say(messages.Hello(messages.PROTOCOL, "test", pid, procfs.start_time(pid), True))
    assert b"welcome" in control.sock.recv(1 << 16)
    for message in (Call(1, "nop", []), Map(1, PAGE, 5, 11, None, None, True), Query(1, USER_LAND.start)):
        with pytest.raises(realmap.AccessDenied, match="control"):
            control.ask(message)
    assert control.ask(messages.Ask(2, "stats"))["processes"] == 1
    control.sock.close()


def test_more_clients_than_descriptors(kernel: KernelHandle, me: Process) -> None:
    """Where no descriptor is left a client is told so, commands too; the others go on."""
    soft, hard = resource.prlimit(kernel.pid, resource.RLIMIT_NOFILE)
    taken = {int(fd) for fd in os.listdir(f"/proc/{kernel.pid}/fd")}
    first = next(fd for fd in itertools.count() if fd not in taken)
    resource.prlimit(kernel.pid, resource.RLIMIT_NOFILE, (first, hard))
    try:
        for connect in (realmap.connect, Control, realmap.connect):
            with pytest.raises(PhysicalMemoryExhaustion, match=f"no descriptors left .limit {first}"):
                connect(kernel.path)
        assert me.query(USER_LAND.start)
    finally:
        resource.prlimit(kernel.pid, resource.RLIMIT_NOFILE, (soft, hard))
    realmap.connect(kernel.path).close()
    assert me.map(5)[:] == bytes(5)


# ---- clients that stop, leave, or lie about what they are ----------------------------------


def _client(kernel: KernelHandle, act: Callable[[Process], None]) -> int:
    """A forked process that connects and acts; its pid."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            with realmap.connect(kernel.path) as process:
                act(process)
            status = 0
        finally:
            os._exit(status)
    return pid


def test_one_that_is_stopped_in_the_middle_of_a_call(kernel: KernelHandle, me: Process) -> None:
    def act(process: Process) -> None:
        with process.map(PAGE) as buffer:
            buffer[:5] = b"hello"
            went_on = threading.Event()
            signal.signal(signal.SIGCONT, lambda *_: went_on.set())
            threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGSTOP)).start()
            while not went_on.is_set():
                if process.call("peek", buffer, 5, 0) != b"hello":
                    os._exit(2)

    pid = _client(kernel, act)
    assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
    with me.map(PAGE) as mine:
        for _ in range(200):
            assert me.call("poke", mine, b"x", 0) is None
    assert kernel.audit()
    os.kill(pid, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("blocking", [False, True])
def test_one_that_exits_in_the_middle_of_a_call(kernel: KernelHandle, me: Process, blocking: bool) -> None:
    def act(process: Process) -> None:
        buffer = process.map(PAGE)
        threading.Timer(0.02, lambda: os._exit(3)).start()
        while True:
            process.call("slow_sha256" if blocking else "sha256", buffer)

    for _ in range(5):
        assert os.waitstatus_to_exitcode(os.waitpid(_client(kernel, act), 0)[1]) == 3
    wait_until(lambda: kernel.stats()["processes"] == 1)
    wait_until(lambda: not kernel.stats()["segments"])
    assert me.call("echo", 1) == [1]


def test_one_that_closes_every_descriptor_it_has(kernel: KernelHandle, me: Process) -> None:
    def act(process: Process) -> None:
        buffer = process.map(PAGE)
        os.closerange(3, 1000)
        buffer[0] = 1
        with suppress(realmap.KernelError, OSError):
            process.call("sha256", buffer)
        os._exit(0)

    for _ in range(5):
        assert os.waitstatus_to_exitcode(os.waitpid(_client(kernel, act), 0)[1]) == 0
    wait_until(lambda: kernel.stats()["processes"] == 1)
    assert not kernel.stats()["segments"]


def test_forks_of_one_that_is_connected(kernel: KernelHandle, me: Process) -> None:
    """Children that hold its socket open do not keep it alive in the books; one that speaks on it hurts only it."""
    client = Raw(kernel)
    pid = os.fork()
    if not pid:
        with suppress(BaseException):
            client.say(Call(1, "echo", [1]))
            client.sock.send(b"\xff\xff")
        os._exit(0)
    os.waitpid(pid, 0)
    client.sock.settimeout(BOUND)
    with suppress(EOFError, ConnectionError, realmap.KernelError):
        while client.sock.recv(1 << 16):
            pass
    client.sock.close()
    wait_until(lambda: kernel.stats()["processes"] == 1)
    assert me.call("echo", 1) == [1]


def test_a_mapping_unmapped_in_another_thread(kernel: KernelHandle, me: Process) -> None:
    """A call on it either has it to its end, or is told that nothing is there; the bytes are never another's."""
    stop = threading.Event()
    said: list[object] = []

    def call_on(address: int) -> None:
        while not stop.is_set():
            try:
                said.append(
                    me._own_client.request(Call(me._own_client.next_id(), "peek", [buffer_ext(address, 4), 4, 0]))[0]
                )
            except realmap.InvalidAddress:
                said.append(None)

    buffer = me.map(PAGE)
    buffer[:4] = b"mine"
    thread = threading.Thread(target=call_on, args=(buffer.address,))
    thread.start()
    wait_until(lambda: b"mine" in said)
    buffer.unmap()
    others = [me.map(PAGE) for _ in range(50)]
    for other in others:
        other[:4] = b"else"
    wait_until(lambda: None in said)
    stop.set()
    thread.join(BOUND)
    assert set(said) == {b"mine", None}


def test_only_a_control_connection_ends_the_kernel(kernel: KernelHandle, raw: Raw) -> None:
    with pytest.raises(realmap.AccessDenied, match="control"):
        raw.ask(messages.Ask(1, "shutdown"))
    assert kernel.stats()["processes"]
