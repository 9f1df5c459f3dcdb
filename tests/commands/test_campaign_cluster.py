"""`realmap campaign --scheduler`: a real scheduler of Dask, and real workers."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import BOUND, long, scaled, wait_until
from dask_cluster import Cluster, entered, namespaces, within

from realmap import __version__

pytest.importorskip("distributed")
#: What makes a scheduler or a worker believe that it has another version of a package, before it looks.
OTHER = """
from importlib import metadata
right = metadata.version
metadata.version = lambda name: "0.0.1" if name == "{}" else right(name)
"""
#: Takes realmap away from an interpreter that has it: all else of its packages is there.
WITHOUT = """
import os, sys, sysconfig
packages = sysconfig.get_path("purelib")
os.mkdir("packages")
for name in os.listdir(packages):
    if "realmap" not in name:
        os.symlink(os.path.join(packages, name), os.path.join("packages", name))
there = [path for path in sys.path if path and not os.path.exists(os.path.join(path, "realmap"))]
sys.path = [os.path.abspath("packages") if path == packages else path for path in there]
sys.meta_path = [finder for finder in sys.meta_path if "realmap" not in getattr(finder, "__module__", "")]
"""
CLOCK_OFF = "import time; right = time.time; time.time = lambda: right() - 3600"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A scheduler without workers."""
    found = Cluster(tmp_path)
    yield found
    found.close()


def arguments(*given: object) -> list[str]:
    return [sys.executable, "-m", "realmap", "campaign", "stress", *map(str, given)]


def run(*given: object, inside: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*inside, *arguments(*given)], capture_output=True, text=True, timeout=2 * BOUND)


def test_one_run_on_a_host_however_many_workers_it_has(cluster: Cluster, tmp_path: Path) -> None:
    refused(cluster, "the scheduler has no workers; start one on each host: dask worker")
    cluster.joined(cluster.worker(first=CLOCK_OFF), cluster.worker(first=CLOCK_OFF))
    out = tmp_path / "out.json"
    done = run("--scheduler", cluster.address, "--ops", 100, "--repeat", 2, "--seed", 3, "--json", out)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    (host,) = found["hosts"]
    assert (found["ok"], host["name"], len(host["earlier"])) == (True, socket.gethostname(), 1)
    assert host["report"]["steps"] + host["earlier"][0]["steps"] == sum(
        kind["count"] for kind in found["kinds"].values()
    )
    assert host["machine"]["linux"] == os.uname().release
    assert re.fullmatch(r"its clock is 3[56]\d\d s behind ours", host["note"])
    assert host["note"] in done.stderr


def refused(cluster: Cluster, words: str) -> None:
    done = run("--scheduler", cluster.address, "--ops", 20)
    assert (done.returncode, done.stdout) == (1, "")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_scheduler_that_is_not_there() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))  # and does not listen
        done = run("--scheduler", f"tcp://127.0.0.1:{sock.getsockname()[1]}")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"Error: no scheduler answers at tcp://127.0.0.1:\d+ .*dask scheduler.*\n", done.stderr)


@pytest.mark.parametrize(
    ("scheduler", "worker", "words"),
    [
        (OTHER.format("distributed"), None, "the scheduler has distributed 0.0.1, and this process"),
        long("", OTHER.format("distributed"), "has distributed 0.0.1, and this process"),
        long("", OTHER.format("realmap"), "has realmap 0.0.1, and this process"),
        (
            "",
            WITHOUT,
            f"has no realmap, and this process {__version__}; on that host: pip install realmap=={__version__}",
        ),
    ],
)
def test_a_cluster_that_does_not_fit(scheduler: str, worker: str | None, words: str, tmp_path: Path) -> None:
    found = Cluster(tmp_path, first=scheduler)
    try:
        if worker is not None:
            found.joined(found.worker(first=worker))
        refused(found, words)
    finally:
        found.close()


