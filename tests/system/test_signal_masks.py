"""Signals that were blocked or ignored where a kernel or a user was started: neither lives otherwise for it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import syscalls
from conftest import BOUND, PAGE, wait_until

import realmap
from realmap import MemoryFault, Process
from realmap.kernel import Kernel

ALL = signal.valid_signals()
NEVER = {signal.SIGKILL, signal.SIGSTOP}


@contextlib.contextmanager
def all_blocked() -> Iterator[None]:
    """What a program does that waits for its signals by sigwait."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ALL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def blocked(pid: int | str) -> dict[int, frozenset[int]]:
    """What each thread of a process blocks."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        (line,) = (line for line in (task / "status").read_text().splitlines() if line.startswith("SigBlk"))
        bits = int(line.split()[1], 16)
        found[int(task.name)] = frozenset(number for number in range(1, 65) if bits >> number - 1 & 1)
    return found


def test_a_kernel_whose_booter_blocks_all() -> None:
    with all_blocked():
        kernel = realmap.boot(syscalls=syscalls.ALL)
    with kernel, kernel.connect() as me:
        assert all(not each for each in blocked(kernel.pid).values())
        buffer = me.map(2 * PAGE)
        for name in ("truncate_and_sum", "slow_truncate_and_sum"):
            with pytest.raises(MemoryFault):
                me.call(name, buffer, PAGE, "dropped")
            me.call("resize", buffer, 2 * PAGE)
    assert kernel._child.exitcode == 0, "it was asked to end, and did"


def test_a_kernel_whose_booter_ignores_signals() -> None:
    ignored = (signal.SIGTERM, signal.SIGBUS, signal.SIGPIPE)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ignored}
    try:
        kernel = realmap.boot(syscalls=syscalls.ALL)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    with kernel, kernel.connect() as me, pytest.raises(MemoryFault):
        me.call("truncate_and_sum", me.map(2 * PAGE), PAGE, "dropped")
    assert kernel._child.exitcode == 0


def test_a_user_whose_booter_blocks_all() -> None:
    def work(me: Process, path: str) -> None:
        with open(path, "w") as file:
            print(*signal.pthread_sigmask(signal.SIG_BLOCK, ()), "ready", file=file, flush=True)
        signal.pause()

    with realmap.boot() as kernel:
        reader, writer = os.pipe()
        with all_blocked():
            user = kernel.spawn(work, f"/proc/{os.getpid()}/fd/{writer}")
        with open(reader) as said:
            assert said.readline() == "ready\n"
        os.close(writer)
        os.kill(user.pid, signal.SIGTERM)
        assert user.join(BOUND) == -signal.SIGTERM


def test_a_command_that_was_started_so(tmp_path: Path) -> None:
    with all_blocked():
        command = subprocess.Popen(
            [sys.executable, "-m", "realmap", "kernel", "--path", str(tmp_path / "sock")], stdout=subprocess.PIPE
        )
    with command:
        try:
            assert command.stdout is not None
            assert b"ready" in command.stdout.readline()
            assert frozenset() in blocked(command.pid).values()
            command.send_signal(signal.SIGTERM)
            assert command.wait(BOUND) == 0
        finally:
            command.kill()


def test_a_script_that_serves_has_its_mask_again() -> None:
    """While it serves its handler ends it; a signal that waited comes then, too. The guard's own stays unblocked."""
    script = """
        import os, signal, realmap
        from realmap.kernel import Kernel
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        kernel = Kernel()
        signal.signal(signal.SIGTERM, lambda *_: kernel.stop(wait=False))
        os.kill(os.getpid(), signal.SIGTERM)
        kernel.serve()
        print(*(int(number) for number in before - signal.pthread_sigmask(signal.SIG_BLOCK, ())))
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=BOUND
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{int(signal.SIGBUS)}\n", "")


def test_a_thread_that_serves_leaves_the_programs_signals_alone() -> None:
    others = blocked("self").keys() - {threading.get_native_id()}  # a worker of the tests has one
    with all_blocked(), Kernel(syscalls=syscalls.ALL) as kernel, realmap.connect(kernel.path) as me:
        buffer = me.map(2 * PAGE)
        with pytest.raises(MemoryFault):
            me.call("slow_truncate_and_sum", buffer, PAGE, "dropped")
        right = {frozenset(ALL - NEVER), frozenset(ALL - NEVER - {signal.SIGBUS})}
        # A thread that is just ending shows none for a moment.
        wait_until(lambda: {each for thread, each in blocked("self").items() if thread not in others} <= right)
