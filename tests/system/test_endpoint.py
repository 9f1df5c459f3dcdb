"""A connection in company: who reads for whom, what is sent while another reads, and every way that it can end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import points
import pytest
import syscalls
from conftest import BOUND, PAGE, wait_until

import realmap
from realmap import KernelHandle, Process
from realmap.host import procfs
from realmap.wire import messages

CARRIERS = ("ring", "socket")


class Stop(Exception):
    """A signal handler's own."""


def in_thread(work: Callable[..., Any], *args: Any) -> threading.Thread:
    thread = threading.Thread(target=work, args=args)
    thread.start()
    return thread


@pytest.fixture
def reading(me: Process) -> Any:
    """Another thread has the turn until `go` is called: it waits for an answer of its own."""
    thread = in_thread(me.call, "wait")
    wait_until(lambda: me._own_client.endpoint.pending == 1, "the other's request")
    yield thread
    me.call("go")
    thread.join(BOUND)
    assert not thread.is_alive()


def test_what_the_socket_does_not_take_at_once_goes_while_another_reads(me: Process, reading: Any) -> None:
    text = "x" * 1_000_000
    assert me.call("echo", text, timeout=BOUND) == [text]


def test_long_calls_of_several_threads_do_not_mix(me: Process) -> None:
    got: list[bool] = []

    def call(mark: str) -> None:
        text = mark * 700_000
        got.extend(me.call("echo", text, timeout=BOUND) == [text] for _ in range(5))

    threads = [in_thread(call, mark) for mark in "abcd"]
    for thread in threads:
        thread.join()
    assert got == [True] * 20


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="asyncio's own loops end with the fork from 3.14 on")
def test_a_forked_childs_loop_goes_on_without_its_parents_connection(me: Process) -> None:
    async def main() -> int:
        waiting = asyncio.create_task(me.acall("sleep", 0.05))
        await asyncio.sleep(0)
        child = os.fork()
        if not child:
            try:
                with pytest.raises(realmap.InvalidHandle):
                    await waiting
                assert me.call("echo", 1) == [1], "as a process of its own"
                os._exit(0)
            finally:
                os._exit(1)
        assert await waiting == 0.05
        return os.waitpid(child, 0)[1]

    assert asyncio.run(main()) == 0


def test_a_forked_child_does_not_keep_its_parents_connection(kernel: KernelHandle) -> None:
    """Not even by what a loop of the parent watches: the kernel knows at once when the parent has died."""
    reader, writer = os.pipe()
    parent = os.fork()
    if not parent:
        try:
            me = realmap.connect(kernel.path)

            async def main() -> None:
                waiting = asyncio.create_task(me.acall("sleep", BOUND))
                while me._own_client.endpoint.pending != 1:
                    await asyncio.sleep(0.001)
                child = os.fork()
                if child:
                    os.write(writer, f"{child} ".encode())
                await asyncio.wait([waiting])

            asyncio.run(main())
        finally:
            os._exit(1)
    child = int(os.read(reader, 100))
    wait_until(lambda: kernel.stats()["processes"] == 1)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    wait_until(lambda: kernel.stats()["processes"] == 0, "the parent's end, while its child lives")
    os.kill(child, signal.SIGKILL)
    os.close(reader)
    os.close(writer)


def test_a_closed_loop_that_is_first_in_line_is_passed_over(me: Process, kernel: KernelHandle) -> None:
    other = asyncio.new_event_loop()
    thread = in_thread(other.run_forever)
    asyncio.run_coroutine_threadsafe(me.acall("nop"), other).result(BOUND)
    closed = asyncio.new_event_loop()
    forgotten = closed.create_task(me.acall("wait_for", "the closed one"))
    closed.run_until_complete(asyncio.sleep(0.01))
    closed.close()
    reading = in_thread(me.call, "wait_for", "the reader")
    wait_until(lambda: me._own_client.endpoint.pending == 2)
    waiting = asyncio.run_coroutine_threadsafe(me.acall("wait_for", "the other"), other)
    wait_until(lambda: me._own_client.endpoint.pending == 3)
    with kernel.connect() as beside:  # who says so by the same connection would read for all
        beside.call("go_by_name", "the reader")
        reading.join(BOUND)
        beside.call("go_by_name", "the other")
        assert waiting.result(BOUND) == "the other"
        beside.call("go_by_name", "the closed one")
    other.call_soon_threadsafe(other.stop)
    thread.join()
    other.close()
    forgotten._log_destroy_pending = False  # type: ignore[attr-defined]


def test_a_handler_of_who_is_woken_to_read_does_not_keep_others_waiting(me: Process) -> None:
    """It waits for another thread, whose answer somebody has to read meanwhile."""
    before = signal.getsignal(signal.SIGUSR1)
    done, seen = threading.Event(), []
    signal.signal(signal.SIGUSR1, lambda *_: seen.append(done.wait(BOUND)))

    def first() -> None:
        me.call("sleep", 0.1)
        signal.raise_signal(signal.SIGUSR1)

    def second() -> None:
        me.call("sleep", 0.2)
        done.set()

    try:
        reader = in_thread(first)
        wait_until(lambda: me._own_client.endpoint.pending == 1)
        other = in_thread(second)
        assert me.call("sleep", 0.3) == 0.3
        reader.join()
        other.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [True]


