"""The bench: its arithmetic, its programs, its command."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from command_line import command_line
from conftest import BOUND, PAGE, long, wait_until
from rich.console import Console

from realmap.cli.bench import bench as command
from realmap.cli.bench import render
from realmap.lab import bench
from realmap.lab.bench import machine, make, many, programs
from realmap.lab.bench.access import SIZES, WAYS, sentence
from realmap.lab.bench.measure import Absent, Contender, Plan, Race, spread
from realmap.lab.bench.programs import Program
from realmap.lab.bench.report import FORM, Reached, Report, Spread
from realmap.system import boot

SHORT = Plan(rounds=3, batch_ns=200_000, race_seconds=0.2, least_rounds=3)
#: What each program is asked in the bench.
WORKS = ("none", "touch", "read", "write")
ASKED = {
    "floor": [
        *(f"map {size} 3 {work} {how}" for size in (64, 1 << 20) for work in WORKS for how in ("plain", "populate")),
        *(f"{way} 65536 3 {work}" for way in ("own", "pread", "readv", "pipe") for work in WORKS),
        "spin 100 0", "socket 100 0", "make 4096 3", "make_commit 4096 3", "null 10",
    ],
    "drop_in": ["make 4096 3", "make_touched 5000 3", "attach 4096 3"],
    "shared_memory": [
        "make 4096 3", "make_touched 5000 3", "attach 4096 3", "handover 1048576 2 attach", "handover 1048576 2 keep",
    ],
    "posix_ipc": ["make 4096 3", "attach 4096 3", "handover 1048576 2 attach", "handover 1048576 2 keep"],
    "asyncio": ["call 3", "hundred 150"],
    "pipe": [
        "call 10 0", "bytes 64 10 0", "handover 1048576 2", *(f"access 4096 3 {work}" for work in WORKS),
    ],
    "seqpacket": ["call 10 0"],
    "vm_readv": [f"access 4096 3 {work}" for work in WORKS],
}  # fmt: skip


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quick run in this process only sees that all is there: few rounds, one size."""
    monkeypatch.setattr(importlib.import_module("realmap.lab.bench.run"), "QUICK", SHORT)
    monkeypatch.setattr(make, "QUICK_SIZES", make.QUICK_SIZES[:1])


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "realmap", "bench", *arguments], capture_output=True, text=True, timeout=4 * BOUND
    )


# ---- arithmetic ---------------------------------------------------------------------------


def test_medians_and_percentiles() -> None:
    assert spread([5.0]) == Spread(5, 5, 5)
    assert spread([float(number) for number in range(11)]) == Spread(5, 1, 9)


def test_a_race_is_interleaved_and_compares_round_by_round() -> None:
    order: list[str] = []

    def batch(name: str, each: float) -> bench.measure.Batch:
        def run(count: int) -> int:
            order.append(name)
            return int(count * each)

        return run

    def gone(count: int) -> int:
        raise Absent("not installed")

    contenders = [
        Contender("floor", batch("floor", 1000)),
        Contender("a", batch("a", 3000), "floor"),
        Contender("absent", gone, "floor"),
        Contender("b", batch("b", 500), "absent"),
    ]
    race = Race(contenders, SHORT)
    assert [(each.what, each.why) for each in race.missing] == [("absent", "not installed")]
    rounds = order[-20:]  # each batch is run to warm up, and then for its time
    assert rounds == ["floor", "floor", "a", "a", "b", "b"] * 3 + ["floor", "floor"]
    floor, a, b = race.figures("group", 64, "read")
    assert (floor.time.median, a.time.median, b.time.median) == (1000, 3000, 500)
    assert a.ratio == Spread(3, 3, 3)
    assert (a.floor, b.floor, b.ratio, a.unsteady) == ("floor", None, None, False)
    assert a.rounds == 3
    assert a.count == SHORT.batch_ns // 3000


def test_a_contender_that_dies_during_a_race_is_left_out() -> None:
    calls = [0]

    def dies(count: int) -> int:
        calls[0] += 1
        if calls[0] > 6:
            raise Absent("it ended")
        return count * 100_000

    race = Race([Contender("well", lambda count: count * 1000), Contender("dies", dies, "well")], SHORT)
    assert "dies" not in race
    assert [missing.what for missing in race.missing] == ["dies"]
    assert race.time("well").median == 1000


def test_limits_are_met_or_not() -> None:
    ratio = Spread(1.5, 1.0, 2.0)
    assert Reached("x", 1.6, ratio).met is True
    assert Reached("x", 1.4, ratio).met is False
    assert Reached("x", 1.6, None, why="left out").met is None


