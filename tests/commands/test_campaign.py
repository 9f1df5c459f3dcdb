"""`realmap campaign` on this machine, and what `realmap campaign compare` claims."""

from __future__ import annotations

import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import psutil
import pytest
from command_line import command_line
from conftest import BOUND, long, wait_until
from rich.console import Console
from terminal import on_a_terminal

from realmap.cli.campaign import render
from realmap.lab.bench import machine
from realmap.lab.campaign.compare import PACE, Unlike, compare, load
from realmap.lab.campaign.page import page
from realmap.lab.campaign.plan import Plan
from realmap.lab.campaign.report import FORM, LOST, Host, Report, junit
from realmap.lab.campaign.run import Campaign
from realmap.lab.campaign.work import Lost, Outcome, _listen
from realmap.lab.stress.report import bucket, kind_of


def arguments(*given: object) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "realmap", "campaign", *map(str, given)]


def command(*given: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments(*given), capture_output=True, text=True, timeout=2 * BOUND)


def test_a_campaign_here(tmp_path: Path) -> None:
    out, xml, html = tmp_path / "c.json", tmp_path / "c.xml", tmp_path / "c.html"
    given = ("stress", "storm", "--ops", 60, "--users", 2, "--kill", 0.05, "--local", 2, "--repeat", 2, "--seed", 7)
    done = command(*given, "--json", out, "--junit", xml, "--html", html)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["ok"]
    reports = [report for host in found["hosts"] for report in (*host["earlier"], host["report"])]
    assert len(reports) == 4
    assert len({report["options"]["seed"] for report in reports}) == 4
    assert all(report["options"]["kill"] == 0.05 for report in reports)  # as given; the rest as the mix has it
    assert all(report["options"]["truncate"] == 0.01 for report in reports)
    for name, kind in found["kinds"].items():
        assert kind["count"] == sum(report["kinds"][name]["count"] for report in reports if name in report["kinds"])
    assert (ElementTree.parse(xml).getroot().get("failures"), len(ElementTree.parse(xml).getroot())) == ("0", 2)
    text = html.read_text()
    assert text.count("data:image/svg+xml;base64,") == 2
    for host in found["hosts"]:
        assert f"<td>{sum(run['bytes_verified'] for run in (*host['earlier'], host['report'])):,}</td>" in text
    whole = msgspec.convert(found, Report, strict=False)
    whole.hosts.append(Host("elsewhere", LOST))
    whole.hosts[0].report |= {
        "antagonists": {"ksm": {"count": 2000, "why": None}, "numa": {"count": 0, "why": "one node"}},
        "slopes": {"rss": {"per_second": 0.0, "error": 0.1, "first": 2048, "last": 1024}},
    }
    for host in whole.hosts[:2]:
        host.report["kinds"] = {}  # and no pictures: matplotlib would keep its fonts open in this process
    drawn = page(whole).decode()
    assert "<td>antagonist ksm</td><td>2,000</td><td></td><td></td>" in drawn
    assert "<td>0 (one node)</td>" in drawn
    assert "the kernel's memory does not grow: 2 → 1 KiB" in drawn
    assert not re.search(r"(src|href)=.(?!data:)", text)
    assert "2 of 2 hosts are ok" in done.stdout
    for report in reports:
        assert report["replay"].split(" --")[0] == "realmap stress storm"
        assert f"realmap stress storm --ops 60 --users 2 --kill 0.05 --seed {report['options']['seed']}" in done.stderr


def test_a_campaign_of_a_bench(tmp_path: Path) -> None:
    out, html = tmp_path / "c.json", tmp_path / "c.html"
    done = command("bench", "--quick", "touch", "--json", out, "--html", html)
    assert done.returncode == 0, done.stdout + done.stderr
    (host,) = json.loads(out.read_text())["hosts"]
    assert host["report"]["quick"]
    assert {figure["group"] for figure in host["report"]["figures"]} == {"touch"}
    assert host["replay"] == "realmap bench touch --quick"
    assert "touch: what one takes" in html.read_text()


def test_how_it_goes_is_shown_on_a_terminal() -> None:
    shown = on_a_terminal(["campaign", "stress", "--seconds", "2", "--users", "1"], {})
    assert re.search(r"\d steps \(\d+/s\)", shown)
    assert "1 of 1 hosts are ok" in shown


def test_hours_end_a_campaign_and_the_last_run_is_finished(tmp_path: Path) -> None:
    out = tmp_path / "c.json"
    done = command("stress", "--ops", 20, "--users", 1, "--hours", 1 / 3600, "--json", out)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["seconds"] >= 1
    assert found["hosts"][0]["report"]["steps"] >= 20


