"""What happens to either side of a session meanwhile: forks, stops, kills, signals, no descriptors."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
import resource
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import placed
import pytest
from conftest import BOUND, PAGE, land_maps, tried_with, wait_until
from serving import in_thread, kernel, spawn

import realmap
from realmap import Call, KernelHandle, Process, ServerDied, UnknownSyscall, UserBuffer
from realmap.host import forks, procfs

__all__ = ["kernel", "spawn"]
CARRIERS = ("ring", "socket")


def serve_fork(me: Process) -> None:
    """Leaves a child that has a copy of everything."""

    def leave_child(call: Call) -> int:
        child = forks.fork()
        if not child:
            while os.getppid() == parent:
                time.sleep(0.01)
            time.sleep(1)  # longer than its parent
            os._exit(0)
        return child

    def stay(call: Call) -> None:
        time.sleep(BOUND)

    parent = os.getpid()
    with suppress(realmap.KernelDied), me.serve(leave_child, stay, threads=2) as service:
        service.wait()


def test_a_servers_child_keeps_no_dead_session_alive(me: Process, kernel: KernelHandle) -> None:
    server = kernel.spawn(serve_fork)
    wait_until(lambda: placed.servers_of(me, "stay", 1))
    assert me.call("leave_child", timeout=BOUND) > 0
    waiting, came = in_thread(lambda: me.call("stay", timeout=BOUND))
    wait_until(lambda: "stay" in me._known and me._known["stay"].servers[0].endpoint.pending)
    assert me.call("leave_child", timeout=BOUND) > 0  # it serves on
    server.kill()
    waiting.join(BOUND / 2)
    assert isinstance(came[0], ServerDied)
    server.join()


def serve_short(me: Process) -> None:
    """With no more descriptors than it is left."""
    held: list[int] = []

    def use_up(call: Call, left: int) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        with suppress(OSError):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        for _ in range(left):
            os.close(held.pop())

    def give_back(call: Call) -> None:
        while held:
            os.close(held.pop())

    def total(call: Call, data: UserBuffer) -> int:
        return sum(data.copy_in())

    with suppress(realmap.KernelDied), me.serve(use_up, give_back, total) as service:
        service.wait()


def test_a_server_without_descriptors(kernel: KernelHandle) -> None:
    """For a session, or for all that is lent: its caller is told that nothing was done, and the next call has both."""
    server = kernel.spawn(serve_short)
    for left in (0, 1, 2, 3, 10):
        with tried_with(left), kernel.connect() as me, me.session("use_up", timeout=BOUND) as session:
            buffer = me.map(70 * PAGE, fragment=PAGE)
            buffer[:3] = b"\1\1\1"
            session.call("use_up", left)
            with pytest.raises(ServerDied):
                me.call("total", buffer, timeout=BOUND)
            session.call("give_back", timeout=BOUND)
            assert me.call("total", buffer, timeout=BOUND) == 3
            assert kernel.audit()
    server.kill()
    server.join()


def test_a_server_that_is_stopped(me: Process, spawn: Any) -> None:
    (only,) = spawn(1)
    assert me.call("pid_here") == only.pid
    os.kill(only.pid, signal.SIGSTOP)
    wait_until(lambda: procfs.is_stopped(only.pid))
    began = time.monotonic()
    for name, args in [("pid_here", ()), ("peek", (me.map(PAGE),)), ("never called before", ())]:
        with pytest.raises((realmap.SyscallTimeout, UnknownSyscall)) as caught:
            me.call(name, *args, timeout=0.2)
        if name != "never called before":
            assert "stopped" in str(caught.value)
    assert time.monotonic() - began < BOUND / 4
    os.kill(only.pid, signal.SIGCONT)
    assert me.call("pid_here", timeout=BOUND) == only.pid
    assert me.call("echo", 1, timeout=BOUND) == [[1], {}]


def test_a_kernel_that_is_stopped_does_not_stop_calls(me: Process, kernel: KernelHandle, spawn: Any) -> None:
    """What is open and lent needs no kernel; what is new waits for it, and no longer than it may."""
    spawn(1)
    buffer = me.map(PAGE)
    assert me.call("peek", buffer, 1) == b"\0"
    os.kill(kernel.pid, signal.SIGSTOP)
    wait_until(lambda: procfs.is_stopped(kernel.pid))
    try:
        assert me.call("peek", buffer, 1, timeout=BOUND) == b"\0"
        began = time.monotonic()
        with pytest.raises(realmap.SyscallTimeout):
            me.session("peek", timeout=0.2)
        with pytest.raises(realmap.SyscallTimeout):
            me.call("nobody_has_called_this", timeout=0.2)
        assert time.monotonic() - began < BOUND / 4
        assert me.call("long_text", 5, timeout=BOUND) == "xxxxx"  # by the same session
    finally:
        os.kill(kernel.pid, signal.SIGCONT)


def test_a_caller_that_unmaps_what_is_lent(me: Process, kernel: KernelHandle, spawn: Any) -> None:
    """The handler has it until it returns; then it is gone."""
    spawn(1)
    for length in (PAGE, 100_000):
        buffer = me.map(length)
        buffer[:] = content = os.urandom(length)
        with me.session("peek") as session:
            part = buffer.slice(1, length - 2)
            thread, came = in_thread(lambda part=part: session.call("digest_later", "unmapped", part))
            wait_until(lambda: session.call("has_mapped", "unmapped"))
            buffer.unmap()
            session.call("go", "unmapped")
            thread.join(BOUND)
            assert came == [hashlib.sha256(content[1:-1]).hexdigest()]
        wait_until(lambda: kernel.stats()["bytes"] == 0)


def test_a_caller_that_gives_up(me: Process, kernel: KernelHandle, spawn: Any) -> None:
    spawn(1)
    buffer = me.map(100_000)
    with me.session("peek") as session:
        with pytest.raises(realmap.SyscallTimeout):
            session.call("digest_later", "given up", buffer.slice(1, 50_000), timeout=0.1)
        assert session._server.endpoint.pending == 1
        session.call("go", "given up")
        wait_until(lambda: session.call("nop") is None and not session._server.endpoint.pending)
    buffer.unmap()
    wait_until(lambda: kernel.stats()["bytes"] == 0)


def test_a_caller_that_forks_while_it_waits(me: Process, spawn: Any) -> None:
    """From a signal handler, in the middle of its call: the child gets an error there, and calls for itself."""
    spawn(1)
    buffer = me.map(50_000)
    children: list[int] = []

    def fork(*_: object) -> None:
        children.append(forks.fork())

    before = signal.signal(signal.SIGALRM, fork)
    pid = os.getpid()
    me.call("peek", buffer, 1)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            came: Any = me.call("nap", 1.0, timeout=BOUND)
        except realmap.KernelError as error:
            came = error
        if os.getpid() != pid:
            status = 2
            try:
                right = isinstance(came, realmap.InvalidHandle)
                status = 0 if right and me.call("peek", buffer, 1, timeout=BOUND) == b"\0" else 1
            finally:
                os._exit(status)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert isinstance(came, int)
    assert os.waitpid(children[0], 0)[1] == 0
    assert me.call("peek", buffer, 1, timeout=BOUND) == b"\0"


def test_a_call_within_a_call_from_a_signal_handler(me: Process, spawn: Any) -> None:
    spawn(1)
    buffer = me.map(PAGE)
    answers: list[Any] = []

    def ask(*_: object) -> None:
        with me.map(3 * PAGE) as other, me.session("peek") as session:
            answers.append(me.call("peek", buffer, 1) + session.call("peek", other, 2))

    before = signal.signal(signal.SIGALRM, ask)
    try:
        for turn in range(5):
            signal.setitimer(signal.ITIMER_REAL, 0.02 if turn else 0.0001)
            me.call("nap", 0.06, timeout=BOUND)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert answers == [bytes(3)] * 5


class Stop(Exception):
    """A signal handler's."""