@pytest.mark.parametrize(("load", "doubts"), [(1000.0, 1), (0.0, 0)])
def test_a_loaded_machine_is_a_doubt(load: float, doubts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    found = [doubt for doubt in machine.Disturbance().doubts() if "load" in doubt]
    assert len(found) == doubts
    assert all("1000.0" in doubt for doubt in found)


def test_the_sentence_for_the_reader() -> None:
    winners = {"touch": [(64, "A"), (4096, "A"), (1 << 20, "B")], "read": [(64, "A"), (4096, "B"), (1 << 20, "C")]}
    assert sentence(winners) == (
        "On this machine: to touch a little, take A up to 4 KiB, B beyond; to read all, take A up to 64 B, "
        "B up to 4 KiB, C beyond."
    )
    assert sentence({"write": [(64, "A")]}) == "On this machine: to write all, take A."
    assert (SIZES[0], SIZES[-1]) == (64, 256 << 20)


# ---- programs -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ASKED)
def test_the_floor_and_the_peers_do_what_the_bench_asks(name: str) -> None:
    with contextlib.closing(programs.floor() if name == "floor" else programs.peer(name)) as program:
        for line in ASKED[name]:
            assert program.ask(*line.split()) > 0, line
        with pytest.raises(Absent):
            program.ask("nonsense", 1)
        assert program.ask(*ASKED[name][0].split()) > 0, "a request that it does not know does not end it"
        assert program._process is not None
        pid = program._process.pid
    assert not [left for left in os.listdir("/dev/shm") if left.startswith(f"realmap-bench-{pid}-")]


def test_a_program_that_is_not_there_or_dies_is_absent() -> None:
    for program in (
        Program(["/nonexistent/program"]),
        Program([sys.executable, "-c", "pass"]),
        Program(None, "because"),
    ):
        with pytest.raises(Absent):
            program.ask("call", 1)
        program.close()
        with pytest.raises(Absent):
            program.ask("call", 1)


@pytest.mark.usefixtures("short")
def test_without_a_checkout_nothing_is_said_of_what_is_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(programs, "TOOLS", tmp_path / "none")
    monkeypatch.setattr(many, "CROWDS", (1, 2))
    report = bench.run(["make", "attach", "many"], quick=True)
    assert (report.missing, report.reach) == ([], [])
    assert {(figure.name, figure.ratio) for figure in report.figures} == {
        ("map + unmap", None), ("map + unmap, commit=False", None), ("attach + unmap", None),
        ("1 process, call", None), ("2 processes, call", None), ("a process", None),
    }  # fmt: skip
    for terminal in (False, True):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
        render(console, report)
        said = console.file.getvalue()  # type: ignore[attr-defined]
        assert "map + unmap, commit=False" in said
        for word in ("floor", "left out", "holds itself"):
            assert word not in said, word
        for word in ("peer", "checkout"):
            assert word not in said + str(command.help), word
    assert all(re.search(rf"\b{group}\b", str(command.help)) for group in bench.GROUPS)


@pytest.mark.usefixtures("short")
def test_in_a_checkout_it_is_held_to_limits() -> None:
    report = bench.run(["attach"], quick=True)
    assert {figure.size for figure in report.figures} == {PAGE, 1 << 20}
    by_name, by_handle = report.reach
    assert by_name.what == "attach by name + close, 4 KiB / SharedMemory"
    assert by_handle.what == "attach(handle) + unmap, 4 KiB / SharedMemory(name) + close"
    for reached in (by_name, by_handle):
        assert reached.found and reached.ours and reached.theirs
        assert reached.found.median == reached.ours / reached.theirs


def test_without_a_compiler_there_is_no_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(Absent, match="compiler"):
        programs.floor().ask("null", 10)


@pytest.mark.parametrize("server", [None, "seqpacket", "pyzmq"])
def test_a_crowd_calls_and_is_gone_afterwards(server: str | None) -> None:
    if server == "pyzmq":
        pytest.importorskip("zmq")
    with boot(syscalls=[many.bench_nop]) as kernel:
        with contextlib.closing(programs.crowd(3, kernel.path, server)) as crowd:
            assert crowd.ask("all", 30) > 0
            assert 0 <= crowd.ask("share", 1000) <= 1000
            assert kernel.stats()["processes"] == (0 if server else 3)
            assert crowd._process is not None
            pid = crowd._process.pid
            members = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            assert len(members) == (4 if server else 3)
        wait_until(lambda: not any(Path(f"/proc/{member}").exists() for member in members), "the end of the crowd")


def test_a_crowd_that_loses_a_member_is_absent() -> None:
    with contextlib.closing(programs.crowd(2, "", "seqpacket")) as crowd:
        assert crowd.ask("all", 10) > 0
        assert crowd._process is not None
        pid = crowd._process.pid
        os.kill(int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[-1]), 9)
        with pytest.raises(Absent, match="it ended"):
            crowd.ask("all", 10)


def test_a_crowd_without_its_package_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "peers").mkdir()
    (tmp_path / "peers" / "crowd_other.py").write_text("import no_such_package")
    monkeypatch.setattr(programs, "TOOLS", tmp_path)
    with contextlib.closing(programs.crowd(2, "", "other")) as crowd:
        with pytest.raises(Absent, match="no_such_package is not installed"):
            crowd.ask("all", 10)


def test_unknown_groups() -> None:
    with pytest.raises(ValueError, match="access, call, many, make, attach, touch, handover, scale"):
        bench.run(["speed"])


