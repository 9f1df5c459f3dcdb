"""Functions in processes of their own: names, arguments, what they return or raise, and what cannot be sent."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import syscalls
from conftest import BOUND, PAGE, wait_until

import realmap
from realmap import Call, KernelDied, KernelHandle, Process, ProcessKilled


class Odd(Exception):
    """Is made of other arguments than it keeps."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def told(me: Process, *args: Any, key: Any = None) -> list[Any]:
    """What it was given, who it is, and what Linux calls it."""
    return [list(args), key, os.getpid(), Path("/proc/self/comm").read_text().strip()]


def fail(me: Process, kind: str) -> None:
    """Raises."""
    if kind == "odd":
        raise Odd(1, 2)
    raise {"ValueError": ValueError, "KernelError": realmap.InvalidSize, "exit": SystemExit}[kind](3)


def leave_a_child(me: Process) -> None:
    """Ends without a result; a child has all that it had, and goes on."""
    if os.fork():
        os._exit(3)
    time.sleep(BOUND)


def buffer_of(me: Process) -> realmap.Buffer:
    """Memory of its own."""
    buffer = me.map(3333)
    buffer[:3] = b"abc"
    return buffer


# ---- names and arguments ------------------------------------------------------------------


def test_arguments_name_and_result(kernel: KernelHandle) -> None:
    spawned = kernel.spawn(told, 1, (2,), key={"a": {3}}, name="worker 7")
    assert spawned.result(BOUND) == [[1, (2,)], {"a": {3}}, spawned.pid, "worker 7"]
    assert spawned.result(0) == spawned.result()
    assert "'worker 7'" in repr(spawned)
    assert kernel.spawn(told).result(BOUND)[3] == "told"


def test_a_buffer_is_of_the_process_that_is_handed_over() -> None:
    def use(other: Process, buffer: realmap.Buffer, *, key: realmap.Buffer) -> list[Any]:
        both = other.call("sha256", buffer), other.call("sha256", key)
        return [buffer.process is other, key.process is other, len(other._windows()), both[0] == both[1]]

    # A kernel of its own: what was pickled is held half a minute longer.
    with realmap.boot(syscalls=syscalls.ALL) as kernel, kernel.connect() as me:
        spawned = kernel.spawn(use, me.map(PAGE), key=me.map(PAGE))
        assert spawned.result(BOUND) == [True, True, 2, True]


def test_a_long_result_waits_for_nobody(kernel: KernelHandle) -> None:
    spawned = kernel.spawn(lambda me: bytes(5_000_000))
    assert spawned.join(BOUND) == 0
    assert spawned.result() == bytes(5_000_000)


def test_a_buffer_as_the_result(kernel: KernelHandle) -> None:
    with kernel.spawn(buffer_of).result(BOUND) as buffer:
        assert (len(buffer), buffer[:3]) == (3333, b"abc")
        buffer.process.close()


def test_a_result_outlives_the_kernel() -> None:
    with realmap.boot() as kernel:
        done, never = kernel.spawn(told, 1), kernel.spawn(lambda me: time.sleep(1000))
        done.join(BOUND)
    assert done.result()[0] == [1]
    with pytest.raises(ProcessKilled, match="SIGKILL"):
        never.result()


# ---- failures -----------------------------------------------------------------------------


def test_what_it_raises_is_raised_here(kernel: KernelHandle, capfd: pytest.CaptureFixture[str]) -> None:
    spawned = kernel.spawn(fail, "ValueError", name="unlucky")
    for _ in range(2):
        with pytest.raises(ValueError, match="3") as caught:
            spawned.result(BOUND)
    where = f"In process {spawned.pid}, spawned as 'unlucky':"
    text = str(caught.value.__cause__)
    assert where in text
    assert f'File "{__file__}"' in text
    assert "[kind](3)" in text
    assert "spawned.py" not in text
    printed = capfd.readouterr().err
    assert where in printed
    assert "[kind](3)" in printed
    assert spawned.exitcode == 1


def test_errors_of_ours_and_those_that_cannot_be_made_again(kernel: KernelHandle) -> None:
    with pytest.raises(realmap.InvalidSize) as caught:
        kernel.spawn(fail, "KernelError").result(BOUND)
    assert caught.value.size == 3
    with pytest.raises(RuntimeError, match="Odd: 1 and 2"):
        kernel.spawn(fail, "odd").result(BOUND)


def test_an_exception_of_a_script_is_its_own(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        """
import realmap

class Mine(Exception): pass

def work(me):
    raise Mine(5)

with realmap.boot() as kernel:
    try:
        kernel.spawn(work).result()
    except Mine as error:
        print(error, "raise Mine(5)" in str(error.__cause__), f'"{__file__}", line 7' in str(error.__cause__))
"""
    )
    said = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=BOUND)
    assert said.stdout == "5 True True\n"


def test_who_ends_before_it_returns(kernel: KernelHandle) -> None:
    killed = kernel.spawn(lambda me: os.kill(os.getpid(), signal.SIGUSR1), name="victim")
    with pytest.raises(ProcessKilled, match=r"'victim'.*SIGUSR1") as caught:
        killed.result(BOUND)
    assert caught.value.pid == killed.pid
    with pytest.raises(ProcessKilled, match="exit status 3"):
        kernel.spawn(fail, "exit").result(BOUND)


