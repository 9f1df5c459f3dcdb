"""How a trace ends: with its kernel, its file, its patience."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import syscalls
from conftest import BOUND, wait_until
from trace_format import TraceFile

import realmap
from realmap import Kernel, KernelHandle, Process
from realmap.errors import KernelDied
from realmap.observe.control import Control
from realmap.observe.trace import Trace


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "trace.json"


def test_a_file_that_cannot_be_written(kernel: KernelHandle, tmp_path: Path) -> None:
    with kernel.connect() as me:
        with pytest.raises(OSError, match="No such file"):
            kernel.trace(tmp_path / "none" / "trace.json")
        with pytest.raises(OSError, match="No space left"):
            kernel.trace("/dev/full")
        os.mkfifo(tmp_path / "pipe")
        reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
        broken = kernel.trace(tmp_path / "pipe")
        os.close(reader)
        wait_until(lambda: me.call("nop") or broken.is_over)
        with pytest.raises(BrokenPipeError):
            broken.close()
        broken.close()
        with kernel.trace(tmp_path / "trace.json"):  # it is free again
            me.call("nop")


@pytest.mark.parametrize("how", ["killed", "shut down"])
def test_the_kernel_ends_before_the_trace(file: Path, how: str) -> None:
    with realmap.boot(syscalls=syscalls.ALL) as kernel:
        with kernel.connect() as me, kernel.trace(file) as trace:
            me.call("nop")
            wait_until(lambda: trace.events >= 3)
            if how == "killed":
                os.kill(kernel.pid, signal.SIGKILL)
            else:
                kernel.shutdown()
            wait_until(lambda: trace.is_over)
        assert isinstance(trace.died, KernelDied)
    found = TraceFile(file)
    assert len(found.named("nop", "X")) == 2
    assert str(trace.died) == found.totals["error"]


def test_a_kernel_that_is_shut_down_tells_all_of_it(file: Path) -> None:
    with realmap.boot(syscalls=syscalls.ALL) as kernel, kernel.trace(file) as trace:
        with kernel.connect() as me:
            for _ in range(100):
                me.call("nop")
            kernel.shutdown()
        wait_until(lambda: trace.is_over, "the end of the trace")
    found = TraceFile(file)
    assert len(found.named("nop", "X")) == 200  # the call, and its handler
    assert len(found.named("reap")) == 1
    assert found.totals["lost"] == 0


def test_a_kernel_that_ends_does_not_wait_for_ever_for_who_traces_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("realmap.kernel.kernel.LAST", 0.3)
    with realmap.Kernel() as kernel, Control(kernel.path) as control:
        control._ask("trace-start", 100)
        kernel.stop()
        with pytest.raises(realmap.KernelDied):
            control._ask("trace-read")


def test_a_kernel_that_is_busy_is_waited_for(file: Path) -> None:
    """Answers that come after the tracer has given them up bring their events all the same."""
    with Kernel(syscalls=[syscalls.nop]) as here, Process(here.path) as me:
        with Trace(here.path, file) as trace:
            trace._control.timeout = 0.1  # less patient, once it has begun
            here.loop.post(lambda: time.sleep(0.7))  # no handler: its loop itself
            me.call("nop")
    assert len(TraceFile(file).named("nop", "X")) == 2
    assert trace.events == 3  # CONNECT, and two for the call
    assert trace.lost == 0


def test_a_kernel_that_is_busy_is_waited_for_at_the_beginning(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("realmap.observe.trace.PATIENCE", 0.05)
    with Kernel() as here:
        here.loop.post(lambda: time.sleep(0.5))
        with Trace(here.path, file):
            pass
    assert TraceFile(file).totals["lost"] == 0


def test_a_kernel_that_does_not_answer_is_given_up(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_work, end = threading.Event(), threading.Event()
    monkeypatch.setattr("realmap.observe.trace.GRACE", 0.2)
    with Kernel(syscalls=[syscalls.nop]) as here, Process(here.path) as me:
        with Trace(here.path, file) as trace:
            trace._control.timeout = 0.05
            me.call("nop")
            wait_until(lambda: trace.events >= 3)
            here.loop.post(lambda: at_work.set() or end.wait(BOUND))  # type: ignore[func-returns-value]
            at_work.wait(BOUND)
        assert isinstance(trace.died, realmap.SyscallTimeout)
        end.set()
        wait_until(lambda: here.tracer.listener is None)
        assert here.books.observer is None
    assert len(TraceFile(file).named("nop", "X")) == 2


def test_a_handler_that_loses_the_loop_is_a_workers_from_then_on(file: Path) -> None:
    gate = threading.Event()

    def stick(call: realmap.Call, data: realmap.UserBuffer) -> None:
        gate.wait(BOUND)
        data.copy_in()

    with Kernel(syscalls=[stick, syscalls.nop]) as here, Process(here.path) as me, me.map(3333) as buffer:
        with Trace(here.path, file) as trace:
            thread = threading.Thread(target=me.call, args=("stick", buffer))
            thread.start()
            wait_until(lambda: here.dispatch.running)
            me.call("nop")
            gate.set()
            thread.join(BOUND)
            wait_until(lambda: not here.dispatch.running)
            me.call("nop")
        assert trace.lost == 0
    found = TraceFile(file)
    call, before, after = sorted(found.named("stick", "X"), key=lambda span: (span["pid"] == os.getpid(), span["tid"]))
    assert [before["tid"], after["tid"]] == [1, 2]
    assert before["ts"] == call["ts"]
    assert before["ts"] + before["dur"] == pytest.approx(after["ts"])
    assert [span["tid"] for span in found.named("nop", "X") if span["pid"] == os.getpid()] == [1, 1]
    (copy,) = found.named("copy_in", "X")
    assert copy["tid"] == 2