def test_signal_handlers_that_raise_at_any_moment(
    me: Process, kernel: KernelHandle, spawn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening, lending, calling: what is half done is undone, and the next call is answered."""
    spawn(1)
    # What is raised in a destructor: pytest would keep it, and with it answers, which are given back by a later call.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    turns = 0

    def stop(*_: object) -> None:
        raise Stop

    def use() -> None:  # what it leaves half done goes with its variables
        with me.map(2 * PAGE) as buffer, me.session("peek") as session:
            session.call("peek", buffer.slice(1, PAGE), 2)
            me.call("digest", buffer.slice(5, PAGE))

    before = signal.signal(signal.SIGALRM, stop)
    try:
        end = time.monotonic() + 1
        while time.monotonic() < end:
            turns += 1
            with suppress(Stop):
                signal.setitimer(signal.ITIMER_REAL, (turns % 40 + 1) * 5e-5)
                try:
                    use()
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert me.call("echo", turns, timeout=BOUND) == [[turns], {}]
    gc.collect()
    me._routes.close()
    wait_until(lambda: me.call("of_the_kernel") or kernel.stats()["sessions"] == 0, "the end of all sessions")
    # What was brought to a call that was given up is given back when this process asks again.
    wait_until(lambda: me.call("of_the_kernel") or kernel.stats()["mappings"] == 0, "the end of all mappings")


def test_tasks_that_are_cancelled_at_any_moment(me: Process, kernel: KernelHandle, spawn: Any) -> None:
    spawn(2)

    async def work(number: int) -> None:
        with me.map(PAGE + number) as buffer:
            await me.acall("digest", buffer.slice(1, PAGE - 2))
            await me.acall("nap", 0.001)

    async def main() -> None:
        for turn in range(60):
            tasks = [asyncio.create_task(work(number)) for number in range(5)]
            await asyncio.sleep(turn * 5e-5)
            for task in tasks[::2]:
                task.cancel()
            done = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), BOUND)
            assert all(each is None or isinstance(each, asyncio.CancelledError) for each in done)
        assert await me.acall("echo", 1) == [[1], {}]

    asyncio.run(main())
    assert land_maps() == []


def test_bystanders_go_on_while_servers_are_killed(me: Process, kernel: KernelHandle, spawn: Any) -> None:
    """A pool of which one is killed again and again: each call is answered, or ServerDied, and the bytes are right."""
    servers = spawn(2)
    stop = threading.Event()
    done: list[int] = []

    def call(number: int) -> None:
        with kernel.connect() as mine, mine.map(3 * PAGE) as buffer:
            buffer[:] = os.urandom(len(buffer))
            count = 0
            while not stop.is_set():
                with suppress(ServerDied, UnknownSyscall):
                    part = buffer.slice(number, 2 * PAGE)
                    assert mine.call("digest", part, timeout=BOUND) == hashlib.sha256(part).hexdigest()
                    count += 1
            done.append(count)

    threads = [in_thread(lambda number=number: call(number)) for number in range(3)]
    try:
        for turn in range(4):
            victim = servers[turn % 2]
            victim.kill()
            victim.join()
            wait_until(lambda: kernel.stats()["seats"] == 1)
            servers[turn % 2] = spawn(1)[0]
    finally:
        stop.set()
        for thread, came in threads:
            thread.join(BOUND)
            assert came == [None]
        for server in servers:
            server.kill()
            server.join()
    assert all(count > 10 for count in done)
