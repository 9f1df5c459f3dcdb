"""tools/inject: system calls that fail, and SIGKILL at named points, from outside. A tiny share, and all of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import SCALE, scaled

INJECT = Path(__file__).with_name("inject") / "inject.py"
#: Its exit status where strace is missing, or may not trace.
NOT_HERE = 2


def inject(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """Runs it; what it found. A failure there is one here, with everything it said."""
    file = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, str(INJECT), *arguments, "--json", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode == NOT_HERE:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout
    print(done.stdout.splitlines()[-1])
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.mark.parametrize(
    ("path", "call"), [("map-fragments", "mmap"), ("call-mirror", "mmap"), ("connect", "epoll_ctl"), ("map", "sendmsg")]
)
def test_calls_that_fail(tmp_path: Path, path: str, call: str) -> None:
    found = inject(tmp_path, "errors", "--path", path, "--only", call, "--carrier", "socket")
    assert found["injected"] >= 3


def test_kills_at_named_points(tmp_path: Path) -> None:
    found = inject(tmp_path, "kills", "--rounds", "1", "--only", "mmap")
    assert len(found["points"]) >= 4
    assert all(point["hits"] for point in found["points"])


@pytest.mark.parametrize("who", ["server", "caller", "kernel"])
def test_kills_at_named_points_of_a_call_to_a_service(tmp_path: Path, who: str) -> None:
    found = inject(tmp_path, "services", "--rounds", "1", "--who", who)
    assert len(found["points"]) >= 11
    assert all(point["hits"] for point in found["points"])


def test_users_that_connect_and_are_killed(tmp_path: Path) -> None:
    assert inject(tmp_path, "cycles", "--cycles", "40")["cycles"] == 40


@pytest.mark.slow
def test_every_call_of_every_path(tmp_path: Path) -> None:
    every = max(1, round(1 / SCALE))
    assert inject(tmp_path, "errors", "--every", str(every))["injected"] > 1500 / every


@pytest.mark.slow
def test_kills_at_named_points_full_count(tmp_path: Path) -> None:
    count = scaled(500)
    assert all(point["rounds"] == count for point in inject(tmp_path, "kills", "--rounds", str(count))["points"])


@pytest.mark.slow
def test_kills_at_named_points_of_a_call_to_a_service_full_count(tmp_path: Path) -> None:
    count = scaled(500)
    assert all(point["rounds"] == count for point in inject(tmp_path, "services", "--rounds", str(count))["points"])


@pytest.mark.slow
def test_users_that_connect_and_are_killed_full_count(tmp_path: Path) -> None:
    count = scaled(10_000)
    assert inject(tmp_path, "cycles", "--cycles", str(count))["cycles"] == count
