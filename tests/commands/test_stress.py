"""`realmap stress`: it does what it says, the same seed does the same, and it notices when something is wrong."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock
from xml.etree import ElementTree

import pytest
from command_line import command_line
from conftest import BOUND, SUPPORT, long, scaled, wait_until
from rich.console import Console

import realmap
from realmap.cli.stress import render
from realmap.host.stranger import may_open_map_files
from realmap.lab import stress, workload
from realmap.lab.stress import handlers, neighbours, report, runner, worker
from realmap.lab.stress.board import Board


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "realmap", "stress", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=4 * BOUND,
        env={**os.environ, **environment},
    )


def test_a_storm(tmp_path: Path) -> None:
    out, xml = tmp_path / "report.json", tmp_path / "report.xml"
    done = command("storm", "--ops", 400, "--users", 3, "--seed", 1, "--json", out, "--junit", xml)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["failures"] == []
    assert found["steps"] > 100
    assert found["bytes_verified"] > 10_000
    assert found["injected"]["kills"] > 0
    assert found["audits"] >= 1
    assert found["replay"] == "realmap stress storm --users 3 --seed 1 --ops 400 --kill 0.02 --truncate 0.01"
    for kind in found["kinds"].values():
        assert 0 < kind["p50"] <= kind["p99"] <= kind["longest"]
    suite = ElementTree.parse(xml).getroot()
    assert (suite.get("failures"), len(suite)) == ("0", 5)
    assert done.stdout.startswith(found["replay"])
    assert "ok: every byte right" in done.stdout


def test_truncations_are_told_of() -> None:
    found = stress.run(stress.Options("quick", users=2, seconds=None, ops=300, seed=4, truncate=0.2))
    assert found.ok, "\n".join(found.failures)
    assert found.injected["truncations"] > 10
    assert found.kinds["truncate"].count == found.injected["truncations"]


def test_the_same_seed_makes_the_same_choices() -> None:
    one, two, other = (
        stress.run(stress.Options("quick", users=2, seconds=None, ops=200, seed=seed)) for seed in (8, 8, 9)
    )
    assert one.ok
    assert one.steps == two.steps >= 200
    assert one.choices == two.choices
    assert one.choices != other.choices
    assert {name: kind.count for name, kind in one.kinds.items()} == {
        name: kind.count for name, kind in two.kinds.items()
    }


def test_a_full_shm() -> None:
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("needs a mount namespace of its own (unshare)")
    done = command("quick", "--full", "--ops", 1200, "--seed", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    refused = next(line for line in done.stdout.splitlines() if "refused" in line)
    assert " 0 refused" not in refused


def _broken(kind: str) -> list[Any]:
    """The handlers, one of them wrong."""

    def stress_reverse(call: Any, data: Any) -> None:
        if kind == "wrong byte":
            with data.mirror() as mirror:
                mirror[:] = bytes(mirror)[::-1]
                mirror[-1] = mirror[-1] ^ 1
        elif kind == "kernel dies":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "user dies":
            os.kill(call.process.pid, signal.SIGKILL)

    return [stress_reverse, *[found for found in handlers.ALL if found is not handlers.stress_reverse]]


@pytest.mark.parametrize(
    ("kind", "words"),
    [("wrong byte", "wrong bytes"), ("kernel dies", "died"), ("user dies", "SIGKILL, which was not asked for")],
)
def test_what_is_wrong_is_noticed(kind: str, words: str, tmp_path: Path) -> None:
    with realmap.boot(syscalls=_broken(kind)) as kernel:
        done = command("quick", "--seconds", 20, "--seed", 3, "--kernel", kernel.path, "--junit", tmp_path / "x")
        assert done.returncode == 1
        assert words.lower() in done.stdout.lower()
        assert f"replay: realmap stress quick --users 4 --seed 3 --seconds 20 --kernel {kernel.path}" in done.stdout
        assert ElementTree.parse(tmp_path / "x").getroot().get("failures") != "0"


@pytest.mark.parametrize(
    ("error", "words"),
    [(realmap.SyscallTimeout("stats", 1.0), "cannot be asked: "), long(realmap.KernelDied("/x"), "died: ")],
)
def test_a_kernel_that_does_not_answer_is_not_called_dead(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sample(*_: object) -> None:
        raise error

    monkeypatch.setattr(runner.Runner, "_sample", sample)
    found = stress.run(stress.Options("quick", users=1, seconds=30.0, seed=1))
    assert found.failures == [f"the kernel {words}{error}"]


@pytest.mark.parametrize("mix", ["quick", *(long(mix) for mix in sorted({*workload.MIXES} - {"quick"}))])
def test_a_wrong_byte_is_found_by_each_mix_and_again_by_its_seed(mix: str, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    found = []
    arguments = [mix, "--ops", SUPPORT / "wrong_byte.py", "--users", 1, "--seconds", 30, "--seed", 6, "--kill", 0]
    for _ in range(2):
        done = command(*arguments, "--json", out)
        assert done.returncode == 1, done.stdout + done.stderr
        report = json.loads(out.read_text())
        assert report["seconds"] < 30  # long before its time
        found.append(report["failures"])
        arguments = shlex.split(report["replay"])[2:]
    assert "wrong bytes: Step(" in found[0][0]
    assert found[0] == found[1]


def test_users_serve_and_look_into_each_other_and_are_killed() -> None:
    found = stress.run(stress.Options("quick", users=3, seconds=None, ops=1500, seed=2, kill=0.01))
    assert found.ok, "\n".join(found.failures)
    assert {"serve", "served", "show", "stranger"} <= {*found.kinds, *found.skipped}
    assert found.injected["kills"] > 0
    assert set(found.skipped) == (set() if may_open_map_files() else {"stranger"})


@pytest.mark.parametrize("kind", ["served", "stranger"])
def test_a_wrong_byte_between_users_is_found_and_again_by_its_seed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "served":
        monkeypatch.setattr(neighbours, "FLIPPED", workload.FLIPPED.replace(b"\7", b"\6"))
    elif not may_open_map_files():
        pytest.skip("needs a way into another process's frames: CAP_CHECKPOINT_RESTORE")
    else:
        show = neighbours.Neighbours.show

        def show_wrongly(self: Any, seed: int) -> None:
            show(self, seed)
            self._shown[len(self._shown) // 2] ^= 1

        monkeypatch.setattr(neighbours.Neighbours, "show", show_wrongly)
    one, two = (stress.run(stress.Options("quick", users=1, seconds=30.0, seed=6)) for _ in range(2))
    assert f"wrong bytes: Step(kind='{kind}'" in one.failures[0]
    assert one.failures == two.failures
    assert one.seconds < 30  # long before its time


@pytest.mark.parametrize(("began", "byte", "ok"), [(True, 255, True), (True, 254, False), (False, 255, False)])
def test_what_a_server_that_died_has_left_is_verified(
    began: bool, byte: int, ok: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had turned round the first half, or a bit too few."""

    def stress_flip(call: Any, data: Any) -> None:
        with data.mirror() as mirror:
            for at in range(1 + len(mirror) // 2):
                mirror[at] = mirror[at] ^ byte
        raise realmap.ServerDied("stress_flip", os.getpid(), began)

    monkeypatch.setattr(neighbours, "stress_flip", stress_flip)
    found = stress.run(stress.Options("quick", users=1, seconds=None, ops=400, seed=1))
    assert found.ok == ok
    assert (found.injected["servers died"] > 0) == ok  # the first one that is wrong ends the run
    assert all("wrong bytes: Step(kind='served'" in failure and "ended in" in failure for failure in found.failures)


@pytest.mark.parametrize("may", [False, True])
def test_strangers_that_linux_does_not_show_are_skipped_by_name(may: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise realmap.AccessDenied(why="it takes CAP_NOTHING")

    monkeypatch.setattr(neighbours.ForeignProcess, "mirror", refuse)
    monkeypatch.setattr(neighbours, "may_open_map_files", lambda: may)
    found = stress.run(stress.Options("quick", users=1, seconds=None, ops=200, seed=1))
    if may:
        assert "CAP_NOTHING" in found.failures[0]
        return
    assert found.ok, "\n".join(found.failures)
    assert found.skipped == {"stranger": "it takes CAP_NOTHING"}
    assert "stranger" not in found.kinds
    console = Console(file=io.StringIO(), width=200)
    render(console, found)
    assert "stranger: not here: it takes CAP_NOTHING\n" in console.file.getvalue()  # type: ignore[attr-defined]


def test_who_has_ended_shows_nothing() -> None:
    """Others would look for what it has unmapped, until it is reaped."""
    ours, theirs = socket.socketpair()
    board, options = Board(1), stress.Options("quick", users=1)
    with ours, theirs, realmap.boot(syscalls=handlers.ALL) as kernel:
        worker.Worker(theirs, options, kernel.path, board, 0, 0).live(None, 5)
    assert board.shown(0) is None


def test_two_calls_drop_the_mirrors_of_the_dead_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One has lost the loop: while it looks who lives, another one takes a mirror, and keeps one of a new process."""
    kept = {(1, 1): MagicMock(), (2, 1): MagicMock(), (3, 1): MagicMock()}
    dead, taken, new = kept[1, 1], kept[2, 1], MagicMock()
    monkeypatch.setattr(handlers, "_kept", kept)

    me = SimpleNamespace(number=3, pid=3)

    def look() -> list[SimpleNamespace]:
        del kept[2, 1]
        kept[4, 1] = new
        return [me]

    processes = MagicMock(side_effect=look)  # a method, or a list
    processes.__iter__.side_effect = lambda: iter(look())
    call: Any = SimpleNamespace(kernel=SimpleNamespace(processes=processes), process=me)
    handlers.stress_keep(call, 2, MagicMock())
    assert set(kept) == {(3, 1), (3, 2), (4, 1)}
    dead.drop.assert_called_once()
    taken.drop.assert_not_called()
    new.drop.assert_not_called()


def test_what_is_left_over_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from realmap.lab.stress import runner

    monkeypatch.setattr(runner, "PATIENCE", 0.5)

    def stress_end(call: Any) -> None:
        """Drops nothing."""

    rest = [found for found in handlers.ALL if found is not handlers.stress_end]
    with realmap.boot(syscalls=[stress_end, *rest]) as kernel:
        found = stress.run(stress.Options("quick", users=1, seconds=None, ops=20, seed=1, kernel=kernel.path))
        assert found.ok, "\n".join(found.failures)
        with kernel.connect() as me:
            buffer = me.map(4096)
            original = runner.Runner._work

            def work(self: runner.Runner, began: float) -> None:
                original(self, began)
                me.call("stress_keep", 1, buffer)
                buffer.unmap()

            monkeypatch.setattr(runner.Runner, "_work", work)
            found = stress.run(stress.Options("quick", users=1, seconds=None, ops=20, seed=1, kernel=kernel.path))
    assert not found.ok
    assert any("left over in the end: mirrors 1, 0 before" in failure for failure in found.failures)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--full", "--kernel", "x"], "own"),
        long(["--kill", "2"], "kill"),
        (["nothing"], "nothing"),
        long(["--users", "0"], "users"),
        (["--kernel", "/nowhere"], "no kernel listens"),
    ],
)
def test_bad_options(arguments: list[str], words: str) -> None:
    done = command_line("stress", *arguments)
    assert done.returncode
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_disk_takes_no_results_away() -> None:
    done = command("--ops", 20, "--users", 1, "--json", "/dev/full", "--junit", "/dev/full")
    assert done.returncode == 1
    assert "ok: every byte right" in done.stdout
    assert done.stderr == "Error: cannot write /dev/full: No space left on device\n" * 2


def test_a_kernel_without_the_handlers() -> None:
    with realmap.boot() as kernel:
        done = command_line("stress", "--kernel", kernel.path)
        assert done.returncode == 1
        assert "--syscalls realmap.lab.stress.handlers" in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_kernel_of_the_command_line_with_the_handlers(tmp_path: Path) -> None:
    path = str(tmp_path / "k.sock")
    arguments = [sys.executable, "-m", "realmap", "kernel", "--path", path, "--syscalls", "realmap.lab.stress.handlers"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as kernel:
        assert kernel.stdout is not None
        assert "ready" in kernel.stdout.readline()
        assert command("--kernel", path, "--ops", 100, "--users", 2).returncode == 0
        kernel.terminate()
        assert kernel.wait(BOUND) == 0
    for wrong, words in (
        ("nothing_of_the_kind", "cannot import"),
        ("json", "no function"),
        ("a/kern.py", "'kern', not"),
    ):
        done = subprocess.run([*arguments[:-1], wrong], capture_output=True, text=True, timeout=BOUND)
        assert done.returncode == 1
        assert words in done.stderr


def test_ctrl_c_leaves_nothing() -> None:
    arguments = [sys.executable, "-m", "realmap", "stress", "quick", "--seconds", "60"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        import psutil

        wait_until(lambda: len(psutil.Process(running.pid).children(recursive=True)) >= 5, "its users")
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=BOUND)
        assert running.returncode


@pytest.mark.parametrize("threads", [0, 1])
def test_ctrl_c_while_a_user_is_forked(threads: int) -> None:
    """Python swallows what a hook of a fork raises; and another thread takes a signal that this one has masked."""
    program = f"""
import os, signal, threading, time
from realmap.lab import stress
def hook():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)
for _ in range({threads}):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
os.register_at_fork(after_in_parent=hook)
stress.run(stress.Options(mix="quick", users=2, seconds=1000.0, seed=1), print)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=BOUND)
    assert done.returncode == -signal.SIGINT
    assert done.stderr.endswith("KeyboardInterrupt\n")


