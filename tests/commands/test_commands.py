"""The command line, the demo and the examples, each as a real process."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import syscalls
from conftest import BOUND, PAGE, ROOT
from terminal import on_a_terminal

from realmap import KernelHandle, boot
from realmap.errors import InvalidSize
from realmap.lab import demo
from realmap.observe.control import Control

#: What an example is given where its own size only makes it long: MiB and rounds.
SMALLER = {"big_array": ["8", "1"]}


def realmap(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "realmap", *arguments],
        capture_output=True,
        text=True,
        timeout=BOUND,
        **options,  # type: ignore[call-overload]
    )


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """One byte; a page and a byte; many pages, which will be in segments; an odd name."""
    made = []
    for name, size in [("one", 1), ("a name [bold]", 50 * PAGE + 333), ("page", PAGE + 1), ("last", 3333)]:
        (tmp_path / name).write_bytes(os.urandom(size))
        made.append(str(tmp_path / name))
    return made


def test_the_demo_on_given_files_as_json(files: list[str]) -> None:
    done = realmap("demo", "--json", *files)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["ok"] is True
    assert [file["path"] for file in report["files"]] == files
    assert set(report["balance"]) == {
        "processes", "segments", "mappings", "mirrors", "bytes", "descriptors", "names"
    }  # fmt: skip
    assert not any(report["balance"].values())
    assert report["killed"]["exitcode"] == -9
    checks = [check for file in report["files"] for check in file["checks"]]
    assert all(check["digest"] == check["expected"] for check in checks)
    assert any(check["segments"] > 1 for check in checks)
    assert {check["length"] for check in checks} >= {1, 3333}
    if not os.geteuid():
        assert all(user == kernel for check in checks for user, kernel in check["frames"])
        assert all(user for check in checks for user, _ in check["frames"])


@pytest.mark.skipif(not list(ROOT.glob(".venv*/.built-test")), reason="tools/setup has not set up this checkout")
def test_the_command_of_the_readme(files: list[str]) -> None:
    """From wherever it is called: files are named from there."""
    done = subprocess.run(
        [ROOT / "tools" / "demo", "--json", Path(files[0]).name], cwd=Path(files[0]).parent, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout)["ok"] is True


def test_the_demo_in_a_pipe_is_plain(files: list[str]) -> None:
    done = realmap("demo", *files)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "a name [bold]" in done.stdout
    assert re.search(r"UserLand 0x2\w{11} KernelLand 0x3\w{11} page offset 0x\w+ segments \d", done.stdout)
    assert "refcount 2 → 1" in done.stdout
    assert "WRONG" not in done.stdout


def test_who_looks_on_is_not_taken_for_what_is_left(files: list[str]) -> None:
    paths: list[str] = []
    with ExitStack() as stack:
        look = lambda check: stack.enter_context(Control(paths[0]))  # noqa: E731
        report = demo.run(demo.plan(files[:1]), look, on_boot=paths.append)
    assert report.ok
    assert report.balance["descriptors"] == 0


def test_the_demo_on_a_terminal_has_tables_and_colour(files: list[str]) -> None:
    out = on_a_terminal(["demo", *files], {"COLUMNS": "80"})
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out)
    assert "\x1b[" in out
    assert "KernelLand" in text
    assert max(len(line.rstrip()) for line in text.splitlines() if "→" in line) <= 80


def test_the_demo_refuses_what_it_cannot_load(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for path, words in [("empty", "empty"), ("none", "does not exist"), (".", "directory")]:
        done = realmap("demo", str(tmp_path / path))
        assert done.returncode != 0
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def test_the_demo_says_what_is_wrong(files: list[str]) -> None:
    """Each claim of the report can fail."""
    planned = demo.plan(files[:2])
    planned[0].checks[0].expected = "0" * 64
    report = demo.run(planned)
    assert not report.ok
    assert [check.ok for file in report.files for check in file.checks].count(False) == 1
    good = planned[1].checks[0]
    for name, value in [("refcounts", (1, 1, 1)), ("kernel_address", 1), ("frames", [(1, 2)]), ("digest", "")]:
        before = getattr(good, name)
        setattr(good, name, value)
        assert not good.ok
        setattr(good, name, before)
    assert good.ok


@pytest.mark.parametrize("size", [1, 2, 3, PAGE - 1, PAGE, PAGE + 1, 33 * PAGE, 1_000_003])
def test_ranges_lie_inside_of_the_file(size: int) -> None:
    found = demo.ranges_of(size)
    assert (0, size) in found
    assert (size - 1, 1) in found
    assert all(0 <= offset < offset + length <= size for offset, length in found)
    assert len(set(found)) == len(found)


def test_default_files_are_real() -> None:
    files = demo.default_files()
    assert len(files) >= 3
    assert sum(os.path.getsize(path) for path in files) > 1 << 20
    with pytest.raises(InvalidSize):
        demo.plan([os.devnull])


@pytest.mark.parametrize("example", sorted((ROOT / "tools" / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run(example: Path) -> None:
    command = [sys.executable, "-W", "error", str(example), *SMALLER.get(example.stem, [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BOUND)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout) > 20


def test_the_program_of_the_readme_runs() -> None:
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert blocks
    for block in blocks:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", block], capture_output=True, text=True, timeout=BOUND
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout
    assert [
        title for title in ("As a kernel", "As shared memory", "As an experiment") if f"## {title}" not in text
    ] == []


def test_help_and_errors_are_short() -> None:
    done = realmap("--help")
    assert done.returncode == 0
    assert "demo" in done.stdout
    assert "kernel" in done.stdout
    assert realmap("--version").stdout.strip().endswith("0.1.0")
    done = realmap("kernel", "--path", "/nowhere/at/all.sock")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "directory" in done.stderr
    assert realmap("kernel", "--memory-limit", "-1").returncode == 1


def test_no_letter_for_it(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = realmap("demo", files[0])
    assert (done.returncode, done.stderr) == (0, "")
    assert "refcount 2 \\u2192 1" in done.stdout


def test_output_to_a_closed_pipe(files: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    child = subprocess.run(
        [sys.executable, "-m", "realmap", "demo", files[0]], stdout=writer, stderr=subprocess.PIPE, timeout=BOUND
    )
    os.close(writer)
    assert b"Traceback" not in child.stderr


# ---- a running kernel, from outside -------------------------------------------------------


@pytest.fixture
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KernelHandle]:
    """A kernel in the private directory of this test alone (a short path: a socket's has 107 bytes at most)."""
    before = os.environ["XDG_RUNTIME_DIR"]
    os.environ["XDG_RUNTIME_DIR"] = str(tmp_path_factory.mktemp("k"))
    try:
        with boot(syscalls=syscalls.ALL) as kernel:
            yield kernel
    finally:
        os.environ["XDG_RUNTIME_DIR"] = before


@pytest.mark.parametrize("how", ["option", "variable", "only one"])
def test_an_audit_of_a_running_kernel(running: KernelHandle, how: str) -> None:
    with running.connect() as me, me.map(5 * PAGE, fragment=2 * PAGE), me.map(PAGE, name=f"named-{os.getpid()}"):
        options = ["--kernel", running.path] if how == "option" else []
        variables = {**os.environ, **({"REALMAP_KERNEL": running.path} if how == "variable" else {})}
        done = realmap("audit", *options, env=variables)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == "0 differences in 1 process, 2 mappings, 0 mirrors, 2 frames\n"
        report = json.loads(realmap("audit", "--json", *options, env=variables).stdout)
        assert (report["differences"], report["mappings"], report["faulted"]) == ([], 2, [])


def test_an_audit_names_each_difference(running: KernelHandle) -> None:
    with running.connect() as me, me.map(2 * PAGE) as buffer:
        me.call("truncate_and_sum", buffer.slice(0, 1), 2 * PAGE, "dropped")
        address = buffer._window._base
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.munmap(ctypes.c_void_p(address + PAGE), ctypes.c_size_t(PAGE)) == 0
        done = realmap("audit", "--kernel", running.path)
        assert done.returncode == 1
        assert f"UserLand of pid {os.getpid()} at {address:#x}" in done.stdout
        assert done.stdout.startswith("2 differences")
        page = running.snapshot().frames[0].segments[0]
        fd = next(
            int(fd)
            for fd in os.listdir(f"/proc/{running.pid}/fd")
            if os.stat(f"/proc/{running.pid}/fd/{fd}").st_ino == page.inode
        )
        again = libc.syscall(438, os.pidfd_open(running.pid), fd, 0)  # pidfd_getfd; and then a mapping again
        found = libc.mmap
        found.restype = ctypes.c_void_p
        found.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        assert found(address + PAGE, PAGE, 3, 0x100001, again, PAGE) == address + PAGE
        os.close(again)
        os.close(again - 1)
        assert running.audit()


def test_an_audit_finds_a_descriptor_too_many(running: KernelHandle) -> None:
    with running.connect() as me, me.map(PAGE) as buffer:
        me.call("leak_descriptor", buffer)
        report = running.audit()
        assert [difference.linux for difference in report.differences] == ["2 are open in the kernel"]


@pytest.mark.parametrize("command", [["audit"]])
def test_no_kernel_and_several(running: KernelHandle, command: list[str], tmp_path: Path) -> None:
    with boot() as second:
        done = realmap(*command)
        assert done.returncode == 1
        assert running.path in done.stderr
        assert second.path in done.stderr
        assert f"  of process {os.getpid()}, " in done.stderr  # who booted it
    running.shutdown()
    done = realmap(*command)
    assert done.returncode == 1
    assert "start one: realmap kernel" in done.stderr
    file, dead = tmp_path / "file", tmp_path / "dead"
    file.touch()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(dead))
    for path, words in (
        (tmp_path / "none", "no kernel listens at"),
        (dead, f"any more; clear it away: realmap gc {dead}"),
        (tmp_path, "is a directory, not the socket of a kernel: give what"),
        (file, "is a file, not the socket of a kernel: give what"),
        (file / "x", "no kernel listens at"),
    ):
        done = realmap(*command, "--kernel", str(path))
        assert done.returncode == 1
        assert done.stderr.startswith("Error: ")
        assert done.stderr.count("\n") == 1
        assert repr(str(path)) in done.stderr
        assert words in done.stderr


