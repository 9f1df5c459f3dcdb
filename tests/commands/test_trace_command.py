"""`realmap trace` and `realmap demo --trace`, each as a real process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import syscalls
from command_line import command_line
from conftest import BOUND, PAGE, long, wait_until
from test_commands import realmap
from trace_format import TraceFile

from realmap import KernelHandle, boot

Start = Callable[..., subprocess.Popen[str]]
PROGRAM = """
import os, sys, realmap
with realmap.connect() as me:
    with me.map(5000) as buffer:
        buffer[:5] = b"hello"
        print(me.call("sha256", buffer.slice(0, 5)))
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KernelHandle]:
    monkeypatch.setenv("REALMAP_DIR", str(tmp_path))
    monkeypatch.delenv("REALMAP_KERNEL", raising=False)
    with boot(syscalls=syscalls.ALL) as kernel:
        kernel.stats()
        yield kernel


@pytest.fixture
def start(running: KernelHandle) -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-W", "error", "-m", "realmap", "trace", *arguments]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield begin
    for child in started:
        if child.returncode is None:
            child.kill()
            child.communicate()


def has_begun(file: Path) -> bool:
    try:
        return file.read_text().startswith("[\n")
    except FileNotFoundError:  # not yet; or it was made and removed, to see whether it can be written
        return False


@pytest.mark.parametrize("status", [long(0), 7])
def test_a_command_is_traced_and_its_status_passed_on(running: KernelHandle, tmp_path: Path, status: int) -> None:
    file = tmp_path / "trace.json"
    done = realmap("trace", str(file), "--", sys.executable, "-c", PROGRAM, str(status))
    assert done.returncode == status
    assert len(done.stdout.strip()) == 64  # the command's own
    found = TraceFile(file)
    assert done.stderr.startswith(f"realmap: {found.totals['events']} events, 0 lost, in ")
    assert done.stderr.endswith(f" s: {file}\n")
    (connect,) = found.named("connect")
    names = [call["name"] for call in found.calls(connect["args"]["pid"])]
    assert names[:2] == ["map", "sha256"]
    (mirror,) = found.mirrors()
    assert (mirror["args"]["bytes"], mirror["args"]["rights"]) == (5, "k_r")


OWN = """
import realmap, sys

@realmap.syscall
def first(call: realmap.Call, data: realmap.UserBuffer) -> int:
    with data.mirror() as mirror:
        return mirror[0]

def user(me: realmap.Process) -> None:
    with me.map(5000) as buffer:
        me.call("first", buffer)

for _ in range(int(sys.argv[1])):
    with realmap.boot(syscalls=[first]) as kernel:
        kernel.spawn(user).join()
"""


@pytest.mark.parametrize("others", [long(0), 1, long(2)])
def test_a_kernel_that_the_command_boots_is_traced_from_beginning_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: int
) -> None:
    """However many run besides."""
    monkeypatch.setenv("REALMAP_DIR", str(tmp_path))
    monkeypatch.delenv("REALMAP_KERNEL", raising=False)
    file = tmp_path / "trace.json"
    with ExitStack() as stack:
        for _ in range(others):
            stack.enter_context(boot())
        done = realmap("trace", str(file), "--", sys.executable, "-c", OWN, "1")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.endswith(f" s: {file}\n")
    found = TraceFile(file)
    (connect,) = found.named("connect")
    assert [call["name"] for call in found.calls(connect["args"]["pid"])] == ["map", "first", "unmap"]
    assert [mirror["args"]["bytes"] for mirror in found.mirrors()] == [5000]
    assert len(found.named("reap")) == 1


