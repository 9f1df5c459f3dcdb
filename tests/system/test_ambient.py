"""The kernel of a process tree: one that has ended is not believed in, and signals to everybody do not end it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from blocks import clean, program
from conftest import BOUND, wait_until
from forked import in_a_child

import realmap
from realmap import KernelDied, ambient
from realmap.host import liveness
from realmap.shared_memory import SharedMemory
from realmap.user import travel


def kernel_pid() -> int:
    """Of the ambient kernel."""
    return ambient.process()._own_client.kernel_pid


def kill_kernel() -> None:
    """Kills the ambient kernel, and waits until it is gone."""
    pid = kernel_pid()
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    assert liveness.wait_death(pidfd, BOUND)
    os.close(pidfd)


# ---- after its death ----------------------------------------------------------------------------


def test_the_next_use_after_its_death_boots_another(tree: None) -> None:
    block = SharedMemory(create=True, size=10)
    block.buf[:3] = b"abc"
    for _ in range(2):
        before = kernel_pid()
        kill_kernel()
        again = SharedMemory(create=True, size=10)
        assert kernel_pid() != before
        again.close()
        again.unlink()
    kill_kernel()
    with pytest.raises(FileNotFoundError):
        SharedMemory(block.name)
    with pytest.raises(FileNotFoundError):
        block.unlink()
    with realmap.connect() as me, me.map(5) as buffer:
        assert buffer == bytes(5)
    assert bytes(block.buf[:3]) == b"abc"
    block.close()


def test_a_forked_childs_next_use_as_well(tree: None) -> None:
    block = SharedMemory(create=True, size=10)
    kill_kernel()

    def work() -> None:
        block.close()
        SharedMemory(create=True, size=7).unlink()

    in_a_child(work)
    SharedMemory(create=True, size=7).unlink()
    block.close()


def test_connect_finds_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a process that booted one for itself, and is told of its death by nobody."""
    for variable in (ambient.VARIABLE, ambient.TREE):
        monkeypatch.setenv(variable, "")  # so that it is as before afterwards
        monkeypatch.delenv(variable)
    with realmap.connect() as me:
        os.kill(me._own_client.kernel_pid, signal.SIGKILL)
        with realmap.connect() as other:
            assert other.path != me.path and os.environ[ambient.VARIABLE] == other.path
            assert other.map(3) == bytes(3)
    ambient._booted.shutdown()  # type: ignore[union-attr]
    ambient._booted = None


def test_a_variable_that_names_a_dead_kernel_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a program has it that outlives the one it was started by."""
    code = "import realmap; print(realmap.connect().path)"
    started = subprocess.run([sys.executable, "-c", code], env=clean(), capture_output=True, text=True, timeout=BOUND)
    stale = started.stdout.strip()
    text = f"""
    import realmap
    with realmap.connect() as me:
        print(me.path != {stale!r}, me.path == realmap.connect().path, me.map(3) == bytes(3))
    block = SharedMemory(create=True, size=3)
    block.unlink()
    print(block.size)
    """
    done = subprocess.run(
        [sys.executable, "-c", program(text, "realmap")],
        env=clean() | {ambient.VARIABLE: stale},
        capture_output=True,
        text=True,
        timeout=BOUND,
    )
    assert (done.stdout, done.stderr) == ("True True True\n3\n", "")


def test_a_kernel_that_somebody_chose_is_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = str(tmp_path / "mine.sock")
    monkeypatch.setenv(ambient.VARIABLE, path)
    for use in (realmap.connect, lambda: SharedMemory(create=True, size=5)):
        with pytest.raises(KernelDied, match="mine"):
            use()
    with realmap.boot(path=path), realmap.connect() as me:
        assert me.path == path
    travel.forget(path)


# ---- signals to everybody -----------------------------------------------------------------------


def test_sigterm_to_all_leaves_it_serving_until_its_booter_has_ended() -> None:
    """As systemd and `docker stop` have it."""
    text = """
    import signal
    from realmap import ambient
    block = SharedMemory(create=True, size=64)
    block.buf[:3] = b"abc"
    signal.signal(signal.SIGTERM, lambda *_: None)
    print(ambient.process()._own_client.kernel_pid, flush=True)
    sys.stdin.readline()
    other = SharedMemory(block.name)
    print(bytes(other.buf[:3]), SharedMemory(create=True, size=8).size)
    block.unlink()
    """
    started = subprocess.Popen(
        [sys.executable, "-c", program(text, "realmap")],
        env=clean(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with started:
        assert started.stdout is not None
        kernel = int(started.stdout.readline())
        pidfd = os.pidfd_open(kernel)
        for pid in (kernel, started.pid):
            os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not pending(kernel), "the kernel's taking of the signal")
        out, errors = started.communicate("\n", timeout=BOUND)
        assert (out, errors, started.returncode) == ("b'abc' 8\n", "", 0)
        assert liveness.wait_death(pidfd, BOUND)
        os.close(pidfd)


def pending(pid: int) -> int:
    """The signals that a process has not taken yet."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["ShdPnd"], 16) | int(status["SigPnd"], 16)


def test_ctrl_c_and_sigterm_do_not_end_a_booted_kernel_and_its_booter_does() -> None:
    with realmap.boot() as kernel, kernel.connect() as me:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(kernel.pid, number)
        wait_until(lambda: not pending(kernel.pid))
        assert me.map(3) == bytes(3)
    assert kernel._child.exitcode == 0


@realmap.syscall(blocking=True)
def end_a_fork(call: realmap.Call) -> list[int]:
    """How forks of the kernel's process end by signals, and a program that it starts."""
    ends = []
    reader, writer = os.pipe()
    for number in (signal.SIGTERM, signal.SIGRTMIN):
        pid = os.fork()
        if not pid:
            os.write(writer, b"!")
            while True:
                time.sleep(0.1)
        os.read(reader, 1)
        os.kill(pid, number)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os.close(reader)
    os.close(writer)
    with subprocess.Popen(["sleep", "60"]) as started:
        started.send_signal(signal.SIGINT)
        ends.append(started.wait(30))
    return ends


def test_what_a_handler_starts_ends_by_signals() -> None:
    with realmap.boot(syscalls=[end_a_fork]) as kernel, kernel.connect() as me:
        assert me.call("end_a_fork", timeout=BOUND) == [-signal.SIGTERM, -signal.SIGRTMIN, -signal.SIGINT]
