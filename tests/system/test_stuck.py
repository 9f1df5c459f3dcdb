"""A kernel that cannot answer: what is asked of it ends in a sentence that says why, and all works when it goes on."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from conftest import BOUND, PAGE, wait_until

import realmap
from realmap import KernelHandle, Process, SyscallTimeout
from realmap.host import procfs, runtime
from realmap.observe.control import Control
from realmap.wire import messages, status
from realmap.wire.status import Status, look

#: What is asked ends within a second, and so much more on a loaded machine. Seconds.
SOON = 10.0


@realmap.syscall
def hold(call: realmap.Call, seconds: float) -> None:
    """Keeps the GIL, in C: no thread of the kernel runs meanwhile."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))


@realmap.syscall
def hold_until(call: realmap.Call, fifo: str) -> None:
    """The same until somebody opens it."""
    os.close(ctypes.PyDLL(None).open(fifo.encode(), os.O_RDONLY))


@realmap.syscall
def spawn(call: realmap.Call, fifo: str) -> None:
    """Linux keeps this thread, which has the GIL, until somebody opens it: the child has to run its program first."""
    child = os.posix_spawn("/bin/true", ["true"], {}, file_actions=[(os.POSIX_SPAWN_OPEN, 0, fifo, os.O_RDONLY, 0)])
    os.waitpid(child, 0)


@realmap.syscall(blocking=True)
def hold_beside(call: realmap.Call, seconds: float) -> None:
    """The same on a thread of its own."""
    hold(call, seconds)


@realmap.syscall
def wait(call: realmap.Call, seconds: float) -> float:
    """Comes back later."""
    time.sleep(seconds)
    return seconds


@realmap.syscall
def nop(call: realmap.Call) -> int:
    """Nothing."""
    return 5


@pytest.fixture
def handlers() -> Iterator[KernelHandle]:
    with realmap.boot(syscalls=[hold, hold_until, spawn, hold_beside, wait, nop]) as kernel:
        yield kernel


def stuck(path: str) -> Status | None:
    """What it is at, where it cannot answer."""
    at = look(path)
    return at if at is not None and at.is_stuck else None


def named(path: str) -> list[str]:
    """The handlers that it is in, on whichever thread."""
    at = look(path)
    return [work.handler for work in (at.work, *at.beside) if work] if at is not None else []


@contextmanager
def held(kernel: KernelHandle) -> Iterator[str]:
    """The kernel in a handler that keeps the GIL; the sentence that tells of it, without the seconds. Kills it."""
    with kernel.connect() as me:
        with suppress(SyscallTimeout):
            me.call("hold", 4 * BOUND, timeout=0.01)
        wait_until(lambda: stuck(kernel.path), "a second in that handler")
        yield f"kernel {kernel.pid} is in handler 'hold' of process {os.getpid()} since "


@contextmanager
def stopped(kernel: KernelHandle) -> Iterator[str]:
    """The kernel's process stopped; the sentence that tells of it."""
    os.kill(kernel.pid, signal.SIGSTOP)
    try:
        wait_until(lambda: stuck(kernel.path), "that it stops")
        yield f"kernel {kernel.pid} is stopped (SIGSTOP)"
    finally:
        if not kernel.has_ended:
            os.kill(kernel.pid, signal.SIGCONT)


def questions(kernel: KernelHandle) -> dict[str, Callable[[], Any]]:
    return {
        "stats": kernel.stats,
        "snapshot": kernel.snapshot,
        "audit": kernel.audit,
        "trace": functools.partial(kernel.trace, os.devnull),
        "connect": kernel.connect,
        "by path": functools.partial(realmap.connect, kernel.path),
        "control": functools.partial(Control, kernel.path),
    }


def refused(ask: Callable[[], Any]) -> str:
    """What it says instead of an answer, soon: sooner than its second, which each command waits in its own tests."""
    start = time.monotonic()
    with patch.object(status, "LATE", 0.1), pytest.raises(SyscallTimeout) as caught:
        ask()
    assert time.monotonic() - start < SOON
    return str(caught.value)


def answers(kernel: KernelHandle) -> bool:
    with patch.object(status, "LATE", 0.1), suppress(SyscallTimeout):
        return bool(kernel.stats())
    return False


@pytest.mark.parametrize("asked_before", [False, True])
def test_every_question_ends_while_it_is_stopped_and_works_after_that(
    handlers: KernelHandle, asked_before: bool
) -> None:
    if asked_before:
        handlers.stats()
    with handlers.connect() as me:
        with stopped(handlers) as sentence:
            for name, ask in questions(handlers).items():
                assert refused(ask) == sentence, name
            assert refused(lambda: me.call("nop", timeout=0.05)) == sentence
        assert me.call("nop") == 5
    for name, ask in questions(handlers).items():
        assert ask() is not None, name
    assert handlers.snapshot().pid == handlers.pid


def test_every_question_ends_while_a_handler_keeps_the_interpreter(handlers: KernelHandle) -> None:
    handlers.stats()
    with held(handlers) as sentence:
        for name, ask in questions(handlers).items():
            assert refused(ask).startswith(sentence), name
        assert refused(functools.partial(Process, handlers.path, timeout=0.05)).startswith(sentence)
        os.kill(handlers.pid, signal.SIGKILL)