def test_a_run_that_is_refused_says_why_and_how_to_replay_it(tmp_path: Path) -> None:
    html = tmp_path / "c.html"
    done = command("stress", "--ops", 1, "--users", 4, "--repeat", 3, "--local", 2, "--html", html)
    assert done.returncode == 1
    assert "0 of 2 hosts are ok" in done.stdout
    assert "1 steps are not enough for 4 users" in done.stdout
    assert len(re.findall(r"replay on \S+: realmap stress --ops 1 --users 4 --seed \d+", done.stdout)) == 2
    assert done.stderr.count(": realmap stress") == 2  # who failed does not go on
    assert html.read_text().count("1 steps are not enough for 4 users") == 2


def test_a_run_that_is_killed_is_lost_and_the_others_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "c.json"
    given = ("stress", "--seconds", 3, "--users", 1, "--local", 2, "--json", out)
    with subprocess.Popen(arguments(*given), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        children = children_of(running, 2)
        children[0].kill()
        assert running.wait(BOUND) == 1
    states = [(host["state"], host["why"]) for host in json.loads(out.read_text())["hosts"]]
    assert sorted(states) == [("lost", "its run was killed (SIGKILL)"), ("ok", "")]


def test_the_last_line_of_a_run_is_its_last_however_late_it_is_looked_for() -> None:
    read, write = os.pipe()
    lines = [b"first\nlast\n"]

    class Ended:
        """It says its last line just before it is looked whether it has ended; a child that it left has its stderr."""

        stderr = open(read, "rb")

        def poll(self) -> int:
            if lines:
                os.write(write, lines.pop())
            return 1

    with Ended.stderr:
        assert _listen(Ended(), lambda _: None) == "last"  # type: ignore[arg-type]
    os.close(write)


def test_ctrl_c_keeps_what_was_found(tmp_path: Path) -> None:
    out = tmp_path / "c.json"
    given = ("stress", "--ops", 20, "--users", 1, "--repeat", 10_000, "--json", out)
    with subprocess.Popen(arguments(*given), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        for _ in range(3):  # a third run begins: two are done
            assert "realmap stress" in running.stderr.readline()
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=BOUND)
        assert running.returncode == 1
    (host,) = json.loads(out.read_text())["hosts"]
    assert (host["state"], host["why"]) == ("lost", "the campaign was interrupted")
    assert len(host["earlier"]) >= 2


def children_of(process: subprocess.Popen[Any], count: int) -> list[psutil.Process]:
    found: list[psutil.Process] = []

    def there() -> bool:
        found[:] = psutil.Process(process.pid).children()
        return len(found) == count and all(child.children() for child in found)

    wait_until(there, "the runs")
    return found


def test_a_full_disk_takes_no_results_away() -> None:
    done = command("stress", "--ops", 20, "--users", 1, "--json", "/dev/full", "--junit", "/dev/full")
    assert done.returncode == 1
    assert done.stderr.count("cannot write /dev/full: No space left on device") == 2
    printed = json.JSONDecoder().raw_decode(done.stdout)[0]
    assert printed["hosts"][0]["report"]["steps"] >= 20


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["stress", "--json", "/nowhere/x"], "cannot write /nowhere/x"),
        (["stress", "--local", "2", "--scheduler", "tcp://x:1"], "give one of them"),
        (["stress", "--kernel", "x"], "No such option"),
        (["bench", "nothing"], "nothing"),
        (["compare", "a", "/nowhere"], "does not exist"),
    ],
)
def test_bad_options(given: list[str], words: str) -> None:
    done = command_line("campaign", *given)
    assert done.returncode
    assert words in done.stderr
    assert "Traceback" not in done.stderr


# ---- what all hosts give together ------------------------------------------------------------------------------------


class Fake:
    """Hosts that answer from a table: an outcome, or who is lost."""

    notes = ("", "", "")

    def __init__(self, *answers: Outcome | Lost) -> None:
        self.hosts = [f"host{number}" for number in range(len(answers))]
        self._answers = answers

    def run(self, host: int, arguments: list[str], tell: Callable[[str], None]) -> Outcome:
        answer = self._answers[host]
        if isinstance(answer, Lost):
            raise answer
        return answer

    def stop(self) -> None:
        pass