def test_a_result_that_cannot_be_sent_or_is_not_there_yet(kernel: KernelHandle) -> None:
    spawned = kernel.spawn(lambda me: threading.Lock())
    with pytest.raises(TypeError, match="returned cannot be sent"):
        spawned.result(BOUND)
    assert spawned.exitcode == 0
    left = kernel.spawn(leave_a_child)
    with pytest.raises(ProcessKilled, match="exit status 3"):
        left.result(BOUND)
    os.killpg(left.pid, signal.SIGKILL)  # who is there still: it was not waited for
    late = kernel.spawn(lambda me: time.sleep(1000))
    with pytest.raises(TimeoutError, match="still runs"):
        late.result(0.01)
    late.kill()
    late.join(BOUND)


@pytest.mark.parametrize(
    ("args", "kwargs", "says"),
    [
        ((5,), {}, "not 5"),
        ((lambda: 1,), {}, "too many positional"),
        ((told, 1), {"other": 2}, "unexpected keyword argument 'other'"),
        ((lambda me, name: 1,), {"name": "x"}, "name= is how the process is called"),
        ((told,), {"name": 5}, "is text"),
        ((told,), {"name": ""}, "is text"),
        ((told,), {"key": threading.Lock()}, "argument 'key' of 'told'"),
    ],
)
def test_what_cannot_be_spawned(kernel: KernelHandle, args: Any, kwargs: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        kernel.spawn(*args, **kwargs)


def test_a_kernel_and_a_process_stay_here_and_say_what_is_there_instead(kernel: KernelHandle, me: Process) -> None:
    for function, name in ((lambda _: kernel.stats(), "kernel"), (lambda _: me.call("nop"), "me")):
        with pytest.raises(
            TypeError, match=rf"realmap\.connect\('{kernel.path}'\) \(its variable '{name}' holds"
        ) as told:
            kernel.spawn(function)
        assert "has its" in str(told.value) and "inside the function" not in str(told.value)
    thing = threading.Lock()
    with pytest.raises(TypeError, match="variable 'thing' holds a lock; make that inside the function"):
        kernel.spawn(lambda _: thing.acquire())


@pytest.mark.parametrize("make", ["Lock", "RLock", "Semaphore", "Condition", "Event", "Queue", "SimpleQueue", "Pipe"])
def test_locks_and_queues_of_multiprocessing(kernel: KernelHandle, make: str) -> None:
    thing, *others = made if isinstance(made := getattr(multiprocessing, make)(), tuple) else (made,)
    with pytest.raises(TypeError, match=r"argument 1 of 'told'.*multiprocessing\.Process"):
        kernel.spawn(told, [thing])
    with pytest.raises(TypeError, match=r"'thing' holds a .*multiprocessing\.Process"):
        kernel.spawn(lambda me: thing)
    for each in (thing, *others):
        if hasattr(each, "close"):
            each.close()


# ---- settle -------------------------------------------------------------------------------


def hold(me: Process) -> None:
    """Maps, and never ends."""
    buffers = [me.map(3 * PAGE), me.map(10)]
    time.sleep(1000)
    del buffers


def test_settled_is_what_has_been_given_back(kernel: KernelHandle) -> None:
    kernel.settle(BOUND)
    for _ in range(2):
        spawned = kernel.spawn(hold)
        wait_until(lambda: kernel.stats()["mappings"] == 2, "its mappings")
        spawned.kill()
        spawned.join()
        kernel.settle(BOUND)
        assert not any(kernel.stats()[name] for name in ("processes", "mappings", "segments", "bytes"))
        me = kernel.connect()
        me.map(PAGE)
        me.close()
        kernel.settle(BOUND)
        assert not kernel.stats()["processes"]


# ---- how a kernel died --------------------------------------------------------------------


@realmap.syscall
def crash(call: Call) -> None:
    """Touches nothing that is there."""
    ctypes.string_at(0)


@realmap.syscall(blocking=True)
def leave(call: Call) -> None:
    """Ends the process."""
    os._exit(3)


@pytest.mark.parametrize(("name", "says"), [("crash", "was killed by SIGSEGV"), ("leave", "ended with exit status 3")])
def test_a_kernel_that_died_says_how_and_in_which_handler(
    capfd: pytest.CaptureFixture[str], name: str, says: str
) -> None:
    kernel = realmap.boot(syscalls=[crash, leave])
    with kernel.connect() as me:
        for way in (partial(me.call, name), partial(me.map, 1), kernel.stats, partial(kernel.spawn, told)):
            with pytest.raises(KernelDied, match=f"it {says} in handler '{name}' of process {os.getpid()}$"):
                way()
    kernel.shutdown()
    printed = capfd.readouterr().err
    assert ("in crash" in printed and "Segmentation fault" in printed) == (name == "crash")


def test_a_kernel_that_was_killed_or_shut_down() -> None:
    kernel = realmap.boot()
    with kernel.connect() as me:
        os.kill(kernel.pid, signal.SIGKILL)
        with pytest.raises(KernelDied, match=r"it was killed by SIGKILL$"):
            me.map(1)
    kernel.shutdown()
    with realmap.boot() as kernel:
        pass
    with pytest.raises(KernelDied, match=r"has ended$"):
        kernel.stats()