# ---- the command --------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_measures_and_writes_what_it_found(tmp_path: Path) -> None:
    target = tmp_path / "found.json"
    done = run("--quick", "make", "call", "--json", str(target))
    assert (done.returncode, done.stderr) == (0, "")
    report = msgspec.json.decode(target.read_bytes(), type=Report)
    assert (report.form, report.quick, report.groups) == (FORM, True, ["call", "make"])
    by_name = {(figure.group, figure.size, figure.work, figure.name): figure for figure in report.figures}
    ours = by_name["make", PAGE, None, "map + unmap"]
    assert ours.time.p10 <= ours.time.median <= ours.time.p90
    assert ours.ratio is not None
    assert ours.floor == "C with posix_fallocate"
    assert by_name["call", None, "not pinned", "call"].time.median > 0
    assert {reached.what.split(" /")[0] for reached in report.reach} >= {"call, spinning", "map + unmap 4 KiB"}
    assert {"cpu", "cpus", "linux", "python", "shmem_huge"} <= set(report.machine)
    assert "map + unmap" in done.stdout
    assert "what the project holds itself to" in done.stdout
    for missing in report.missing:
        assert f"left out: {missing.what}: {missing.why}" in done.stdout


@pytest.mark.slow
def test_all_of_it_in_short(tmp_path: Path) -> None:
    """Every group, with the picture; under a minute on a quiet machine, which is not asserted."""
    picture, target = tmp_path / "curves.svg", tmp_path / "found.json"
    done = run("--quick", "--plot", str(picture), "--json", str(target))
    assert (done.returncode, done.stderr) == (0, "")
    panels = re.split('<g id="axes_', picture.read_text())[1:]
    # Copies of the words are in the first only; each way has the same colour in all.
    assert [[color in panel for color in ("#9467bd", "#8c564b", "#e377c2")] for panel in panels] == [
        [True, True, True],
        [True, False, True],
        [True, False, True],
    ]
    report = msgspec.json.decode(target.read_bytes(), type=Report)
    assert {figure.group for figure in report.figures} == set(bench.GROUPS)
    assert {way.name for way in WAYS} <= {figure.name for figure in report.figures} | {
        missing.what for missing in report.missing
    }
    assert report.sentences[0].startswith("On this machine: to touch a little, take ")
    assert re.search(r"^On this machine: to touch a little", done.stdout, re.M)
    # Each limit belongs to a race, and to contenders that were in it, but for who was left out.
    assert {reached.what for reached in report.reach} == {limit.what for limit in programs.limits()}
    away = {f"{missing.what} was left out" for missing in report.missing}
    assert {reached.why for reached in report.reach} <= {"", *away}
    for figure in report.figures:
        assert 0 < figure.time.p10 <= figure.time.median or figure.unit == "", figure
    assert {f"{size}{way}" for size in ("1 process", "8 processes") for way in (", call", ", bare SEQPACKET")} <= {
        figure.name for figure in report.figures if figure.group == "many"
    }
    assert {figure.name for figure in report.figures if figure.group == "touch"} == {
        f"{memory}{way}" for memory in ("bytearray", "Buffer") for way in ("[0]", "[0] = 1", "[8:24]")
    }


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["speed"], 2, "speed"),
        (["make", "--json", "/nonexistent/folder/file"], 1, "cannot write /nonexistent/folder/file"),
        long(["make", "--json", "/"], 1, "cannot write /"),
        (["--plot", "curves.pdf"], 1, ".png or an .svg"),
        (["make", "--plot", "curves.svg"], 1, "add access"),
        long(["--plot", "/nonexistent/folder/file.svg"], 1, "cannot write"),
    ],
)
def test_bad_arguments_are_told_before_the_run(
    arguments: list[str], status: int, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    done = command_line("bench", *arguments)
    assert done.returncode == status
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert os.listdir(tmp_path) == [], "the file that will not be written is not left behind"


def test_an_output_file_that_is_there_is_left_as_it_is_until_the_end(tmp_path: Path) -> None:
    target = tmp_path / "found.json"
    target.write_text("before")
    assert command_line("bench", "make", "--json", target, "--plot", "x.svg").returncode == 1
    assert target.read_text() == "before"


def test_a_full_disk_takes_no_results_away(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Report(FORM, "0", ["make"], True, machine.facts(), sentences=["what was found"])
    monkeypatch.setattr(bench, "run", lambda *_, **__: found)
    done = command_line("bench", "--json", "/dev/full")
    assert done.returncode == 1
    assert "what was found" in done.stdout
    assert done.stderr == "Error: cannot write /dev/full: No space left on device\n"


def test_a_bench_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "realmap", "bench", "call", "scale"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    started = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_until(lambda: len(started.read_text().split()) >= 4, "the start of its programs")
    below = [int(pid) for pid in started.read_text().split()]
    process.send_signal(2)
    process.communicate(timeout=BOUND)
    assert process.returncode != 0
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below), "the end of what it started")