def stress_report(times: list[int], failures: tuple[str, ...] = ()) -> bytes:
    buckets: dict[int, int] = {}
    for time in times:
        buckets[bucket(time)] = buckets.get(bucket(time), 0) + 1
    kind = kind_of(buckets, 2.0, max(times) / 1e9)
    return msgspec.json.encode({"kinds": {"map": kind}, "seconds": 2.0, "failures": failures})


def test_percentiles_are_of_all_hosts_together_and_no_means() -> None:
    few, many = [10_000_000] * 10, [1_000] * 990
    hosts = Fake(*(Outcome(0, stress_report(times), "", {}) for times in (few, many)))
    done = Campaign(Plan("stress", []), hosts, print).run()
    assert done.ok
    kind = done.kinds["map"]
    assert kind.count == 1000
    assert kind.per_second == 500
    assert kind.p50 == pytest.approx(1e-6, rel=0.011)
    assert kind.p99 == pytest.approx(1e-6, rel=0.011)  # a mean of both would be 5 ms
    assert kind.longest == 0.01


def test_who_failed_and_who_is_lost() -> None:
    failed = Outcome(1, stress_report([1000], ("wrong bytes: 1",)), "", {})
    hosts = Fake(failed, Lost("gone"), Outcome(0, stress_report([1000]), "", {"linux": "6.1"}))
    done = Campaign(Plan("stress", ["soak"], seed=5, repeat=3), hosts, lambda *said: None).run()
    assert not done.ok
    assert [(host.state, host.why, len(host.reports)) for host in done.hosts] == [
        ("failed", "wrong bytes: 1", 1),
        ("lost", "gone", 0),
        ("ok", "", 3),
    ]
    console = Console(file=io.StringIO(), width=200)
    render(console, done)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"replay on host0: {done.hosts[0].replay}" in said
    assert re.search(r"replay on host1: realmap stress soak --seed \d+", said)
    suite = ElementTree.fromstring(junit(done))
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("3", "1", "1")
    assert suite[0][0].text == done.hosts[0].replay


def test_seeds_follow_the_plan() -> None:
    plan = Plan("stress", [], seed=5)
    seeds = {tuple(plan.arguments_of(host, turn)) for host in range(10) for turn in range(10)}
    assert len(seeds) == 100
    assert plan.arguments_of(3, 4) == Plan("stress", [], seed=5).arguments_of(3, 4)
    assert plan.arguments_of(3, 4) != Plan("stress", [], seed=6).arguments_of(3, 4)
    assert Plan("bench", ["call"]).arguments_of(3, 4) == ["bench", "call"]


# ---- comparing -------------------------------------------------------------------------------------------------------

NAMES = ["C map plain", "C pread", "C readv", "mirror", "mirror populated", "copy"]


def bench_campaign(seed: int, runs: int = 8, slower: float = 1.0, pace: float = 1.0, linux: str = "6.1") -> Report:
    """What a machine with 3 % of noise of its own, and 2 % a kind, would give; its mirror so much slower."""
    draw = random.Random(seed)
    reports = []
    for _ in range(runs):
        drift = pace * math.exp(draw.gauss(0, 0.03))
        times = {name: 10_000 * drift * math.exp(draw.gauss(0, 0.02)) for name in NAMES}
        times["mirror"] *= slower
        reports.append(
            {
                "figures": [
                    {"group": "access", "name": name, "size": 4096, "work": None, "unit": "ns", "time": {"p10": time}}
                    for name, time in times.items()
                ]
            }
        )
    host = Host("h", machine={"linux": linux, "load": draw.random()}, report=reports[-1], earlier=reports[:-1])
    return Report(FORM, "0", Plan("bench", ["access"]), True, 1.0, [host])


@pytest.mark.parametrize("trials", [3, long(20)])
def test_no_difference_is_claimed_where_there_is_none_and_a_slow_mirror_is(trials: int) -> None:
    pairs = [(bench_campaign(2 * seed), 2 * seed + 1) for seed in range(trials)]
    claims = [compare(before, bench_campaign(seed), 0.05) for before, seed in pairs]
    assert [claim.slower + claim.faster for claim in claims] == [[]] * trials
    slow = [compare(before, bench_campaign(seed, slower=1.1), 0.05) for before, seed in pairs]
    assert sum(claim.slower == ["access 4 KiB: mirror"] for claim in slow) >= 0.95 * trials
    (mirror,) = [change for change in slow[0].changes if change.name == "access 4 KiB: mirror"]
    assert 0 < mirror.low < mirror.change < mirror.high < 0.3
    assert mirror.effect > 0.9
    assert mirror.after > mirror.before
    backwards = compare(bench_campaign(3, slower=1.1), bench_campaign(2), 0.05)
    assert (backwards.slower, backwards.faster) == ([], ["access 4 KiB: mirror"])


