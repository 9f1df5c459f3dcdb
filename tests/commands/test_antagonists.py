"""`realmap stress --antagonists`: each is at work or says why not, ends nothing where it fails, restores everything."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import command_line
from conftest import BOUND, long, wait_until

from realmap.host import cgroups, paging
from realmap.lab import stress
from realmap.lab.stress.antagonists import ALL, crew, machine, pages, processes
from realmap.lab.stress.antagonists.antagonist import Target
from realmap.lab.stress.board import Board
from realmap.lab.stress.report import Antagonism

KSM = machine.KSM / "run"
WORDS = ["stress", "quick", "--users", "2", "--seed", "3"]
COMMAND = [sys.executable, "-W", "error", "-m", "realmap", *WORDS]


def run(*names: str, seconds: float = 1.0, seed: int = 1) -> stress.Report:
    return stress.run(stress.Options("quick", users=2, seconds=seconds, seed=seed, antagonists=names))


def groups() -> list[Path]:
    """Memory cgroups of this process's runs."""
    levels = [level for place in cgroups.places() for level in place.levels if level.exists()]
    return [path for level in levels for path in level.glob("realmap-*") if f".{os.getpid()}." in path.name]


def settings() -> dict[str, str]:
    """Of KSM, which are the whole machine's."""
    return {name: (KSM.parent / name).read_text() for name in machine.Ksm.FASTER}


@pytest.fixture
def ksm() -> dict[str, str]:
    """How it is set, while no other run uses it."""
    target: Any = None
    one = machine.Ksm(target)
    try:
        if (why := one.available()) is not None:
            pytest.skip(why)
    finally:
        one.close()
    return settings()


def at_work(found: Antagonism) -> bool:
    return bool(found.count and found.why is None) or (found.why or "").startswith("not here: ")


def test_all_at_once() -> None:
    found = run("all", seconds=5.0)
    assert found.ok, "\n".join(found.failures)
    assert list(found.antagonists) == list(ALL)
    assert set(found.slopes) == {"rss", "maps", "descriptors", "threads"}
    assert [name for name, each in found.antagonists.items() if not at_work(each)] == []
    if os.geteuid() == 0:
        assert sum(each.count > 0 for each in found.antagonists.values()) >= 8
    assert groups() == []
    assert found.replay.endswith("--antagonists all")


@pytest.mark.parametrize("name", [long(name) for name in ALL])
def test_each_alone(name: str) -> None:
    found = run(name, seconds=5.0)
    assert found.ok, "\n".join(found.failures)
    assert list(found.antagonists) == [name]
    assert at_work(found.antagonists[name])


def test_the_report_says_how_often_and_why_not(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    arguments = ["--seconds", "1", "--antagonists", "holes,numa", "--json", str(out)]
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=BOUND)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())["antagonists"]
    assert list(found) == ["holes", "numa"]
    assert found["holes"]["count"] > 0
    assert found["holes"]["why"] is None
    assert f"antagonist holes: {found['holes']['count']} times" in done.stdout
    if found["numa"]["why"]:
        assert "one NUMA node only: boot Linux with numa=fake=2" in done.stdout


def test_an_unknown_name() -> None:
    done = command_line(*WORDS, "--antagonists", "holes,nobody")
    assert done.returncode == 2
    assert "no antagonist is called 'nobody': there are all, collapse, pageout" in done.stderr


