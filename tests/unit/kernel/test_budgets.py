"""What a peer may have of a kernel, over all its connections: each budget reached, named, and given back."""

from __future__ import annotations

import math
import os
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import msgspec
import pytest
import syscalls
from conftest import BOUND, PAGE, wait_until

import realmap
from realmap import Kernel, LimitReached, Limits, PhysicalMemoryExhaustion
from realmap.host import procfs
from realmap.kernel.books import Books
from realmap.kernel.processes import UserProcess
from realmap.kernel.services import SERVICES
from realmap.memory import USER_LAND, KernelMemory
from realmap.observe.control import Control
from realmap.rights import MemoryType, u_rw
from realmap.serving.line import BACKLOG
from realmap.wire import channel, messages
from realmap.wire.messages import MAX_MESSAGE


@realmap.syscall(blocking=True)
def long_answer(call: realmap.Call, size: int) -> bytes:
    """So many bytes, from a worker thread."""
    return bytes(size)


@pytest.fixture
def limited() -> Iterator[Callable[..., Kernel]]:
    """Kernels in this process with the tests' handlers and limits of choice. Everything takes the socket."""
    made: list[Kernel] = []

    def make(**limits: Any) -> Kernel:
        made.append(Kernel(syscalls=[*syscalls.ALL, long_answer], limits=Limits(**limits), spin=0).start())
        return made[-1]

    yield make
    for kernel in made:
        kernel.stop()


