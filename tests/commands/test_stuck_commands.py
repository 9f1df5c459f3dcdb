"""Every command on a kernel that cannot answer, as a real process: it says why, and ends; and all work after that."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from click.testing import CliRunner
from command_line import command_line
from conftest import BOUND, wait_until

import realmap
from realmap import KernelHandle, SyscallTimeout
from realmap.cli import command
from realmap.cli.top.feed import NONE, Feed, Seen
from realmap.wire.status import look


@realmap.syscall
def hold(call: realmap.Call, seconds: float) -> None:
    """Keeps the GIL, in C: no thread of the kernel runs meanwhile."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))


@realmap.syscall
def nop(call: realmap.Call) -> int:
    """Nothing."""
    return 5


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[KernelHandle]:
    with realmap.boot(path=tmp_path / "k.sock", syscalls=[hold, nop]) as kernel:
        yield kernel


def commands(kernel: KernelHandle, folder: Path) -> dict[str, list[str]]:
    named = ["--kernel", kernel.path]
    return {
        "ps": ["ps", *named],
        "stats": ["stats", *named],
        "maps": ["maps", str(kernel.pid), *named],
        "segments": ["segments", *named],
        "snapshot": ["snapshot", "--json", *named],
        "audit": ["audit", *named],
        "call": ["call", *named, "nop"],
        "trace": ["trace", *named, "--seconds", "0.1", str(folder / "trace.json")],
    }


def run_at_once(asked: dict[str, list[str]]) -> dict[str, tuple[int, str, str]]:
    """(exit status, stdout, stderr) of each."""
    began = {
        name: subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "realmap", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, arguments in asked.items()
    }
    found = {}
    for name, process in began.items():
        try:
            out, err = process.communicate(timeout=BOUND)
        finally:
            process.kill()  # nothing, where it has ended
        found[name] = (process.returncode, out, err)
    return found


def in_doctor(kernel: KernelHandle) -> dict[str, str]:
    """What the doctor says of it."""
    done = CliRunner().invoke(command, ["doctor", "--json", "--kernel", kernel.path])
    return {check["name"]: check["found"] + check["advice"] for check in json.loads(done.stdout)}


@pytest.mark.parametrize("how", ["stopped", "held"])
def test_every_command_says_why(ours: KernelHandle, tmp_path: Path, how: str) -> None:
    """Of the two ways to be stuck, the second with one of each way to ask: for a look, as a user, for its events."""
    every = commands(ours, tmp_path)
    with ours.connect() as me:
        if how == "stopped":
            os.kill(ours.pid, signal.SIGSTOP)
            sentence = f"kernel {ours.pid} is stopped (SIGSTOP)"
        else:
            with suppress(SyscallTimeout):
                me.call("hold", 20 * BOUND, timeout=0.01)
            sentence = f"kernel {ours.pid} is in handler 'hold' of process {os.getpid()} since "
        wait_until(lambda: (at := look(ours.path)) is not None and at.is_stuck, "that it is stuck")
        asked = list(every) if how == "stopped" else ["ps", "call", "trace"]
        for name, (status, out, err) in run_at_once({name: every[name] for name in asked}).items():
            assert (status, out) == (1, ""), (name, err)
            assert err.startswith(f"Error: {sentence}"), name
            assert err.count("\n") == 1, name
        assert sentence in in_doctor(ours)["a kernel"]
        if how == "held":
            os.kill(ours.pid, signal.SIGKILL)
            return
        os.kill(ours.pid, signal.SIGCONT)
        assert me.call("nop") == 5
    for name, words in every.items():
        done = command_line(*words)
        assert done.returncode == 0, (name, done.stderr)
    assert "a kernel" not in in_doctor(ours)
    assert in_doctor(ours)["kernels"] == "1 at work, 0 of them stuck"


def test_the_doctor_looks_at_all_of_this_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with realmap.boot() as one, realmap.boot():
        os.kill(one.pid, signal.SIGSTOP)
        try:
            wait_until(lambda: (at := look(one.path)) is not None and at.stopped, "that it stops")
            done = CliRunner().invoke(command, ["doctor"])
        finally:
            os.kill(one.pid, signal.SIGCONT)
    assert "kernels: 2 at work, 1 of them stuck" in done.stdout
    assert f"a kernel: kernel {one.pid} is stopped (SIGSTOP); kill -CONT {one.pid}" in done.stdout


@pytest.mark.parametrize("name", ["ps", "maps", "segments", "stats", "snapshot", "audit", "call", "trace", "top"])
def test_each_says_how_long_it_waits(name: str) -> None:
    done = CliRunner().invoke(command, [name, "--help"])
    assert "within a second" in done.stdout
    assert "30 seconds" in " ".join(done.stdout.split())


@pytest.mark.parametrize("name", ["doctor", "gc"])
def test_what_asks_nobody_says_so(name: str) -> None:
    done = CliRunner().invoke(command, [name, "--help"])
    assert "waits for none" in " ".join(done.stdout.split())


def test_the_live_view_says_it_and_comes_back(ours: KernelHandle) -> None:
    found: list[Seen | str] = []

    def deliver(seen: Seen | str) -> None:
        found.append(seen)
        feed.consumed()

    feed = Feed(ours.path, 0.1, deliver)
    feed.start()
    try:
        wait_until(lambda: found and isinstance(found[-1], Seen), "the first view")
        os.kill(ours.pid, signal.SIGSTOP)
        try:
            wait_until(lambda: found[-1] == f"kernel {ours.pid} is stopped (SIGSTOP)", "word of it")
        finally:
            os.kill(ours.pid, signal.SIGCONT)
        wait_until(lambda: isinstance(found[-1], Seen), "a view")
        assert found[-1].snapshot.stats["controls"] == 1  # type: ignore[union-attr]
        ours.shutdown()
        wait_until(lambda: isinstance(found[-1], str) and found[-1].startswith(NONE), "word of its end")
    finally:
        feed.stop(BOUND)
