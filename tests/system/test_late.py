"""Handlers that do not come back: they lose the kernel's loop, everybody else is served, their answer comes late."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import stuck
from conftest import BOUND, PAGE, wait_until

import realmap
from realmap import KernelDied, KernelHandle, LimitReached, Limits, Process, SyscallFailed
from realmap.system import END

KINDS = ("wait_in_c", "doze", "spin")


@pytest.fixture
def late() -> Iterator[KernelHandle]:
    """A kernel of the handlers that do not come back."""
    with realmap.boot(syscalls=stuck.ALL) as kernel:
        yield kernel


class Asked(threading.Thread):
    """A call on a thread of its own: what came of it."""

    def __init__(self, me: Process, *call: Any) -> None:
        super().__init__()
        self._me, self._call = me, call
        self.got: Any = None
        self.start()

    def run(self) -> None:
        try:
            self.got = self._me.call(*self._call)
        except Exception as error:
            self.got = error

    def result(self) -> Any:
        """What it brought."""
        self.join(BOUND)
        assert not self.is_alive()
        return self.got


def at_work(kernel: KernelHandle) -> int:
    """How many handlers have begun, and have a thread of their own."""
    return sum(row.seconds is not None for row in kernel.snapshot().running)


@contextmanager
def is_late(kernel: KernelHandle, me: Process, count: int, *call: Any) -> Iterator[list[Asked]]:
    """So many calls that have lost the loop; let go at the end."""
    asked = [Asked(me, *call) for _ in range(count)]
    wait_until(lambda: kernel.stats()["given_up"] == count, "their loss")
    yield asked
    for _ in asked:
        me.call("go", timeout=BOUND)
    for each in asked:
        each.result()
    wait_until(lambda: not kernel.stats()["given_up"], "their end")


@pytest.mark.parametrize("kind", KINDS)
def test_everybody_else_is_served(late: KernelHandle, kind: str) -> None:
    with late.connect() as me, late.connect() as other, is_late(late, other, 1, kind) as (asked,):
        for length in range(1, 50):
            me.call("nop", timeout=BOUND)
            me.map(length * PAGE).unmap()
        with realmap.connect(late.path) as another:
            assert another.call("call_back") == 3333, "two have lost it, one after the other"
        (row,) = late.snapshot().running
        assert (row.syscall, row.given_up) == (kind, True)
        assert row.seconds is not None
        assert late.audit()
        assert asked.is_alive()
        other.call("go")
        assert asked.result() == "came back"
        assert late.stats()["late"] >= 2  # a short one may be, too, where another program has its CPU
        again = Asked(other, kind)  # for the end of the block
    again.result()


def test_many_of_them(late: KernelHandle) -> None:
    threads = psutil.Process(late.pid).num_threads
    with late.connect() as me:
        me.call("nop")
        before = threads()
        with is_late(late, me, 12, "wait_in_c"):
            assert threads() >= before + 12
            assert me.call("nop", timeout=BOUND) is None
        wait_until(lambda: threads() <= before, "the end of their threads")


def test_buffers_of_a_late_handler_stay_valid_when_they_are_unmapped(late: KernelHandle) -> None:
    content = os.urandom(3 * PAGE)
    with late.connect() as me:
        buffer = me.map(3 * PAGE)
        buffer[:] = content
        with is_late(late, me, 1, "digest", buffer) as (asked,):
            buffer.unmap()
            again = me.map(3 * PAGE)
            again[:] = bytes(3 * PAGE)
            assert late.audit()
        assert asked.result() == hashlib.sha256(content).hexdigest()
        del again
        wait_until(lambda: not late.stats()["mirrors"])
        assert late.audit()


def test_buffers_of_a_late_handler_stay_valid_when_their_owner_dies(late: KernelHandle) -> None:
    def own(me: Process) -> None:
        buffer = me.map(3333)
        buffer[:] = b"x" * 3333
        me.call("digest", buffer)

    user = late.spawn(own)
    wait_until(lambda: late.stats()["late"] == 1)
    user.kill()
    user.join(BOUND)
    wait_until(lambda: not late.stats()["processes"])
    assert late.audit()
    with late.connect() as me:
        me.call("go")
        wait_until(lambda: me.call("tell"))
        assert me.call("tell") == [hashlib.sha256(b"x" * 3333).hexdigest()]
    wait_until(lambda: not late.stats()["given_up"])
    wait_until(lambda: not late.stats()["bytes"], "the end of what was the dead one's")
    assert late.audit()


@pytest.mark.parametrize("how", ["what cannot travel", "memory", "SystemExit", "KeyboardInterrupt", "ours"])
def test_an_odd_end_is_an_answer(late: KernelHandle, how: str) -> None:
    with late.connect() as me:
        with is_late(late, me, 1, "end_late", how) as (asked,):
            assert me.call("nop", timeout=BOUND) is None
        assert isinstance(asked.got, realmap.InvalidHandle if how == "ours" else SyscallFailed)
        assert late.stats()["failed"] == 1
        assert me.call("nop", timeout=BOUND) is None


@pytest.mark.parametrize("way", ["short", "late", "blocking"])
def test_a_handler_that_forks_answers_once(late: KernelHandle, way: str) -> None:
    with late.connect() as me:
        if way == "late":
            with is_late(late, me, 1, "fork", True) as (asked,):
                pass
            who, pid = asked.result()
        else:
            who, pid = me.call("fork", False) if way == "short" else me.call("fork_beside")
        assert who == "parent"
        assert me.call("reap", pid, timeout=BOUND) == 0, "the child ended by itself"
        assert me.call("nop", timeout=BOUND) is None
        assert late.audit()
    wait_until(lambda: not late.stats()["processes"])


@pytest.mark.parametrize("how", ["exec", "exit", "kill", "close"])
def test_a_handler_that_ends_the_kernels_process(how: str) -> None:
    with realmap.boot(syscalls=stuck.ALL) as kernel:
        with kernel.connect() as me, kernel.connect() as other:
            with suppress(KernelDied):  # an answer by the ring needs no descriptor
                me.call("undo", how, timeout=BOUND)
            assert kernel._child.wait(BOUND) is not None
            for each in (me, other):
                with pytest.raises(KernelDied):
                    each.call("nop", timeout=BOUND)


@pytest.mark.parametrize("kind", [*KINDS, "leave_thread"])
def test_shutdown_does_not_wait_for_it(kind: str) -> None:
    with realmap.boot(syscalls=stuck.ALL) as kernel, kernel.connect() as me:
        asked = Asked(me, kind)
        wait_until(lambda: kernel.stats()["late"] or not asked.is_alive())
        began = time.monotonic()
        kernel._child.signal(END)
        assert kernel._child.wait(BOUND) == 0, "it ended by itself"
        assert time.monotonic() - began < BOUND
        assert asked.result() is None or isinstance(asked.result(), KernelDied)


def test_a_handler_that_stops_its_own_kernel_and_waits(late: KernelHandle) -> None:
    with late.connect() as me:
        asked = Asked(me, "stop_and_wait")
        wait_until(lambda: late.stats()["late"] == 1)
        me.call("go")
        assert isinstance(asked.result(), KernelDied)
        assert late._child.wait(BOUND) == 0


def test_those_of_one_process_are_bounded_over_all_its_connections() -> None:
    with realmap.boot(syscalls=stuck.ALL, limits=Limits(given_up=3)) as kernel:
        mine = [kernel.connect() for _ in range(4)]
        asked = [Asked(me, "wait_in_c") for me in mine[:3]]
        wait_until(lambda: kernel.stats()["given_up"] == 3)
        for name in ("nop", "wait_beside"):
            with pytest.raises(LimitReached, match="given_up") as caught:
                mine[3].call(name, timeout=BOUND)
            assert (caught.value.what, caught.value.limit) == ("given_up", 3)
        assert kernel.spawn(lambda me: [me.call("go") for _ in range(3)]).join(BOUND) == 0, "others are served"
        assert [each.result() for each in asked] == ["came back"] * 3
        wait_until(lambda: not kernel.stats()["given_up"])
        assert mine[3].call("nop", timeout=BOUND) is None
        for me in mine:
            me.close()


def test_those_of_dead_processes_are_bounded_by_their_uid() -> None:
    with realmap.boot(syscalls=stuck.ALL, limits=Limits(given_up=3)) as kernel:
        for count in range(1, 4):
            user = kernel.spawn(lambda me: me.call("wait_beside"))
            wait_until(lambda count=count: at_work(kernel) == count)
            user.kill()
            wait_until(lambda count=count: kernel.stats()["given_up"] == count)
        assert kernel.stats()["threads"] == 3
        with kernel.connect() as me:
            with pytest.raises(LimitReached, match=r"uid .*'wait_beside'.*given_up") as caught:
                me.call("wait_beside", timeout=BOUND)
            assert (caught.value.what, caught.value.limit) == ("given_up", 3)
            assert me.call("nop", timeout=BOUND) is None, "what did come back is nobody's fault"
            for _ in range(3):
                me.call("go")
            wait_until(lambda: not kernel.stats()["given_up"])
            asked = Asked(me, "wait_beside")
            wait_until(lambda: kernel.stats()["running"] == 1)
            me.call("go")
            assert asked.result() == "came back"


#: Of calls that are to begin in that time, and end by it. Seconds.
LIMIT = 1.0


def cancel_by(how: str, kernel: KernelHandle) -> None:
    """Has a call of `until_cancelled` that nobody waits for."""
    if how == "death":
        user = kernel.spawn(lambda me: me.call("until_cancelled"))
        wait_until(lambda: at_work(kernel) == 1)
        user.kill()
        return
    with kernel.connect() as me:
        while "timeout" in how or "limit" in how:
            with suppress(realmap.SyscallTimeout):  # or its answer: it stops at that moment
                me.call("until_cancelled", timeout=LIMIT if "timeout" in how else None)
            if me.call("tell"):  # else it came too late to be begun
                return
        asked = Asked(me, "until_cancelled")
        wait_until(lambda: at_work(kernel) == 1 or not asked.is_alive())
    asked.result()


@pytest.mark.parametrize("how", ["death", "close", "the kernel's limit", "its timeout"])
def test_a_handler_is_told_that_nobody_waits(how: str) -> None:
    limit = LIMIT if how == "the kernel's limit" else None
    with realmap.boot(syscalls=stuck.ALL, limits=Limits(seconds=limit)) as kernel:
        cancel_by(how, kernel)
        with kernel.connect() as me:
            wait_until(lambda: me.call("tell")[-1:] == ["cancelled"])
            left = me.call("tell")[0]
            assert left is None if how in ("death", "close") else 0 < left <= LIMIT
            left = me.call("deadline")
            assert left is None if limit is None else 0 < left <= limit
            assert 0 < me.call("deadline", timeout=0.9 * (limit or 1)) <= 0.9 * (limit or 1)
            assert 0 < me.call("deadline", timeout=BOUND) <= (limit or BOUND)


def test_a_call_that_was_given_up_before_its_turn_is_not_begun() -> None:
    with realmap.boot(syscalls=stuck.ALL, limits=Limits(running=1)) as kernel, kernel.connect() as me:
        first = Asked(me, "wait_beside")
        wait_until(lambda: at_work(kernel) == 1)
        with pytest.raises(realmap.SyscallTimeout):
            me.call("until_cancelled", timeout=0.05)
        me.call("nop")  # so it has arrived, and its deadline is near
        over = time.monotonic() + 0.05
        wait_until(lambda: time.monotonic() > over)
        me.call("go")
        assert first.result() == "came back"
        wait_until(lambda: not kernel.stats()["running"])
        assert me.call("tell") == []


def test_one_that_nobody_waits_for_is_counted_and_shown() -> None:
    with realmap.boot(syscalls=stuck.ALL) as kernel, kernel.connect() as me:
        while not at_work(kernel):  # else it came too late to be begun
            with pytest.raises(realmap.SyscallTimeout):
                me.call("wait_beside", timeout=LIMIT)
            wait_until(lambda: at_work(kernel) == kernel.stats()["running"])
        wait_until(lambda: kernel.stats()["given_up"] == 1)
        assert [(row.syscall, row.given_up) for row in kernel.snapshot().running] == [("wait_beside", True)]
        assert kernel.stats()["late"] == 0
        me.call("go")
        wait_until(lambda: not kernel.stats()["given_up"])


def test_a_late_one_beyond_the_kernels_limit_is_answered_for() -> None:
    with realmap.boot(syscalls=stuck.ALL, limits=Limits(seconds=0.1)) as kernel, kernel.connect() as me:
        with pytest.raises(realmap.SyscallTimeout, match="the kernel's limit"):
            me.call("wait_in_c")
        assert kernel.stats()["late"] == 1
        me.call("go")
        wait_until(lambda: not kernel.stats()["given_up"])


def test_a_handler_is_told_that_the_kernel_ends(tmp_path: Path) -> None:
    @realmap.syscall(blocking=True)
    def until_cancelled(call: realmap.Call, path: str) -> None:
        while not call.cancelled:
            time.sleep(0.001)
        Path(path).write_text("cancelled")

    with realmap.Kernel(syscalls=[until_cancelled]) as kernel, realmap.connect(kernel.path) as me:
        asked = Asked(me, "until_cancelled", str(tmp_path / "note"))
        wait_until(lambda: any(running.began for running in set(kernel.dispatch.running)))
        kernel.stop()
        wait_until((tmp_path / "note").exists)
        asked.result()


def test_a_warning_with_the_handlers_stack_goes_to_stderr() -> None:
    script = """
        import realmap, threading
        from realmap.kernel import watchdog
        watchdog.REPORT, watchdog.TICK = 0.1, 0.02
        gate = threading.Event()
        def stand_here():
            gate.wait()
        def stick(call): stand_here()
        def go(call): gate.set()
        with realmap.Kernel(syscalls=[stick, go]) as kernel, realmap.connect(kernel.path) as me:
            thread = threading.Thread(target=me.call, args=("stick",))
            thread.start()
            while not any(running.told for running in set(kernel.dispatch.running)):
                pass
            me.call("go")
            thread.join()
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=BOUND
    )
    assert done.returncode == 0
    assert done.stderr.count("'stick'") == 1
    assert "declare it blocking=True" in done.stderr
    assert done.stderr.count("File") == done.stderr.count("line") == 4, "stick, stand_here, and two of threading"
    assert done.stderr.index("in stick") < done.stderr.index("in stand_here")


def test_signals_reach_a_program_that_serves_whatever_its_handlers_do() -> None:
    """Also where Linux hands the signal to another thread; and what its handler raises ends `serve`."""
    script = """
        import os, signal, threading, realmap
        def stick(call):
            for _ in range(3): signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
            threading.Event().wait()
        seen = []
        def note(*_):
            seen.append(threading.current_thread() is threading.main_thread())
            if len(seen) == 1:
                raise RuntimeError("enough")
        signal.signal(signal.SIGUSR1, note)
        kernel = realmap.Kernel(syscalls=[stick])
        def ready():
            threading.Thread(target=use, daemon=True).start()
        def use():
            with realmap.connect(kernel.path) as me:
                try: me.call("stick")
                except realmap.KernelDied: pass
        try: kernel.serve(ready=ready)
        except RuntimeError as error: print(error, seen[0])
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=BOUND
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "enough True\n", "")