class Raw:
    """A client that sends what it likes, by the socket alone, and reads when it is asked to."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(BOUND)
        self.sock.connect(path)
        pid = os.getpid()
        self.say(messages.Hello(messages.PROTOCOL, "test", pid, procfs.start_time(pid)))
        assert b"welcome" in self.sock.recv(1 << 16)

    def say(self, message: Any) -> None:
        for part in channel.datagrams(msgspec.msgpack.encode(message)):
            self.sock.send(part)

    def last_words(self) -> str:
        """What the kernel said when it ended this connection; "" where it could not."""
        words = ""
        try:
            while data := self.sock.recv(1 << 17):
                reply = msgspec.msgpack.decode(data[1:], type=messages.Reply) if data[0] == channel.WHOLE else None
                if isinstance(reply, messages.Bye):
                    words = reply.error.why
        except ConnectionError:
            pass
        return words

    def close(self) -> None:
        self.sock.close()


def test_connections(limited: Callable[..., Kernel]) -> None:
    kernel = limited(connections=3)
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(realmap.connect(kernel.path))
        silent = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        silent.connect(kernel.path)
        with pytest.raises(LimitReached, match=r"process \d+ has 3 connections.*\(connections\) is 3: close") as caught:
            realmap.connect(kernel.path)
        assert (caught.value.what, caught.value.limit) == ("connections", 3)
        assert kernel.books.peers.totals()["connections"] == 3
    wait_until(lambda: not kernel.books.peers.totals()["connections"])
    realmap.connect(kernel.path).close()


def test_half_sent(limited: Callable[..., Kernel]) -> None:
    kernel = limited(half_sent=3 * channel.CHUNK)
    part = bytes([channel.FIRST]) + bytes(channel.CHUNK)
    with realmap.connect(kernel.path) as me, ExitStack() as stack:
        clients = [stack.enter_context(closing(Raw(kernel.path))) for _ in range(4)]
        for count, client in enumerate(clients[:3], 1):
            client.sock.send(part)
            wait_until(lambda count=count: kernel.books.peers.totals()["half_sent"] == count * channel.CHUNK)
        clients[3].sock.send(part)
        assert "the kernel's limit (half_sent) is 196608: send" in clients[3].last_words()
        assert me.call("nop") is None
        clients[0].sock.send(bytes([channel.LAST]) + b"\xc1")  # complete, and no message
        assert "no message" in clients[0].last_words()
        wait_until(lambda: kernel.books.peers.totals()["half_sent"] == 2 * channel.CHUNK)
        clients[1].sock.send(part[: 1 + channel.CHUNK // 2])  # begun anew: the former is forgotten
        wait_until(lambda: kernel.books.peers.totals()["half_sent"] == 3 * channel.CHUNK // 2)
    wait_until(lambda: not kernel.books.peers.totals()["half_sent"])


def test_what_is_unread_is_bounded_for_each_client(limited: Callable[..., Kernel]) -> None:
    """Calls wait while their caller reads nothing; each gets its answer once it does."""
    kernel, calls = limited(running=2), 40
    with realmap.connect(kernel.path) as me, closing(Raw(kernel.path)) as client:
        for number in range(1, calls + 1):
            client.say(messages.Call(number, "long_answer", msgspec.Raw(msgspec.msgpack.encode([MAX_MESSAGE // 2]))))
        wait_until(lambda: kernel.books.peers.totals()["unread"] > BACKLOG)
        _, process = kernel.books.processes
        assert me.call("sleep", 0) == 0
        assert kernel.books.peers.totals()["unread"] <= BACKLOG + 3 * MAX_MESSAGE
        assembler, answers = channel.Assembler(), 0
        while answers < calls:
            answers += assembler.feed(client.sock.recv(channel.DATAGRAM)) is not None
        wait_until(lambda: not process.calls and not kernel.books.peers.totals()["unread"])


def test_running_over_all_connections(limited: Callable[..., Kernel]) -> None:
    kernel = limited(running=2)
    with ExitStack() as stack:
        clients = [stack.enter_context(realmap.connect(kernel.path)) for _ in range(4)]
        pairs = [(client, client.map(PAGE)) for client in clients]
        threads = [threading.Thread(target=client.call, args=("hold", "all", buffer)) for client, buffer in pairs]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(kernel.dispatch.running) == 4)
        assert sum(each.began is not None for each in kernel.dispatch.running) <= 2
        assert kernel.workers.threads <= 2
        for _ in threads:
            clients[0].call("go")
        for thread in threads:
            thread.join(BOUND)
        assert not any(thread.is_alive() for thread in threads)
        wait_until(lambda: not kernel.dispatch.running)
    peer = kernel.books.peers.process(os.getpid())
    wait_until(lambda: not peer.calls and not peer.maps)


def test_unread(limited: Callable[..., Kernel]) -> None:
    kernel = limited(unread=MAX_MESSAGE, running=8)
    with realmap.connect(kernel.path) as me, closing(Raw(kernel.path)) as client:
        for number in range(1, 9):
            client.say(messages.Call(number, "long_answer", msgspec.Raw(msgspec.msgpack.encode([MAX_MESSAGE // 2]))))
        wait_until(lambda: len(kernel.books.processes) == 1, "the end of who does not read")
        assert me.call("nop") is None
        assert kernel.books.peers.totals()["unread"] == 0


def test_undecoded(limited: Callable[..., Kernel]) -> None:
    kernel = limited(undecoded=500_000, running=1)
    with realmap.connect(kernel.path) as me, me.map(PAGE) as buffer:
        thread = threading.Thread(target=lambda: me.call("hold", "n" * 300_000, buffer))
        thread.start()
        wait_until(lambda: kernel.dispatch.running)
        with pytest.raises(LimitReached, match=r"\(undecoded\) is 500000: wait") as caught:
            me.call("hold", "n" * 300_000, buffer)
        assert caught.value.what == "undecoded"
        assert me.call("echo", "n" * 600_000)  # it is not kept
        me.call("go")
        thread.join(BOUND)
        wait_until(lambda: not kernel.dispatch.running)
        assert kernel.books.peers.totals()["undecoded"] == 0
        assert kernel.books.peers.process(os.getpid()).used["calls"] == 0


def test_buffers_of_a_call(limited: Callable[..., Kernel]) -> None:
    kernel = limited(buffers=4)
    with realmap.connect(kernel.path) as me:
        parts = [me.map(PAGE) for _ in range(5)]
        assert len(me.call("echo", *parts[:4])) == 4
        with pytest.raises(LimitReached, match=r"5 buffers.*\(buffers\) is 4"):
            me.call("echo", *parts)
        first = parts[0].address
        assert [each.address for each in parts] == [first + number * PAGE for number in range(5)]
        whole = messages.buffer_ext(first, 5 * PAGE)
        with pytest.raises(LimitReached, match="in 4 mappings"):
            me._own_client.request(messages.Call(me._own_client.next_id(), "echo", [whole]))  # type: ignore[arg-type]
        two = [messages.buffer_ext(first, 3 * PAGE)] * 2
        with pytest.raises(LimitReached, match="in 2 mappings"):
            me._own_client.request(messages.Call(me._own_client.next_id(), "echo", two))  # type: ignore[arg-type]


def test_handles_are_counted_by_their_makers_process(limited: Callable[..., Kernel]) -> None:
    kernel = limited(handles=3, orphans=2)
    with realmap.connect(kernel.path) as me, realmap.connect(kernel.path) as other:
        buffer, others = me.map(PAGE), other.map(PAGE)
        handles = [me.share(buffer), me.share(buffer, uses=1), other.share(others)]
        for each, its in ((me, buffer), (other, others)):
            with pytest.raises(LimitReached, match=r"has 3 handles.*\(handles\) is 3: revoke") as caught:
                each.share(its)
            assert (caught.value.what, caught.value.limit) == ("handles", 3)
        me.revoke(handles[0])
        other.attach(handles[1])  # spent
        me.share(buffer, seconds=100)
        me.share(buffer)
        assert kernel.books.peers.process(os.getpid()).used["handles"] == 3
    wait_until(lambda: not len(kernel.handles))
    assert kernel.books.peers.process(os.getpid()).used["handles"] == 0


def test_what_outlives_its_maker_is_its_uids_can_be_listed_and_revoked(limited: Callable[..., Kernel]) -> None:
    kernel = limited(handles=10, orphans=2)
    user = kernel.books.peers.user(os.geteuid())
    with realmap.connect(kernel.path) as me:
        handles = [me.share(me.map(PAGE), keep=True) for _ in range(4)]
    wait_until(lambda: user.used["orphans"] == 2)
    with realmap.connect(kernel.path) as me, Control(kernel.path) as control:
        assert kernel.books.peers.process(os.getpid()).used["handles"] == 0
        for kept in handles[:2]:
            assert len(me.attach(kept)) == PAGE
        for gone in handles[2:]:
            with pytest.raises(realmap.InvalidHandle, match=r"\(orphans\) is 2: revoke some: realmap gc --orphans"):
                me.attach(gone)
        with pytest.raises(realmap.AccessDenied):
            me._own_client.request(messages.Ask(me._own_client.next_id(), "revoke-orphans", 0))
        mine = me.share(me.map(PAGE), keep=True)
        listed = control.snapshot().handles
        assert [(each.maker is None, each.uid) for each in listed] == [
            (number < 2, os.geteuid()) for number in range(3)
        ]
        assert control.revoke_orphans() == [each.name for each in listed[:2]]
        assert user.used["orphans"] == 0
        assert [each.name for each in kernel.handles] == [mine.token]
        me.revoke(mine)


def test_what_stands_in_the_way_is_remembered_in_bounded_number(limited: Callable[..., Kernel]) -> None:
    kernel = limited()
    with realmap.connect(kernel.path) as me:
        buffer = me.map(PAGE)
        (process,) = kernel.books.processes
        at = buffer.address
        for _ in range(50):
            at, _ = me._own_client.request(messages.Move(me._own_client.next_id(), at, at, at + PAGE))
        space = process.memory._space
        assert len(space._obstacles) == 1  # one beside the other
        for number in range(3000):
            space.note_obstacle(USER_LAND.start + (5 * number << 20), USER_LAND.start + (5 * number << 20) + PAGE)
        assert len(space._obstacles) <= 1024
        me._own_client.request(messages.Move(me._own_client.next_id(), at, buffer.address, buffer.address))


def test_descriptors_are_kept_for_commands(limited: Callable[..., Kernel]) -> None:
    kernel = limited(reserve=16, connections=1000)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    with realmap.connect(kernel.path) as me, ExitStack() as stack:
        top = os.open("/dev/null", os.O_RDONLY) + 200
        os.close(top - 200)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (top, hard))
            while not taken or taken[-1] < top - 20:
                taken.append(os.open("/dev/null", os.O_RDONLY))
            for _ in range(3):  # a process needs several, and gets none of the last
                sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                sock.connect(kernel.path)
            with pytest.raises(LimitReached, match=r"keeps the others for commands \(reserve\)") as caught:
                stack.enter_context(realmap.connect(kernel.path))
            assert caught.value.what == "descriptors"
            with Control(kernel.path) as control:
                assert control.stats()["processes"] == 1
            kernel.frames._reserved = 0  # as if no other had one
            assert me.call("nop") is None
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in taken:
                os.close(fd)


def test_stocks_give_way_before_descriptors_are_scarce() -> None:
    kernel = Kernel(spin=100).start()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    with realmap.connect(kernel.path) as me, Control(kernel.path) as control:
        for buffer in [me.map(PAGE) for _ in range(3)]:
            buffer.unmap()
        assert control.stats()["stock"] == 3
        probe = os.open("/dev/null", os.O_RDONLY)
        os.close(probe)
        top = 2 * probe + 100
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (top, hard))
            while not taken or taken[-1] < top // 2:
                taken.append(os.open("/dev/null", os.O_RDONLY))
            with realmap.connect(kernel.path):
                assert control.stats()["stock"] == 0
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in taken:
                os.close(fd)
    kernel.stop()


def test_segments_get_none_of_the_reserve() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    probe = os.open("/dev/null", os.O_RDONLY)
    os.close(probe)
    resource.setrlimit(resource.RLIMIT_NOFILE, (probe + 40, hard))
    try:
        books = Books({}, Limits(reserve=100, segments=1000), KernelMemory(length=16 * PAGE))
        process = books.admit(1, 0)
        request = messages.Map(1, 40 * PAGE, int(MemoryType.HEAP), int(u_rw), PAGE, None, True)
        with pytest.raises(PhysicalMemoryExhaustion, match="reserve"):
            SERVICES[messages.Map](books, process, request)
        assert books.frames.segments == 0
        os.close(os.open("/dev/null", os.O_RDONLY))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_inheritances_of_a_uid() -> None:
    books = Books({}, Limits(inheritances=2), KernelMemory(length=16 * PAGE))
    made: list[UserProcess] = []
    for pid in range(1, 5):
        made.append(books.admit(pid, 7))
        request = messages.Map(1, PAGE, int(MemoryType.HEAP), int(u_rw), None, None, True)
        answer: Any = SERVICES[messages.Map](books, made[-1], request)
        channel.close_all(answer[1])
        SERVICES[messages.Forked](books, made[-1], messages.Forked(0))
    assert [books.reap(process, 0.0) for process in made] == [True, True, False, False]
    assert (len(books.inheritance), books.frames.segments, books.peers.user(7).used["inheritances"]) == (2, 2, 2)
    for dead in books.inheritance:
        books.inheritance.end(dead)
    assert (books.frames.segments, books.peers.user(7).used["inheritances"]) == (0, 0)


def test_a_handle_that_nobody_could_count_is_not_made() -> None:
    books = Books({}, Limits(handles=1), KernelMemory(length=16 * PAGE))
    process = books.admit(1, 7)
    answer: Any = SERVICES[messages.Map](
        books, process, messages.Map(1, PAGE, int(MemoryType.HEAP), int(u_rw), None, None, True)
    )
    channel.close_all(answer[1])
    for uses in (0, 1):  # one that is refused for another reason counts nothing
        request = messages.Share(1, answer[0][0], PAGE, int(u_rw), uses, None, math.inf)
        if uses:
            books.handles.share(process, request, 0.0)
        else:
            with pytest.raises(realmap.InvalidSize):
                books.handles.share(process, request, 0.0)
    with pytest.raises(LimitReached):
        books.handles.share(process, request, 0.0)
    books.reap(process, 0.0)
    assert books.peers.user(7).used["orphans"] == 1
    books.handles.clear()
    assert (books.frames.segments, books.peers.user(7).used["orphans"]) == (0, 0)
