"""A memory cgroup of one's own, of either version."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import BOUND, wait_until

from realmap.host import cgroups, runtime
from realmap.host.cgroups import MemoryCgroup, Place


def group_of(pid: int) -> str:
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return next(line.split(":", 2)[2] for line in lines if "memory" in line.split(":")[1].split(",") or "::" in line)


@pytest.fixture
def group() -> Iterator[MemoryCgroup]:
    try:
        made = MemoryCgroup(f"realmap-test-{runtime.stamp()}")
    except OSError as error:
        pytest.skip(f"needs a memory cgroup: {error}")
    yield made
    made.close()


@pytest.fixture
def hungry() -> Iterator[subprocess.Popen[bytes]]:
    """A process that takes 32 MiB once it is told to, and waits."""
    program = "import sys; sys.stdin.readline(); taken = bytearray(b'1') * (32 << 20); sys.stdin.readline()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, bufsize=0) as child:
        yield child
        child.kill()


def test_who_takes_more_than_its_group_may_is_killed(group: MemoryCgroup, hungry: subprocess.Popen[bytes]) -> None:
    group.limit(4 << 20)
    group.enter(hungry.pid)
    assert group.kills == 0
    assert hungry.stdin is not None
    hungry.stdin.write(b"\n")
    assert hungry.wait(BOUND) == -9
    assert group.kills == 1


def test_whoever_is_left_goes_back_where_it_came_from(group: MemoryCgroup, hungry: subprocess.Popen[bytes]) -> None:
    before = group_of(hungry.pid)
    group.enter(hungry.pid)
    assert group_of(hungry.pid).endswith(runtime.stamp())
    group.reclaim(1 << 20)
    group.close()
    assert group_of(hungry.pid) == before
    group.close()
    wait_until(lambda: not group._folder.exists())


def test_version_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files, in a folder that is none: the nearest group above whose children have the controller is its parent."""
    home = tmp_path / "a" / "b"
    home.mkdir(parents=True)
    (home / "cgroup.subtree_control").write_text("cpu pids\n")
    (home.parent / "cgroup.subtree_control").write_text("cpu memory pids\n")
    monkeypatch.setattr(cgroups, "places", lambda: [Place(2, home, tmp_path)])
    group = MemoryCgroup("mine")
    folder = home.parent / "mine"
    group.limit(5000)
    group.reclaim(6000)
    group.enter(77)
    (folder / "memory.events").write_text("low 0\noom 4\noom_kill 3\n")
    assert group.kills == 3
    written = {path.name: path.read_text() for path in folder.iterdir()}
    assert written | {"memory.max": "5000", "memory.reclaim": "6000", "cgroup.procs": "77"} == written


def test_none_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "places", lambda: [Place(2, tmp_path, tmp_path)])
    with pytest.raises(OSError, match="no memory cgroup above this process: mount one, or start it by systemd-run"):
        MemoryCgroup("mine")
    (tmp_path / "cgroup.subtree_control").write_text("memory\n")
    (tmp_path / "mine").mkdir()
    with pytest.raises(OSError, match="be root, or have the group delegated"):
        MemoryCgroup("mine")
