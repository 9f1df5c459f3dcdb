"""System calls that fail where they hardly ever do: nothing is left half done. tools/inject fails the rest of them."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import posix_ipc
import pytest
from conftest import BOUND, PAGE, own_names

import realmap
from realmap.host import files, liveness, procfs, runtime
from realmap.memory import FrameAllocator
from realmap.user.buffer import UserWindow
from realmap.wire import channel


@realmap.syscall
def echo(call: realmap.Call, value: Any) -> Any:
    """The argument again."""
    return value


def failing(function: Callable[..., Any], number: int, *, after: bool = False, times: int = 1) -> Callable[..., Any]:
    """`function`, which fails the first `times` times; `after` it did what it does, as close(2) does."""
    left = [number] * times

    def wrapped(*args: Any, **named: Any) -> Any:
        if not left:
            return function(*args, **named)
        if after:
            function(*args, **named)
        raise OSError(left.pop(), os.strerror(number))

    return wrapped


@pytest.mark.parametrize("number", [errno.EIO, errno.EINTR])
def test_a_close_that_reports_an_error_has_closed(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(3)]
    monkeypatch.setattr(os, "close", failing(os.close, number, after=True, times=2))
    channel.close_all(fds)
    assert fds == []
    frames = FrameAllocator()
    shared = frames.allocate(3 * PAGE, PAGE)
    monkeypatch.setattr(os, "close", failing(os.close, number, after=True, times=2))
    del shared
    assert (frames.used, frames.segments) == (0, 0)


def test_closing_what_is_no_descriptor_is_a_bug() -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    files.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        files.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        channel.close_all([fd])


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_segment_whose_name_cannot_be_taken_away_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    unlink = posix_ipc.unlink_shared_memory
    monkeypatch.setattr(posix_ipc, "unlink_shared_memory", failing(unlink, errno.EIO))
    before = own_names()
    FrameAllocator().allocate(PAGE)
    assert own_names() == before


@pytest.mark.parametrize("kind", [posix_ipc.ExistentialError, posix_ipc.PermissionsError])
def test_no_error_of_posix_ipc_gets_out(monkeypatch: pytest.MonkeyPatch, kind: type[Exception]) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise kind("no")

    monkeypatch.setattr(posix_ipc, "SharedMemory", refuse)
    frames = FrameAllocator()
    with pytest.raises(realmap.KernelError):
        frames.allocate(PAGE)
    assert frames.used == 0


def test_a_name_that_cannot_be_had_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"failing.{os.getpid()}"
    monkeypatch.setattr(os, "link", failing(os.link, errno.ENOSPC))
    frames = FrameAllocator()
    with pytest.raises(realmap.PhysicalMemoryExhaustion):
        frames.allocate(PAGE, name=name)
    monkeypatch.undo()
    assert name not in os.listdir("/dev/shm")
    assert own_names() == []
    frames.allocate(PAGE, name=name)


class Odd:
    """An object with one method of its own."""

    def __init__(self, thing: Any, **methods: Callable[..., Any]) -> None:
        self._thing = thing
        vars(self).update(methods)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._thing, name)


@pytest.mark.parametrize("number", [errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS])
def test_an_answer_that_cannot_be_sent_for_want_of_memory_is_sent_later(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    send_one = channel.send_one
    with realmap.Kernel(syscalls=[echo], spin=0) as kernel, realmap.connect(kernel.path) as me:
        monkeypatch.setattr(channel, "send_one", failing(send_one, number))
        assert me.call("echo", 1, timeout=BOUND) == 1
        monkeypatch.setattr(channel, "send_one", failing(send_one, number))
        with me.map(PAGE) as buffer:
            assert bytes(buffer) == bytes(PAGE)


def test_an_answer_that_cannot_be_sent_at_all_ends_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    with realmap.Kernel(syscalls=[echo], spin=0) as kernel:
        with realmap.connect(kernel.path) as me:
            monkeypatch.setattr(channel, "send_one", failing(channel.send_one, errno.EIO))
            with pytest.raises((realmap.ProcessKilled, realmap.KernelDied)):
                me.call("echo", 1, timeout=BOUND)
        with realmap.connect(kernel.path) as me:
            assert me.call("echo", 1) == 1
            assert len(kernel.books.processes) == 1


@pytest.mark.parametrize("nth", [0, 1])
def test_a_client_that_cannot_be_watched_is_turned_away(monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    """Its socket, or its process: neither ends the kernel, nor leaves the client waiting."""
    with realmap.Kernel(syscalls=[echo], spin=0) as kernel:
        epoll, turns = kernel.loop._epoll, [False] * nth + [True]

        def register(fd: int, events: int) -> None:
            if turns and turns.pop(0):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            epoll.register(fd, events)

        monkeypatch.setattr(kernel.loop, "_epoll", Odd(epoll, register=register))
        with pytest.raises(realmap.KernelError):
            realmap.connect(kernel.path)
        assert turns == []
        with realmap.connect(kernel.path) as me:
            assert me.call("echo", 1) == 1
            assert len(kernel.books.processes) == 1


def test_a_kernel_without_memory_for_a_ring_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    with realmap.Kernel(syscalls=[echo]) as kernel:
        monkeypatch.setattr(os, "memfd_create", failing(os.memfd_create, errno.ENFILE))
        with realmap.connect(kernel.path) as me:
            assert me.call("echo", 1) == 1
            assert not me._own_client.endpoint.has_ring


CALLS = ["socket.socket", "os.open", "os.eventfd", "select.epoll", "socket.socketpair", "os.chmod", "register"]


@pytest.mark.parametrize("call", CALLS)
def test_a_kernel_that_cannot_start_leaves_nothing(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    kernel = realmap.Kernel()
    if call == "register":
        monkeypatch.setattr(kernel.loop, "watch", failing(kernel.loop.watch, errno.ENOSPC))
    else:
        module, _, name = call.partition(".")
        module_ = {"socket": socket, "os": os, "select": select}[module]
        monkeypatch.setattr(module_, name, failing(getattr(module_, name), errno.EMFILE))
    before = open_descriptors()
    with pytest.raises(realmap.KernelError):
        kernel.serve(ready=lambda: kernel.stop(wait=False))
    monkeypatch.undo()
    assert open_descriptors() == before
    assert not os.path.exists(kernel.path)
    assert not os.path.exists(kernel.path + ".lock")


def test_a_kernel_that_cannot_go_on_says_so_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(timeout: float = -1) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    kernel = realmap.Kernel()
    before = open_descriptors()

    def ready() -> None:
        monkeypatch.setattr(kernel.loop, "_epoll", Odd(kernel.loop._epoll, poll=wait))
        kernel.loop.post(lambda: None)  # its thread may sleep already

    with pytest.raises(realmap.KernelError, match="cannot go on: Bad file descriptor"):
        kernel.serve(ready=ready)
    assert open_descriptors() == before
    assert not os.path.exists(kernel.path)


@pytest.mark.process
def test_collected_buffers_are_told_of_later_where_the_socket_is_full() -> None:
    with realmap.boot(syscalls=[echo], spin=0) as kernel, realmap.connect(kernel.path) as me:
        buffers = [me.map(PAGE) for _ in range(600)]
        os.kill(kernel.pid, signal.SIGSTOP)
        try:
            buffers.clear()
            with pytest.raises(realmap.SyscallTimeout):
                me.call("echo", 1, timeout=0)
        finally:
            os.kill(kernel.pid, signal.SIGCONT)
        assert me.call("echo", 2) == 2
        assert (kernel.stats()["mappings"], kernel.stats()["segments"]) == (0, 0)


def test_bytes_that_cannot_be_copied_are_a_fault_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = FrameAllocator().allocate(2 * PAGE, PAGE)
    monkeypatch.setattr(os, "pread", failing(os.pread, errno.EIO))
    with pytest.raises(realmap.MemoryFault):
        shared.read(0, 2 * PAGE, 0)
    monkeypatch.setattr(os, "fstat", failing(os.fstat, errno.EIO))
    with pytest.raises(realmap.PhysicalMemoryExhaustion):
        shared.write(0, memoryview(bytes(2 * PAGE)), 0)


def test_a_peer_whose_pidfd_cannot_be_set_up_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        before = open_descriptors()
        monkeypatch.setattr(os, "set_inheritable", failing(os.set_inheritable, errno.ENOMEM))
        with pytest.raises(OSError, match="Cannot allocate"):
            liveness.peer(ours, os.getpid(), procfs.start_time(os.getpid()))
        assert open_descriptors() == before


def test_a_bell_that_is_interrupted_rings_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    with realmap.Kernel(spin=0) as kernel, realmap.connect(kernel.path) as me:
        monkeypatch.setattr(os, "eventfd_write", failing(os.eventfd_write, errno.EINTR))
        done = threading.Event()
        kernel.loop.post(done.set)
        assert done.wait(BOUND)
        me.map(PAGE).unmap()


def test_a_collected_buffer_that_could_not_be_unmapped_at_first_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    with realmap.Kernel(syscalls=[echo], spin=0) as kernel, realmap.connect(kernel.path) as me:
        buffer = me.map(PAGE)
        monkeypatch.setattr(UserWindow, "_unmap", failing(UserWindow._unmap, errno.ENOMEM), raising=False)
        del buffer
        monkeypatch.undo()
        assert me.call("echo", 1) == 1
        assert kernel.frames.segments == 0


@pytest.mark.process
@pytest.mark.parametrize("call", ["pidfd_open", "recv"])
def test_booting_fails_with_an_error_of_ours(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    module = os if call == "pidfd_open" else socket.socket
    monkeypatch.setattr(module, call, failing(getattr(module, call), errno.ENOMEM))
    with pytest.raises(realmap.PhysicalMemoryExhaustion, match="cannot start a kernel"):
        realmap.boot()


def test_a_socket_that_cannot_be_unlinked_is_swept_later(monkeypatch: pytest.MonkeyPatch) -> None:
    path = runtime.new_socket_path()
    lock = runtime.SocketLock(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(path)
    monkeypatch.setattr(os, "unlink", failing(os.unlink, errno.EIO))
    lock.release()
    lives, own = runtime.maker_lives, os.path.basename(path) + ".lock"
    # Not everybody: other runs' segments that are just being made are in the same place.
    monkeypatch.setattr(runtime, "maker_lives", lambda text: text != own and lives(text))
    assert path in runtime.sweep()
    assert not os.path.exists(path)
    assert not os.path.exists(path + ".lock")


@pytest.mark.process
def test_a_kernel_that_is_not_told_what_to_run_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "sendall", failing(socket.socket.sendall, errno.ENOBUFS))
    with pytest.raises(realmap.KernelDied, match="before it served"):
        realmap.boot()


def test_a_first_segment_without_descriptors_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Already its name takes one, to read when this process began."""
    monkeypatch.setattr(runtime, "_stamp", (0, ""))
    monkeypatch.setattr(procfs, "read_file", failing(procfs.read_file, errno.EMFILE))
    with pytest.raises(realmap.PhysicalMemoryExhaustion, match="no descriptors left"):
        FrameAllocator().allocate(PAGE, PAGE)