# ---- the generator ------------------------------------------------------------------------


@pytest.mark.parametrize("mix", sorted(workload.MIXES))
def test_choices_are_valid_and_of_every_kind(mix: str) -> None:
    model, draw, seen = workload.Model(), workload.Seeded(mix, 5), Counter[str]()
    for _ in range(5000):
        step = workload.choose(model, draw, workload.MIXES[mix])
        seen[step.kind] += 1
        if step.kind.startswith("map"):
            assert 0 < step.length <= workload.MIXES[mix].longest
        elif step.key:
            content = model.buffers[step.key]
            assert 0 <= step.offset <= step.offset + step.length <= len(content.data)
            assert content.writable or step.kind not in ("write", "fill", "reverse", "served")
            assert not (content.kept and step.kind in ("write", "fill", "reverse", "served", "unmap", "forget"))
        model.apply(step)
    assert set(seen) == set(workload.MIXES[mix].weights)


def test_patterns_differ_by_seed_and_page() -> None:
    data = workload.pattern(1, 1 << 16)
    assert len(data) == 1 << 16
    assert len({data[at : at + 4096] for at in range(0, 1 << 16, 4096)}) == 16
    assert data[:100] != workload.pattern(2, 100)
    assert workload.pattern(7, 1) == workload.pattern(7, 5)[:1]