def test_an_unmap_that_is_interrupted_before_it_was_sent_is_told_all_the_same(
    me: Process, kernel: KernelHandle
) -> None:
    def raises(*_: object) -> None:
        raise Stop

    before = signal.signal(points.SIGNAL, raises)
    buffer = me.map(PAGE)
    try:
        os.kill(kernel.pid, signal.SIGSTOP)
        wait_until(lambda: procfs.is_stopped(kernel.pid))
        for _ in range(2000):  # until neither ring nor socket takes any more
            me._own_client.notice(messages.Forked(0))
        with points.while_asleep(points.PPOLL) as point, pytest.raises(Stop):
            buffer.unmap()
        assert point.reached
    finally:
        os.kill(kernel.pid, signal.SIGCONT)
        signal.signal(points.SIGNAL, before)
    assert not buffer.alive
    wait_until(lambda: me.call("nop") is None and not kernel.stats()["mappings"], "the end of the mapping")


@pytest.mark.parametrize("length", [10, 5000])
def test_the_kernels_last_words_are_heard(length: int) -> None:
    """By the ring or the socket, whichever way the next request goes."""
    with realmap.boot(syscalls=syscalls.ALL) as kernel, kernel.connect() as me:
        me.call("nop")
        kernel.shutdown()
        with pytest.raises(realmap.KernelDied, match="was shut down"):
            me.call("echo", "x" * length)


def test_a_connection_that_one_thread_finds_ended_ends_for_those_that_wait(me: Process) -> None:
    ended: list[BaseException] = []

    def wait() -> None:
        try:
            me.call("sleep", BOUND)
        except BaseException as error:
            ended.append(error)

    thread = in_thread(wait)
    wait_until(lambda: me._own_client.endpoint.pending == 1)
    me._own_client.endpoint.reject()
    thread.join(BOUND)
    assert [type(error) for error in ended] == [realmap.VersionMismatch]
    me.close()
    assert me._own_client.endpoint.fileno() == -1


PROGRAM = """
import sys, threading, time
import realmap
me = realmap.connect(sys.argv[1])
class Last:
    def __init__(self):
        self.buffer = me.map(4096)
    def __del__(self):
        self.buffer.unmap()
        print("unmapped")
last = Last()
threading.Thread(target=me.call, args=("sleep", 100), daemon=True).start()
while me._own_client.endpoint.pending != 1:
    time.sleep(0.001)
"""


def test_the_interpreter_ends_while_a_daemon_thread_reads(kernel: KernelHandle) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, kernel.path], capture_output=True, text=True, timeout=BOUND)
    assert (done.returncode, done.stdout) == (0, "unmapped\n"), done.stderr
    wait_until(lambda: not kernel.stats()["processes"])


def test_no_descriptor_for_a_loop_to_watch_is_waited_for(me: Process) -> None:
    async def main() -> None:
        await me.acall("nop")
        held: list[int] = []
        try:
            while True:
                held.append(os.dup(0))
        except OSError:
            pass
        waiting = asyncio.create_task(me.acall("sleep", 0.05))
        await asyncio.sleep(0.01)
        for fd in held:
            os.close(fd)
        assert await asyncio.wait_for(waiting, BOUND) == 0.05

    asyncio.run(main())


def test_a_timeout_of_a_task_that_cleans_up_after_it_was_cancelled(me: Process) -> None:
    async def work() -> str:
        try:
            await asyncio.sleep(BOUND)
        except asyncio.CancelledError:
            with pytest.raises(realmap.SyscallTimeout):
                await me.acall("wait_for", "nobody", timeout=0.01)
            await me.acall("go_by_name", "nobody")
        return "cleaned up"

    async def main() -> None:
        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        task.cancel()
        assert await task == "cleaned up"

    asyncio.run(main())


@pytest.mark.parametrize("timeout", [float("inf"), 10**400, 1e300])
def test_a_timeout_beyond_all_bounds_is_none(me: Process, timeout: float) -> None:
    assert me.call("echo", 1, timeout=timeout) == [1]
    assert asyncio.run(me.acall("echo", 2, timeout=timeout)) == [2]


def test_descriptors_that_somebody_else_closed_and_used_again(me: Process) -> None:
    """As a daemonizer does: the connection says so; what has its number now is neither read, written nor closed."""

    number = me._own_client.endpoint.fileno()
    os.close(number)
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours = [sock for sock in pair if sock.fileno() == number]
    assert ours, "the number is another socket's now"
    for text in ("x" * 3000, "x" * 200_000):
        with pytest.raises(realmap.ProcessKilled, match="closed by another part"):
            me.call("echo", text, timeout=BOUND)
    me.close()
    for one, other in (pair, pair[::-1]):
        one.setblocking(False)
        with pytest.raises(BlockingIOError):
            one.recv(100)
        one.send(b"!")
        assert other.recv(10) == b"!"
        one.setblocking(True)
    for sock in pair:
        sock.close()
