"""The command line, the demo and the examples, each as a real process."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import click
import msgspec
import pytest
from command_line import command_line
from conftest import BOUND, PAGE, ROOT, long
from rich.console import Console
from terminal import on_a_terminal

from realmap.cli import command
from realmap.cli.demo import render
from realmap.errors import InvalidSize
from realmap.lab import demo
from realmap.observe.control import Control

#: The environment of these tests, where `tools/setup` has made it.
VENV = ROOT / Path(sys.prefix).name
#: What an example is given where its own size only makes it long.
SMALLER = {
    "big_array": ["8", "1"],
    "crash_proof": ["2000", "5"],
    "pipeline": ["190", "108", "3"],
    "pool_of_servers": ["2", "3", "2"],
}


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
    assert set(report) == {"kernel", "files", "races", "written", "killed", "balance", "ok"}
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


@pytest.mark.skipif(not (VENV / ".built-test").exists(), reason="tools/setup has not set up this environment")
def test_the_command_of_the_readme(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """From wherever it is called: files are named from there."""
    monkeypatch.setenv("PYTHON", "" if VENV.name == ".venv" else sys.executable)  # that environment, and no new one
    done = subprocess.run(
        [ROOT / "tools" / "demo", "--json", Path(files[0]).name], cwd=Path(files[0]).parent, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout)["ok"] is True


@pytest.mark.parametrize("width", [60, long(80), long(200)])
def test_the_demo_in_a_pipe_is_plain(files: list[str], width: int) -> None:
    done = realmap("demo", "--ranges", *files, env=os.environ | {"COLUMNS": str(width)})
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    ranges = [line for line in lines if re.search(r" 0x2\w{11}  0x3\w{11}  1→2→1  (same|\?) +ok$", line)]
    assert len(ranges) == sum(len(demo.ranges_of(os.path.getsize(file))) for file in files)
    assert max(len(line) for line in lines if line not in ranges and "KernelLand" not in line) <= min(width, 100)
    assert all(line.isprintable() for line in lines)
    picture = [line for line in lines if "◀" in line and " 0x3" in line]
    assert [file for file in files if not any(f" {Path(file).name} " in line for line in picture)] == []
    assert "refcount 2→1" in done.stdout
    assert "WRONG" not in done.stdout
    assert "All of it held." in lines


def test_who_looks_on_is_not_taken_for_what_is_left(files: list[str]) -> None:
    with demo.boot() as kernel, ExitStack() as stack:
        report = demo.run(kernel, demo.plan(files[:1]), lambda done: stack.enter_context(Control(kernel.path)))
    assert report.ok
    assert report.balance["descriptors"] == 0


@pytest.mark.parametrize("width", [long(60), long(80), 200])
def test_the_demo_on_a_terminal_has_a_picture_and_colour(files: list[str], width: int) -> None:
    out = on_a_terminal(["demo", *files], {"COLUMNS": str(width)})
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out)
    assert "\x1b[" in out
    assert len(re.findall(r"0x2\w{11} .*◀.* 0x3\w{11}", text)) == len(files)
    assert max(len(line.rstrip()) for line in text.splitlines() if "mirroring" not in line) <= min(width, 100)


def test_the_demo_refuses_what_it_cannot_load(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for path, words in [("empty", "empty"), ("none", "does not exist"), (".", "directory")]:
        done = command_line("demo", str(tmp_path / path))
        assert done.returncode != 0
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def test_a_pace_without_the_live_view_is_refused(files: list[str]) -> None:
    done = command_line("demo", "--pace", 2, files[0])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("Error: --pace goes with --top\n")


def test_a_trace_of_the_demo_that_cannot_be_written_is_named(files: list[str]) -> None:
    done = realmap("demo", "--trace", "/dev/full", files[0])
    assert done.returncode == 1
    assert done.stderr == "Error: [Errno 28] No space left on device: '/dev/full'\n"


def test_the_demo_says_what_is_wrong(files: list[str]) -> None:
    """Each verdict on a range can fail."""
    planned = demo.plan(files[:2])
    planned[0].checks[0].expected = "0" * 64
    with demo.boot() as kernel:
        report = demo.run(kernel, planned)
    assert not report.ok
    assert [check.ok for file in report.files for check in file.checks].count(False) == 1
    good = planned[1].checks[0]
    for name, value in [("refcounts", (1, 1, 1)), ("kernel_address", 1), ("frames", [(1, 2)]), ("digest", "")]:
        before = getattr(good, name)
        setattr(good, name, value)
        assert not good.ok
        setattr(good, name, before)
    assert good.ok


def test_each_statement_of_the_demo_can_fail(files: list[str]) -> None:
    """What did not hold is said to be wrong, by one statement each, and is never shown beside an ok."""
    with demo.boot() as kernel:
        good = demo.run(kernel, demo.plan(files[:2]))
    assert told(good).count("WRONG") == 0
    assert len(good.races) == 2
    for change, word in [
        (lambda story: setattr(story.files[1].checks[2], "digest", "0" * 64), "SHA-256"),
        (lambda story: setattr(story.files[1].checks[2], "frames", [(1, 2)]), "frame|page"),
        (lambda story: setattr(story.files[1].checks[2], "refcounts", (1, 2, 2)), "1→2→1, 1→2→2"),
        (lambda story: setattr(story, "written", False), "wrote"),
        (lambda story: setattr(story.races[1], "ok", False), "same bytes"),
        (lambda story: setattr(story.killed, "exitcode", 0), "exit code 0"),
        (lambda story: setattr(story.killed, "digest", ""), "read through it"),
        (lambda story: setattr(story.killed, "refcounts", (2, 2)), "refcount 2→2"),
        (lambda story: story.balance.update(names=3), "3 names"),
    ]:
        story = msgspec.json.decode(msgspec.json.encode(good), type=demo.Report)
        change(story)
        assert story.holds() is False
        story.ok = False
        text = told(story)
        assert "All of it held" not in text
        (wrong,) = re.findall(r"^WRONG  (.*(?:\n {7}.*)*)", text, re.M)
        assert re.search(word, wrong), wrong


def test_the_demo_claims_no_more_than_it_saw(files: list[str]) -> None:
    with demo.boot() as kernel:
        story = demo.run(kernel, demo.plan(files[1:2]))
    first, second = story.races
    first.mirror, first.copy = 3000, 1000
    second.mirror, second.copy = 1000, 12_500
    second.mirror_digest, second.copy_digest = 1000, 1001
    rows = [line.split()[2:] for line in told(story).splitlines() if " µs " in line]
    assert [" ".join(row[-3:]) for row in rows] == ["copy 3.0x quicker", "mirror 12.5x quicker", "about the same"]
    for check in story.files[0].checks:
        check.frames = [(None, None)]  # as Linux answers whoever is not root
    assert "same frame" not in told(story)
    assert "WRONG" not in told(story)
    story.killed.exitcode = 0
    assert "✗" not in told(story)


def told(story: demo.Report) -> str:
    console = Console(file=io.StringIO(), width=100)
    render(console, story)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_what_a_user_of_the_demo_fails_of_is_said(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(PAGE))
    planned = demo.plan([str(file)])
    planned[0].size += 1  # as if it had been cut short meanwhile
    with demo.boot() as kernel, pytest.raises(OSError, match="changed its size while it was read"):
        demo.run(kernel, planned)


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


def test_default_files_that_this_user_may_not_read_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    files = demo.default_files()
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != files[1])
    assert files[1] not in demo.default_files()


def test_a_python_that_will_not_do_is_said_with_the_reason(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\necho it is Python 3.9.1 >&2\nexit 1\n")
    old.chmod(0o755)
    for python, why in (("/cannot/run", "No such file or directory"), (str(old), "it is Python 3.9.1")):
        done = subprocess.run(
            [ROOT / "tools" / "setup", "demo"], env=os.environ | {"PYTHON": python}, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"tools/setup: PYTHON is {python}, which cannot be taken: ")
        assert done.stderr.endswith(why + "\n")


@pytest.mark.parametrize("example", sorted((ROOT / "tools" / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run(example: Path) -> None:
    command = [sys.executable, "-W", "error", str(example), *SMALLER.get(example.stem, [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BOUND)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout) > 20
    if done.stdout.startswith("skipped: "):
        pytest.skip(done.stdout)


README = (ROOT / "README.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("at", range(len(PROGRAMS)))
def test_the_programs_of_the_readme_run(at: int, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAMS[at])
    command = [sys.executable, "-W", "error", "program.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=BOUND)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout
    assert "hello" not in PROGRAMS[at] or hashlib.sha256(b"hello").hexdigest() in done.stdout or "hello" in done.stdout


def test_the_readme_has_a_program_for_each_use_and_its_commands_exist() -> None:
    for use in ("1. Another process's buffer", "2. Stress", "3. Shared memory"):
        assert "```python" in README.partition(f"## {use}")[2].partition("\n## ")[0]
    lines = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S)).splitlines()
    told = [line.partition("  ")[0].split() for line in lines if line.startswith("realmap ")]
    assert len(told) > 10
    for _, name, *arguments in told:
        found = command.get_command(click.Context(command), name)
        while isinstance(found, click.Group) and arguments and not arguments[0].startswith("-"):
            found = found.get_command(click.Context(found), arguments.pop(0))
        assert found is not None, name
        known = {word for parameter in found.params for word in parameter.opts}
        own = arguments[: arguments.index("--")] if "--" in arguments else arguments
        assert {word for word in own if word.startswith("--")} <= known, name


def test_help_and_errors_are_short() -> None:
    done = realmap("--help")
    assert done.returncode == 0
    assert "demo" in done.stdout
    assert "kernel" in done.stdout
    assert command_line("--version").stdout.strip().endswith("0.1.0")
    done = realmap("kernel", "--path", "/nowhere/at/all.sock")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "directory" in done.stderr
    assert realmap("kernel", "--memory-limit", "-1").returncode == 1


def test_no_letter_for_it(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = realmap("demo", files[0])
    assert (done.returncode, done.stderr) == (0, "")
    assert "refcount 2\\u21921" in done.stdout


def test_output_to_a_closed_pipe(files: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    child = subprocess.run(
        [sys.executable, "-m", "realmap", "demo", files[0]], stdout=writer, stderr=subprocess.PIPE, timeout=BOUND
    )
    os.close(writer)
    assert b"Traceback" not in child.stderr