def test_gc_takes_what_a_killed_kernel_left_and_nothing_else(running: KernelHandle, tmp_path: Path) -> None:
    name, path = f"left-{os.getpid()}", str(tmp_path / "own.sock")
    killed, at_path = boot(), boot(path=path)
    with killed.connect() as me, me.map(PAGE, name=name), running.connect() as other:
        with other.map(PAGE, name=name + "-living"):
            assert realmap("gc").stdout == "nothing was left over\n"
            for kernel in (killed, at_path):
                os.kill(kernel.pid, signal.SIGKILL)
                kernel._child.wait(BOUND)
            assert json.loads(realmap("gc", "--json", path, running.path[:-5] + ".none").stdout) == [
                name,
                killed.path,
                path,
            ]
            assert not os.path.exists(path)
            assert not os.path.exists(path + ".lock")
            done = realmap("gc", running.path)
            assert done.returncode == 1
            assert "serves" in done.stderr
            assert os.path.exists(f"/dev/shm/{name}-living")
            assert other.call("nop") is None
    killed.shutdown()
    at_path.shutdown()


def test_a_path_is_taken_over_from_a_killed_kernel(tmp_path: Path) -> None:
    path = str(tmp_path / "again.sock")
    for _ in range(3):
        kernel = boot(path=path)
        with kernel.connect() as me:
            assert len(me.map(PAGE)) == PAGE
            os.kill(kernel.pid, signal.SIGKILL)
            kernel._child.wait(BOUND)
        kernel.shutdown()
    with boot(path=path) as kernel, kernel.connect() as me:
        assert kernel.audit()