def test_a_handler_on_another_thread_that_keeps_the_interpreter_is_named(handlers: KernelHandle) -> None:
    handlers.stats()
    with handlers.connect() as me, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(me.call, "hold_beside", 4 * BOUND)
        wait_until(
            lambda: "hold_beside" in named(handlers.path) and not answers(handlers), "that it keeps the interpreter"
        )
        part = f"; on another thread it is in handler 'hold_beside' of process {os.getpid()} since "
        for ask in (handlers.stats, functools.partial(realmap.connect, handlers.path)):
            said = refused(ask)
            assert part in said
            assert said.startswith((f"kernel {handlers.pid} does not wake up;", f"kernel {handlers.pid} has not come"))
        os.kill(handlers.pid, signal.SIGKILL)
        assert isinstance(asked.exception(BOUND), realmap.KernelDied)


def test_it_answers_again_when_the_handler_ends(handlers: KernelHandle, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    def has_ended() -> bool:
        with suppress(SyscallTimeout):
            return handlers.stats()["calls"] == 1
        return False

    with handlers.connect() as me:
        with suppress(SyscallTimeout):
            me.call("hold_until", str(fifo), timeout=0.01)
        wait_until(lambda: stuck(handlers.path), "a second in that handler")
        assert refused(handlers.stats).startswith(f"kernel {handlers.pid} is in handler 'hold_until' of process ")
        os.close(os.open(fifo, os.O_WRONLY))
        wait_until(has_ended, "an answer")
        assert handlers.audit()


def test_one_that_linux_keeps_is_waited_for(
    handlers: KernelHandle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As it may in close(2) or munmap(2), for 2 s."""
    monkeypatch.setattr(status, "LATE", 0.1)
    fifo, kept = tmp_path / "fifo", []
    os.mkfifo(fifo)
    starves = status.Patience._starves
    monkeypatch.setattr(status.Patience, "_starves", lambda *args: kept.append(starves(*args)) or kept[-1])
    with handlers.connect() as me, ThreadPoolExecutor(1) as pool:
        with suppress(SyscallTimeout):
            me.call("spawn", str(fifo), timeout=0.01)
        wait_until(lambda: stuck(handlers.path), "a while in that handler")
        asked = pool.submit(handlers.stats)
        wait_until(lambda: kept, "that it was looked what keeps it")
        os.close(os.open(fifo, os.O_WRONLY))
        assert asked.result(BOUND)["processes"] == 1
    assert all(kept)


def test_an_answer_that_takes_longer_than_a_second_is_waited_for(
    handlers: KernelHandle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where nothing says that the kernel cannot answer; here, nobody can see that it is in a handler."""
    fifo, looks = tmp_path / "fifo", []
    os.mkfifo(fifo)

    def note(path: str) -> None:
        looks.append(path)
        if len(looks) == 4:
            os.close(os.open(fifo, os.O_WRONLY))

    with handlers.connect() as me, Control(handlers.path) as control:
        with suppress(SyscallTimeout):
            me.call("hold_until", str(fifo), timeout=0.01)
        wait_until(lambda: named(handlers.path), "word of the handler")
        monkeypatch.setattr(status, "LATE", 0.05)
        monkeypatch.setattr(status, "look", note)
        assert control.stats()["calls"] == 1
    assert set(looks) == {handlers.path}
    assert len(looks) >= 4


def test_a_request_waits_as_long_as_it_is_told(handlers: KernelHandle, tmp_path: Path) -> None:
    """The core's half: asked for more whenever the time is over, and the answer is the same one."""
    fifo, slices = tmp_path / "fifo", []
    os.mkfifo(fifo)

    def more() -> float:
        slices.append(0.02)
        if len(slices) == 4:
            os.close(os.open(fifo, os.O_WRONLY))
        return slices[-1]

    class Enough(Exception):
        pass

    def enough() -> float:
        if slices:
            raise Enough
        return more()

    with handlers.connect() as me:
        client = me._own_client
        began = time.monotonic()
        value, _ = client.request(messages.Call(client.next_id(), "hold_until", [str(fifo)]), timeout=more)  # type: ignore[arg-type]
        assert value is None
        assert 4 <= len(slices) <= (time.monotonic() - began) / 0.02 + 2
        slices.clear()
        with pytest.raises(Enough):
            client.request(messages.Call(client.next_id(), "wait", [0.5]), timeout=enough)  # type: ignore[arg-type]
        for wrong in ("x", lambda: "x", lambda: more):
            with pytest.raises(TypeError):
                client.request(messages.Call(client.next_id(), "nop", []), timeout=wrong)  # type: ignore[arg-type]
        assert me.call("nop") == 5
        wait_until(lambda: me.call("nop") == 5 and not client.endpoint.pending, "the answer that was given up")


def test_other_threads_get_their_answers_while_one_asks_for_more(handlers: KernelHandle) -> None:
    """Who leads is at its function when the others' answers come."""
    with handlers.connect() as me:
        client, calls = me._own_client, 200
        got: list[Any] = []

        def many() -> None:
            for _ in range(calls):
                got.append(me.call("nop"))

        threads = [threading.Thread(target=many) for _ in range(3)]
        for thread in threads:
            thread.start()
        waits = 0
        while any(thread.is_alive() for thread in threads):
            value, _ = client.request(messages.Call(client.next_id(), "wait", [0.01]), timeout=lambda: 0.0005)  # type: ignore[arg-type]
            assert value == 0.01
            waits += 1
        for thread in threads:
            thread.join(BOUND)
        assert got == [5] * calls * len(threads)
        assert waits


def test_nobody_takes_the_page_away_under_load(handlers: KernelHandle) -> None:
    """Cut short, it would be a SIGBUS in the kernel's next write."""
    pid, number = runtime.kernel_at(handlers.path)
    assert pid == handlers.pid
    stop = threading.Event()
    wrong: list[BaseException] = []

    def attack() -> None:
        fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR)
        while not stop.is_set():
            for spoil in (lambda: os.ftruncate(fd, 0), lambda: os.pwrite(fd, bytes(PAGE), 0)):
                try:
                    spoil()
                    wrong.append(AssertionError("it was changed"))
                except PermissionError:
                    pass
        os.close(fd)

    thread = threading.Thread(target=attack)
    thread.start()
    with handlers.connect() as me:
        for _ in range(2000):
            assert me.call("nop") == 5
        stop.set()
        thread.join(BOUND)
        assert not wrong
        with suppress(SyscallTimeout):
            me.call("wait", 4 * BOUND, timeout=0.01)
        wait_until(lambda: "wait" in named(handlers.path), "word of the handler")
        assert me.call("nop") == 5


def test_a_lock_that_was_spoiled_costs_the_sentence_and_no_more(handlers: KernelHandle) -> None:
    Path(handlers.path + ".lock").write_bytes(b"\xff" * 5000)
    assert look(handlers.path) is None
    assert handlers.stats()["processes"] == 0
    os.kill(handlers.pid, signal.SIGSTOP)
    try:
        wait_until(lambda: procfs.is_stopped(handlers.pid), "that it stops")
        with pytest.raises(SyscallTimeout, match=r"^no answer to 'connect' within 0\.1 s$"):
            Process(handlers.path, timeout=0.1)
    finally:
        os.kill(handlers.pid, signal.SIGCONT)
    handlers.shutdown()
    assert not os.path.exists(handlers.path + ".lock")


def test_each_kernel_has_its_own(tmp_path: Path) -> None:
    """Also at the longest path that a socket has; and the one beside it answers."""
    longest = str(tmp_path / "k")
    longest += "k" * (runtime.LONGEST_PATH - len(longest))
    with realmap.boot(path=longest, syscalls=[nop]) as one, realmap.boot(syscalls=[nop]) as two, stopped(one) as said:
        assert refused(one.stats) == said
        assert two.stats()["processes"] == 0
        with two.connect() as me:
            assert me.call("nop") == 5
        assert stuck(two.path) is None
    assert look(longest) is None


def test_killed_it_has_died_and_is_not_stuck(handlers: KernelHandle) -> None:
    handlers.stats()
    with stopped(handlers):
        asked: list[BaseException] = []

        def ask() -> None:
            try:
                handlers.stats()
            except BaseException as error:
                asked.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        os.kill(handlers.pid, signal.SIGKILL)
        thread.join(BOUND)
        assert isinstance(asked[0], realmap.KernelDied)
    wait_until(lambda: look(handlers.path) is None, "its end")


@pytest.mark.parametrize("how", [held, stopped])
def test_shutdown_is_bounded_and_says_what_it_killed(
    handlers: KernelHandle, how: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with how(handlers) as sentence, caplog.at_level(logging.WARNING, "realmap"):
        start = time.monotonic()
        handlers.shutdown(timeout=0.5)
        assert 0.4 < time.monotonic() - start < SOON
        assert sentence in caplog.text
        assert handlers.has_ended


def test_shutdown_of_one_that_answers_says_nothing(handlers: KernelHandle, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "realmap"):
        handlers.shutdown()
    assert not caplog.records


def is_asleep(path: str) -> bool:
    at = look(path)
    return at is not None and at.asleep


def is_open(fd: int) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_the_fork_of_a_kernel_leaves_its_page_alone(tmp_path: Path) -> None:
    with realmap.Kernel(path=tmp_path / "k.sock", syscalls=[nop]) as kernel, realmap.connect(kernel.path) as me:
        assert me.call("nop") == 5
        wait_until(lambda: is_asleep(kernel.path), "its sleep")
        _, number = runtime.kernel_at(kernel.path)
        pid = os.fork()
        if not pid:
            kernel.page.turn()
            names = [os.readlink(f"/proc/self/fd/{each}") for each in range(3, 100) if is_open(each)]
            os._exit(sum("realmap-status" in name for name in names))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert number > 0
        assert is_asleep(kernel.path)
