"""A fork of a kernel's process, by a handler or by the program around it, keeps nothing of the kernel's."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import time
from typing import Any

import msgspec
import pytest
import syscalls
from conftest import BOUND, PAGE, wait_until
from raw_client import RawClient, RawServer, RawSession

import realmap
from realmap import Call, Kernel, UserBuffer
from realmap.host import procfs
from realmap.memory import KERNEL_LAND
from realmap.observe.control import Control
from realmap.wire import messages

Descriptors = dict[str, str]


def open_now() -> Descriptors:
    """What this process has open, as Linux calls it: by inode where there is one."""
    found: Descriptors = {}
    for number in os.listdir("/proc/self/fd"):
        try:
            found[number] = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:  # that of the listing itself
            continue
    return found


def in_a_fork(data: Any = None) -> tuple[Descriptors, int, str]:
    """What a fork of this process has open, how much it has mapped in KernelLand, and what it reads of `data`."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            # The maps of others are what the search for heirs may have been reading at that moment.
            found = {
                number: name
                for number, name in open_now().items()
                if int(number) not in (reader, writer) and not name.endswith("/maps")
            }
            land = list(procfs.maps("self", KERNEL_LAND.start, KERNEL_LAND.end))
            try:
                read = "" if data is None else repr(data.copy_in())
            except Exception as error:
                read = type(error).__name__
            os.write(writer, msgspec.msgpack.encode((found, len(land), read)))
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        told = file.read()
    os.waitpid(pid, 0)
    found, land, read = msgspec.msgpack.decode(told)
    return found, land, read


@realmap.syscall
def look_from_a_fork(call: Call, data: UserBuffer) -> Any:
    """What a fork has, and what the kernel itself has."""
    return [*in_a_fork(data), open_now()]


@realmap.syscall(blocking=True)
def look_from_a_workers_fork(call: Call, data: UserBuffer) -> Any:
    """The same, on another thread than the kernel's."""
    return [*in_a_fork(data), open_now()]


@realmap.syscall(blocking=True)
def mirror_long(call: Call, data: UserBuffer) -> None:
    """Mirrors, until its caller has ended."""
    with data.mirror():
        while call.process.alive:
            time.sleep(0.01)


FORKS = [look_from_a_fork, look_from_a_workers_fork, mirror_long]


class Company:
    """Users that have the kernel hold all sorts of descriptors: frames of all kinds, sockets, pidfds, copies."""

    def __init__(self, path: str) -> None:
        self._children: list[int] = []
        with realmap.connect(path) as gone:  # a handle alone has these
            gone.share(gone.map(PAGE), keep=True)
        self.me = realmap.connect(path)
        self.kept = [self.me.map(5 * PAGE, fragment=PAGE), self.me.map(PAGE, name=f"forked-{os.getpid()}")]
        self.kept.append(self.me.attach(self.me.share(self.kept[1])))
        self.data = self.me.map(PAGE)
        self.data[:4] = b"data"
        self.me.call("sha256", self.data)  # a kept window
        self.silent = RawClient(path)
        self.served = contextlib.ExitStack()
        try:
            self._serves(path)
            self._inherits(path)
            self._works(path)
            self._ask_and_do_not_read(path)
        except BaseException:
            self.end()
            raise

    def _ask_and_do_not_read(self, path: str) -> None:
        """Copies of what it should have read wait in the kernel."""
        self.silent.sock.settimeout(0.5)
        numbers = itertools.count(1)

        def copies_wait(control: Control) -> bool:
            with contextlib.suppress(TimeoutError):  # it is not listened to any more, or the kernel got no CPU
                for number in itertools.islice(numbers, 2000):
                    ask = messages.Map(number, PAGE, int(realmap.MemoryType.HEAP), int(realmap.u_rw), None, None, False)
                    self.silent.sock.send(b"\0" + msgspec.msgpack.encode(ask))
            return len(control.snapshot().outbox) > 3

        with Control(path) as control:
            wait_until(lambda: copies_wait(control), "copies that wait")
            wait_until(lambda: control.stats()["inheritances"] == control.stats()["running"] == 1, "the others")

    def _serves(self, path: str) -> None:
        """A service, and a session with it."""
        host = self.served.enter_context(RawClient(path))
        server = self.served.enter_context(RawServer(host, "name"))
        session = self.served.enter_context(RawSession(host, "name"))
        #: What is this process's own.
        self.ours = [each.sock.fileno() for each in (self.silent, host, server, session)] + [server.page, *session.fds]

    def _inherits(self, path: str) -> None:
        """A child whose parent has died, and which maps what that had."""
        reader, writer = os.pipe()
        parent = os.fork()
        if not parent:
            try:
                other = realmap.connect(path)
                kept = other.map(PAGE)
                child = os.fork()
                if not child:
                    signal.alarm(int(BOUND))
                    signal.pause()
                os.write(writer, b"%d" % child)
                assert kept
            finally:
                os._exit(0)
        os.waitpid(parent, 0)
        self._children.append(int(os.read(reader, 100)))
        os.close(reader)
        os.close(writer)

    def _works(self, path: str) -> None:
        """One whose call is at work, on memory that it has unmapped."""
        pid = os.fork()
        if not pid:
            try:
                signal.alarm(int(BOUND))
                other = realmap.connect(path)
                buffer = other.map(PAGE)
                thread = threading.Thread(target=other.call, args=("mirror_long", buffer), daemon=True)
                thread.start()
                wait_until(lambda: buffer.refcount == 2)
                buffer.unmap()
                signal.pause()
            finally:
                os._exit(0)
        self._children.append(pid)

    def end(self) -> None:
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):  # its child's
                os.waitpid(pid, 0)
        self.silent.__exit__()
        self.served.close()
        self.me.close()