def test_a_machine_at_another_pace_is_told_and_blamed_only_where_it_is_another() -> None:
    same = compare(bench_campaign(1), bench_campaign(2, pace=1.3), 0.05)
    assert (same.slower, same.faster) == ([], [])
    assert any("the machine itself took +" in note for note in same.notes)
    other = compare(bench_campaign(1), bench_campaign(2, pace=1.3, linux="6.8"), 0.05)
    assert other.slower == [PACE]
    assert other.differs == {"linux": (["6.1"], ["6.8"])}


def test_hosts_that_differ_among_themselves_are_no_noise() -> None:
    def fleet(seed: int, slower: float) -> Report:
        hosts = [bench_campaign(seed + number, 5, slower, pace).hosts[0] for number, pace in enumerate((1, 3, 9))]
        for number, host in enumerate(hosts):
            host.name = str(number)
            for report in host.reports:
                report["figures"][3]["time"]["p10"] *= number + 1
        return Report(FORM, "0", Plan("bench", ["access"]), True, 1.0, hosts)

    assert compare(fleet(10, 1), fleet(20, 1), 0.05).slower == []
    assert compare(fleet(10, 1), fleet(20, 1.1), 0.05).slower == ["access 4 KiB: mirror"]


def test_the_command_compares(tmp_path: Path) -> None:
    paths = []
    for name, report in (("a", bench_campaign(1)), ("b", bench_campaign(2, slower=1.2, linux="6.8"))):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_bytes(msgspec.json.encode(report))
    done = command_line("campaign", "compare", *paths)
    assert done.returncode == 1, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.endswith("access 4 KiB: mirror"))
    assert line.startswith("slower ")
    assert "the machines differ: linux: 6.1 -> 6.8" in done.stdout
    assert done.stdout.endswith("slower: access 4 KiB: mirror\nfaster: nothing\n")
    assert command_line("campaign", "compare", *paths, "--threshold", 50).returncode == 0
    found = json.loads(command_line("campaign", "compare", *reversed(paths), "--json").stdout)
    assert found["faster"] == ["access 4 KiB: mirror"]


def test_what_may_have_become_either_is_unknown_and_not_the_same(tmp_path: Path) -> None:
    report = bench_campaign(1)
    for number, run in enumerate(report.hosts[0].reports):
        run["figures"][NAMES.index("copy")]["time"]["p10"] *= 1 + 9 * (number % 2)
    path = tmp_path / "x.json"
    path.write_bytes(msgspec.json.encode(report))
    words = ["campaign", "compare", path, path, "--threshold"]
    done = command_line(*words, 20)
    assert done.returncode == 0, done.stderr
    verdicts = {line.split()[-1]: line.split()[0] for line in done.stdout.splitlines()[1:8]}
    assert verdicts["copy"] == "unknown"
    assert verdicts["mirror"] == "same"
    assert "note: of 1 kind it is not known" in done.stdout
    assert json.loads(command_line(*words, 20, "--json").stdout)["unknown"] == ["access 4 KiB: copy"]
    assert "unknown" not in command_line(*words, 10_000).stdout


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for text, words in (
        (b"no json", "is no report of"),
        (b'{"form": 3, "hosts": []}', "is a report of form 3"),
        (b'{"form": 3, "figures": []}', "is no report of"),
        (b'{"form": 1, "figures": []}', "is no report of"),
        (b"[]", "is no report of"),
    ):
        path.write_bytes(text)
        with pytest.raises(Unlike, match=words):
            load(str(path))
        done = command_line("campaign", "compare", path, path)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
    with pytest.raises(Unlike, match="8 and 4 runs: too few"):
        compare(bench_campaign(1), bench_campaign(2, runs=4), 0.05)
    with pytest.raises(Unlike, match="one is of bench, the other of stress"):
        compare(bench_campaign(1), Report(FORM, "0", Plan("stress", []), True, 1.0, []), 0.05)


def test_what_the_machine_is() -> None:
    found = machine.facts()
    for fact in ("linux", "build", "virtualization", "thp", "numa", "governor", "cgroup_memory", "cgroup_cpu"):
        assert found[fact], fact
    for bug in os.listdir("/sys/devices/system/cpu/vulnerabilities"):
        assert found[f"mitigation_{bug}"]