def test_percentiles_and_slopes() -> None:
    buckets = Counter(report.bucket(nanoseconds) for nanoseconds in range(1000, 2_000_000, 1000))
    assert report.percentile(buckets, 0.5) == pytest.approx(1e-3, rel=0.011)
    assert report.percentile(buckets, 0.99) == pytest.approx(1.98e-3, rel=0.011)
    flat = report.slope([(at, 5.0 + at % 2) for at in range(100)])
    assert not flat.rises
    steep = report.slope([(at, 5.0 + 3 * at + at % 2) for at in range(100)])
    assert steep.rises
    assert steep.per_second == pytest.approx(3, rel=0.01)
    assert steep.grows("maps")
    assert not flat.grows("maps")
    assert not report.slope([(at, 500.0 + at) for at in range(100)]).grows("maps")  # that many more users, say


def test_each_slope_ends_in_a_verdict() -> None:
    steady = report.Slope(10 << 10, 1 << 10, 20 << 20, 21 << 20)
    steep = report.Slope(10 << 20, 1 << 10, 20 << 20, 60 << 20)
    assert steady.in_words("rss") == (
        "the kernel's memory does not grow: 20480 → 21504 KiB over the second half of the run, "
        "+10 KiB a second (± 1); growth is more than 16384 KiB"
    )
    assert steep.in_words("rss").startswith("the kernel's memory grows: 20480 → 61440 KiB over")
    many = report.Slope(50.0, 1.0, 10.0, 510.0)
    assert many.in_words("threads") == (
        "the kernel's number of threads grows: 10 → 510 over the second half of the run, "
        "+50 a second (± 1); growth is more than 102"
    )
    noisy = report.Slope(1234.0, 99.96, 10.0, 20.0)
    assert "+1230 a second (± 100); growth" in noisy.in_words("maps")
    console = Console(file=io.StringIO(), width=200)
    found = report.Report(
        report.FORM, "0", report.Options(), "replay", 1.0, {}, 1, 1, {}, 0, {"rss": steady, "threads": many}, 0, [], []
    )
    render(console, found)
    said = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line[:2] for line in said if "the kernel's" in line] == ["ok", "no"]


@pytest.mark.slow
def test_a_long_storm_with_everything() -> None:
    done = command("storm", "--seconds", scaled(600), "--kill", 0.02, "--truncate", 0.01, "--seed", 1)
    assert done.returncode == 0, done.stdout + done.stderr