def test_ctrl_c_ends_the_runs_and_so_does_the_schedulers_death(cluster: Cluster, tmp_path: Path) -> None:
    worker = cluster.worker()
    cluster.joined(worker)
    out = tmp_path / "out.json"
    for patience, end, words in (
        (BOUND, lambda running: running.send_signal(signal.SIGINT), "the campaign was interrupted"),
        (
            4,  # a worker tells every second, and may stand still for two
            lambda _: cluster.scheduler.kill(),
            f"replay on {socket.gethostname()}: realmap stress --seconds 120 --seed",
        ),
    ):
        given = ("--scheduler", cluster.address, "--seconds", 120, "--patience", patience, "--json", out)
        with subprocess.Popen(arguments(*given), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
            started = beginning_of_a_run(worker)
            end(running)
            stdout, stderr = running.communicate(timeout=BOUND)
        assert running.returncode == 1
        assert "Traceback" not in stderr
        assert words in stdout
        if cluster.scheduler.poll() is not None:
            worker.kill()
        wait_until(lambda started=started: not any(process.is_running() for process in started), "the end of the run")  # type: ignore[misc]
    assert json.loads(out.read_text())["hosts"][0]["state"] == "lost"


def beginning_of_a_run(worker: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Waits until a run has its kernel and users there; its processes."""
    found: list[psutil.Process] = []

    def there() -> bool:
        found[:] = psutil.Process(worker.pid).children(recursive=True)
        return len(found) > 5

    wait_until(there, "a run")
    return found


# ---- hosts as network namespaces -------------------------------------------------------------------------------------


class Fleet:
    """Three hosts with a worker each; the scheduler and whoever asks are at the hub."""

    def __init__(self, pids: list[int], folder: Path) -> None:
        self.hub, *self.hosts = pids
        self.cluster = Cluster(folder, entered(self.hub), "10.77.0.1")
        self.workers = [self.cluster.worker(entered(pid)) for pid in self.hosts]
        self.cluster.joined(*self.workers)

    def campaign(self, *given: object) -> list[str]:
        return [*entered(self.hub), *arguments("--scheduler", self.cluster.address, *given)]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    if os.geteuid():
        pytest.skip("needs root, for network namespaces with veth between them")
    if subprocess.run(
        ["unshare", "--net", "ip", "link", "add", "name", "br0", "type", "bridge"], capture_output=True
    ).returncode:
        pytest.skip("needs network namespaces, and a bridge in one: CAP_SYS_ADMIN, iproute2, the module bridge")
    with namespaces(3) as pids:
        found = Fleet(pids, tmp_path)
        yield found
        found.cluster.close()


def by_address(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Its hosts, which have one name here, by the last figure of their address."""
    return {re.search(r"10\.77\.0\.(\d+)", host["name"])[1]: host for host in found["hosts"]}  # type: ignore[index]


def test_three_hosts_of_which_one_is_cut_off_and_one_is_killed(fleet: Fleet, tmp_path: Path) -> None:
    out, xml = tmp_path / "out.json", tmp_path / "out.xml"
    command = fleet.campaign("--seconds", 8, "--patience", 8, "--users", 1, "--json", out, "--junit", xml)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        for worker in fleet.workers:
            wait_until(lambda worker=worker: psutil.Process(worker.pid).children(), "a run")  # type: ignore[misc]
        left = psutil.Process(fleet.workers[1].pid).children(recursive=True)
        within(fleet.hub, "ip", "link", "set", "v0", "down")
        fleet.workers[1].kill()
        stdout, stderr = running.communicate(timeout=BOUND)
    assert running.returncode == 1, stdout + stderr
    found = json.loads(out.read_text())
    hosts = by_address(found)
    assert (hosts["2"]["state"], hosts["2"]["why"]) == ("lost", "nothing was heard of it for 8 s")
    assert (hosts["3"]["state"], hosts["3"]["why"]) == ("lost", "its worker has left the scheduler")
    assert (hosts["4"]["state"], hosts["4"]["report"]["failures"]) == ("ok", [])
    assert not found["ok"]
    assert 'errors="2"' in xml.read_text()
    assert all(f"replay on {hosts[number]['name']}: {hosts[number]['replay']}" in stdout for number in "23")
    wait_until(lambda: not any(process.is_running() for process in left), "the end of the killed worker's run")


@pytest.mark.alone
@pytest.mark.slow
def test_three_hosts_are_at_work_at_the_same_time(fleet: Fleet, tmp_path: Path) -> None:
    out, given = tmp_path / "out.json", ["--seconds", str(max(20, scaled(40))), "--users", "1"]
    alone: dict[int, float] = {}

    def run_alone(pid: int) -> None:
        began = time.monotonic()
        subprocess.run(
            [*entered(pid), sys.executable, "-m", "realmap", "stress", *given], timeout=3 * BOUND, check=True
        )
        alone[pid] = time.monotonic() - began

    threads = [threading.Thread(target=run_alone, args=(pid,)) for pid in fleet.hosts]  # each has the machine as below
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    began = time.monotonic()
    subprocess.run(fleet.campaign(*given, "--json", out), timeout=3 * BOUND, check=True)
    took = time.monotonic() - began
    print(f"alone {sorted(alone.values())}, the campaign {took} s: {took / max(alone.values()):.2f} of the slowest one")
    assert took < 2 * max(alone.values())  # one after the other they would take three times as long
    assert all(host["state"] == "ok" for host in json.loads(out.read_text())["hosts"])