@pytest.mark.parametrize("name", ["look_from_a_fork", "look_from_a_workers_fork"])
def test_a_handler_that_forks(name: str) -> None:
    with realmap.boot(syscalls=[*syscalls.ALL, *FORKS], lazy_unmap=1 << 20) as kernel:
        company = Company(kernel.path)
        try:
            found, land, read, of_kernel = company.me.call(name, company.data, timeout=BOUND)
            assert set(found) == {"0", "1", "2"}, found
            assert land == 0
            assert read in ("MemoryFault", "InvalidMemState")  # and nobody else's bytes
            kinds = "socket:", "realmap-seat", "[pidfd]", "[eventfd]", "[eventpoll]", "/dev/shm/realmap.", "/dev/null"
            for kind in kinds:
                assert any(kind in each for each in of_kernel.values()), (kind, of_kernel)
            assert len(of_kernel) > 25
            # The kernel itself has lost nothing.
            assert company.me.call("peek", company.data, 4, 0) == b"data"
        finally:
            company.end()
        wait_until(lambda: kernel.stats()["processes"] == 0)
        assert kernel.audit()


def test_a_program_that_forks_beside_its_kernel() -> None:
    before = open_now()
    with Kernel(syscalls=[*syscalls.ALL, *FORKS], lazy_unmap=1 << 20) as kernel:
        company = Company(kernel.path)
        try:
            assert len(open_now()) > len(before) + 25
            found, land, _ = in_a_fork()
            for number in company.ours:
                del found[str(number)]
            assert {number: name for number, name in found.items() if before.get(number) != name} == {}
            assert land == 0
            pid = os.fork()
            if not pid:  # it leaves the block as its parent does: that ends at once, and ends nothing
                began = time.monotonic()
                kernel.stop()
                os._exit(time.monotonic() - began > BOUND / 4)
            assert os.waitpid(pid, 0)[1] == 0
            assert company.me.call("peek", company.data, 4, 0) == b"data"
        finally:
            company.end()
    assert not os.path.exists(kernel.path)


def test_frames_that_are_just_being_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_now()
    waits, goes_on = threading.Event(), threading.Event()
    fallocate = os.posix_fallocate

    def slow(*args: int) -> None:
        waits.set()
        assert goes_on.wait(BOUND)
        fallocate(*args)

    with Kernel() as kernel, realmap.connect(kernel.path) as me:
        monkeypatch.setattr(os, "posix_fallocate", slow)
        thread = threading.Thread(target=me.map, args=(8 << 20,))
        thread.start()
        assert waits.wait(BOUND)
        found, _, _ = in_a_fork()
        goes_on.set()
        thread.join(BOUND)
    assert {number: name for number, name in found.items() if before.get(number) != name} == {}


def test_frames_of_no_kernel_stay_with_a_fork() -> None:
    frames = realmap.memory.FrameAllocator().allocate(PAGE)
    with Kernel():
        found, _, _ = in_a_fork()
    assert str(frames.segments[0].fd) in found