def test_what_is_not_allowed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> int:
        raise PermissionError("no")

    monkeypatch.setattr(paging, "advise_process", refused)
    monkeypatch.setattr(cgroups, "places", lambda: [])
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != machine.COMPACT and access(path, mode))
    monkeypatch.setattr(machine, "KSM", Path("/nowhere"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    found = run("pageout", "compaction", "reclaim", "oom", "ksm", "affinity")
    assert found.ok, "\n".join(found.failures)
    words = {name: each.why or "" for name, each in found.antagonists.items()}
    assert all(why.startswith("not here: ") for why in words.values()), words
    assert "CAP_SYS_NICE" in words["pageout"]
    assert "be root" in words["compaction"]
    assert "CONFIG_KSM" in words["ksm"]
    assert "one CPU only" in words["affinity"]
    assert "no memory cgroup" in words["oom"]
    assert "no memory cgroup" in words["reclaim"]


def test_one_that_fails_midway_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, rng: object) -> bool:
        raise RuntimeError("enough")

    monkeypatch.setattr(processes.Signals, "step", fail)
    found = run("signals", "holes")
    assert found.ok, "\n".join(found.failures)
    assert found.antagonists["holes"].count > 0
    assert found.antagonists["signals"].count == 0
    assert (found.antagonists["signals"].why or "").startswith(
        "ended midway: RuntimeError: enough (test_antagonists.py:"
    )


def test_one_that_cannot_be_forked_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fork() -> int:
        raise BlockingIOError(errno.EAGAIN, "no more processes")

    monkeypatch.setattr(crew, "forks", SimpleNamespace(fork=fork))
    found = run("stops", seconds=0.2)
    assert found.ok, "\n".join(found.failures)
    assert found.antagonists["stops"].why == "not here: no more processes"


@pytest.mark.alone
def test_one_that_is_killed_midway_leaves_no_setting(ksm: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.Ksm, "step", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    monkeypatch.setattr(machine.Reclaim, "step", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    found = run("ksm", "reclaim")
    assert found.ok, "\n".join(found.failures)
    ksms, reclaims = (found.antagonists[name].why or "" for name in ("ksm", "reclaim"))
    if "another run" in ksms:
        pytest.skip(ksms)
    assert ksms == "ended midway: it died (SIGKILL)"
    assert "not here" in reclaims or "SIGKILL" in reclaims
    assert settings() == ksm
    assert groups() == []


@pytest.mark.alone
def test_a_runner_that_is_killed_leaves_no_setting(ksm: dict[str, str]) -> None:
    arguments = ["--seconds", "60", "--antagonists", "ksm"]
    with subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.DEVNULL) as running:
        wait_until(lambda: settings() != ksm, "KSM")
        running.kill()
    wait_until(lambda: settings() == ksm, "its end")


@pytest.mark.alone
@pytest.mark.usefixtures("ksm")
def test_two_runs_do_not_take_each_others_settings_for_what_was_before() -> None:
    target: Any = None
    one, two = machine.Ksm(target), machine.Ksm(target)
    try:
        assert one.available() is None
        assert two.available() == "another run uses KSM now: wait for its end"
    finally:
        two.close()
        one.close()


def test_a_user_that_has_just_ended_is_nothing_to_work_on() -> None:
    """Before it is reaped it is still held; then it may be gone in the midst of a step."""
    board = Board(1)
    child = os.fork()
    if not child:
        board.enter(0)
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    rng = random.Random(1)
    target = Target("", os.getpid(), False, board)
    for kind in (processes.Affinity, processes.Stops, processes.Signals, processes.Limits):
        kind(target).step(rng)
    assert not machine.Numa(target).step(rng)
    with board.held(rng) as held:
        assert held is not None
        assert held.pid == child
        board.leave(0)
        os.waitpid(child, 0)
        assert not pages.PageOut(target)._advise(held.pidfd, child, 0, 1 << 47, paging.MADV_COLD, rng)
    with board.held(rng) as held:
        assert held is None


def test_its_own_wrong_bytes_fail_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages.paging, "advise", lambda *_: None)  # no hole, then
    found = run("holes", seconds=30.0)
    assert len(found.failures) == 1
    assert found.failures[0].startswith("antagonist holes: wrong bytes after a hole: ")
    assert found.seconds < 30


def test_they_follow_the_seed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def note(self: object, rng: Any) -> bool:
        with open(tmp_path / "drawn", "a") as file:
            print(rng.random(), file=file)
        return True

    monkeypatch.setattr(processes.Signals, "step", note)
    drawn = []
    for seed in (5, 5, 6):
        while not (tmp_path / "drawn").exists() or (tmp_path / "drawn").read_text().count("\n") < 3:
            (tmp_path / "drawn").unlink(missing_ok=True)
            assert run("signals", seed=seed).ok
        drawn.append((tmp_path / "drawn").read_text().splitlines()[:3])
        (tmp_path / "drawn").unlink()
    assert len(drawn[0]) == 3
    assert drawn[0] == drawn[1] != drawn[2]