def test_the_kernel_of_the_commands_own_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`connect()` boots it, and it ends with the command: what it was told last is in the file, too."""
    monkeypatch.setenv("REALMAP_DIR", str(tmp_path))
    for name in ("REALMAP_KERNEL", "REALMAP_TREE"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "trace.json"
    program = "import realmap\nwith realmap.connect() as me, me.map(5000): pass"
    assert realmap("trace", str(file), "--", sys.executable, "-c", program).returncode == 0
    found = TraceFile(file)
    (connect,) = found.named("connect")
    assert [call["name"] for call in found.calls(connect["args"]["pid"])][:2] == ["map", "unmap"]


@pytest.mark.slow
def test_commands_that_boot_many_and_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REALMAP_DIR", str(tmp_path))
    monkeypatch.delenv("REALMAP_KERNEL", raising=False)
    file = tmp_path / "trace.json"
    done = realmap("trace", str(file), "--", sys.executable, "-c", OWN, "3")
    assert done.returncode == 0
    assert done.stderr.endswith("(of the first of 3 kernels that the command booted)\n")
    assert len(TraceFile(file).named("connect")) == 1
    file.unlink()
    assert realmap("trace", str(file), "--", "sh", "-c", "exit 7").returncode == 7
    done = realmap("trace", str(file), "--", "true")
    said = "Error: no kernel runs, and the command has booted none: there is nothing to trace\n"
    assert (done.returncode, done.stderr) == (1, said)
    assert not file.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_with_a_whole_file_on_a_signal(
    running: KernelHandle, start: Start, tmp_path: Path, number: int
) -> None:
    file = tmp_path / "trace.json"
    child = start(str(file), "--kernel", running.path)
    wait_until(lambda: has_begun(file))
    with running.connect() as me:
        me.call("nop")
    child.send_signal(number)
    out, err = child.communicate(timeout=BOUND)
    assert (child.returncode, err) == (0, "")
    assert out.startswith(f"realmap: {TraceFile(file).totals['events']} events, 0 lost")
    assert len(TraceFile(file).named("nop", "X")) == 2


@pytest.mark.slow
def test_a_command_that_ignores_sigterm_is_killed(running: KernelHandle, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    done = realmap("trace", str(file), "--seconds", "3", "--", "sh", "-c", "trap '' TERM; exec sleep 1000")
    assert done.returncode == 128 + signal.SIGKILL
    TraceFile(file)


def test_a_reader_of_a_pipe_gets_all_of_it(running: KernelHandle, tmp_path: Path) -> None:
    fifo, file = tmp_path / "fifo", tmp_path / "trace.json"
    os.mkfifo(fifo)
    with subprocess.Popen(["cp", str(fifo), str(file)]):
        assert realmap("trace", str(fifo), "--seconds", "0.2").returncode == 0
    assert TraceFile(file).totals["lost"] == 0


def test_a_pipe_without_a_reader_is_not_waited_for(running: KernelHandle, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    done = realmap("trace", str(fifo), "--seconds", "0.2")
    assert (done.returncode, done.stderr) == (1, f"Error: cannot write {fifo}: nobody reads this pipe\n")
    assert realmap("trace", str(tmp_path / "next"), "--seconds", "0.1").returncode == 0  # nothing goes on


def test_sigterm_reaches_the_command(running: KernelHandle, start: Start, tmp_path: Path) -> None:
    file, mark = tmp_path / "trace.json", tmp_path / "mark"
    child = start(str(file), "--", "sh", "-c", f"touch {mark}; exec sleep 1000")
    wait_until(mark.exists)
    child.terminate()
    _, err = child.communicate(timeout=BOUND)
    assert child.returncode == 128 + signal.SIGTERM
    assert "events, 0 lost" in err
    TraceFile(file)


def test_it_ends_after_its_seconds(running: KernelHandle, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    done = realmap("trace", str(file), "--seconds", "0.2")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r" in \d+\.\d+ s", done.stdout)
    assert TraceFile(file).totals["lost"] == 0


def test_one_that_is_killed_leaves_a_kernel_that_goes_on(running: KernelHandle, start: Start, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    child = start(str(file))
    wait_until(lambda: has_begun(file))
    with running.connect() as me:
        for _ in range(50):
            me.call("nop")
        wait_until(lambda: file.read_text().count('"nop"') == 100)
        assert realmap("trace", str(tmp_path / "second")).stderr == (
            "Error: the kernel is being traced already; one trace at a time: end that one (what traces, limit 1)\n"
        )
        assert not (tmp_path / "second").exists()
        child.kill()
        child.communicate()
        assert me.call("echo", 1) == [1]
        found = TraceFile(file, cut=True)
        assert len(found.named("nop", "X")) == 100
        assert len(found.of("s")) == 50
        # Off again: another one may begin.
        done = realmap("trace", str(tmp_path / "next"), "--seconds", "0.1")
        assert (done.returncode, done.stderr) == (0, "")
        assert running.audit()


def test_the_kernel_dies_meanwhile(running: KernelHandle, start: Start, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    child = start(str(file))
    wait_until(lambda: has_begun(file))
    os.kill(running.pid, signal.SIGKILL)
    out, err = child.communicate(timeout=BOUND)
    assert child.returncode == 1
    assert out.startswith("realmap: ")
    assert err.startswith("Error: the trace ended before its time: the kernel at ")
    assert "is whole up to there" in err
    assert err.count("\n") == 1
    assert "error" in TraceFile(file).totals


def test_what_is_wrong_is_said_in_one_line(running: KernelHandle, tmp_path: Path) -> None:
    none = str(tmp_path / "none" / "trace.json")
    for arguments, words in [
        ((none,), f"cannot write {none}: No such file or directory"),
        ((str(tmp_path / "t"), "--events", "3"), "a trace holds 16 to 16777216 events"),
        ((str(tmp_path / "t"), "--typo"), "--typo"),
        ((str(tmp_path / "t"), "--kernel", str(tmp_path / "no.sock")), "no kernel"),
        ((str(tmp_path / "t"), "--", "/no/such/command"), "cannot run /no/such/command: No such file or directory"),
        (("/dev/full", "--seconds", "1"), "cannot write /dev/full: No space left on device"),
    ]:
        done = command_line("trace", *arguments)
        assert done.returncode == (2 if "--typo" in arguments else 1)
        assert words in done.stderr
        assert done.stderr.count("\n") == 1 or "--typo" in arguments
        assert "Traceback" not in done.stderr
    running.shutdown()
    done = command_line("trace", tmp_path / "t")
    assert "start one: realmap kernel" in done.stderr


def test_the_demo_against_its_own_report(tmp_path: Path) -> None:
    """Event by event: every mirror that the demo tells of, the mapping behind it, the kill and the reaping."""
    files = []
    for name, size in [("one", 1), ("many", 50 * PAGE + 333), ("page", PAGE + 1)]:
        (tmp_path / name).write_bytes(os.urandom(size))
        files.append(str(tmp_path / name))
    trace = tmp_path / "trace.json"
    done = realmap("demo", "--json", "--trace", str(trace), *files)
    assert (done.returncode, done.stderr) == (0, "")
    report, found = json.loads(done.stdout), TraceFile(trace)
    assert found.totals["lost"] == 0
    mirrors = {(mirror["args"]["address"], mirror["args"]["bytes"]): mirror for mirror in found.mirrors()}
    for file in report["files"]:
        mapped = [event["args"]["bytes"] for event in found.named("map") if event["pid"] == file["pid"]]
        assert mapped == [(file["size"] + PAGE - 1) // PAGE * PAGE]
        for check in file["checks"]:
            mirror = mirrors[f"{check['kernel_address']:#x}", check["length"]]
            assert mirror["args"]["user_address"] == f"{check['user_address']:#x}"
            assert mirror["args"]["pid"] == file["pid"]
        assert len(found.named("reap", pid=file["pid"])) == 1
        dead = found.named("death", pid=file["pid"])
        # One that has closed its connection may have ended, too, by the time that a busy kernel sees that.
        assert len(dead) == 1 if file["pid"] == report["killed"]["pid"] else len(dead) <= 1
    (death,) = found.named("death", pid=report["killed"]["pid"])
    # A mirror outlives its owner.
    (held,) = [mirror for mirror in found.mirrors() if mirror["begin"] < death["begin"] < mirror["end"]]
    assert (held["args"]["pid"], held["args"]["bytes"]) == (report["killed"]["pid"], report["killed"]["length"])
    assert not [span for span in found.of("X") if "unfinished" in span["args"]]
