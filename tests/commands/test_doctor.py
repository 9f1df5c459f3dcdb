"""`realmap doctor` on this machine, and where something is wrong with it (a mount namespace of its own)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import command_line
from conftest import BOUND, long

from realmap import KernelHandle
from realmap.observe import doctor


def run(mount: str, *arguments: str, script: str = "true") -> subprocess.CompletedProcess[str]:
    """`realmap doctor` with a /dev/shm of its own, made with these options; `script`: done before."""
    script = f'mount -t tmpfs -o {mount} tmpfs /dev/shm && {script} && exec "$@"'
    words = [sys.executable, "-W", "error", "-m", "realmap", "doctor", *arguments]
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "-", *words], capture_output=True, text=True, timeout=BOUND
    )


def may_mount() -> bool:
    """Whether a mount namespace can be had: as root, outside of a container that forbids it."""
    if not shutil.which("unshare"):
        return False
    words = ["unshare", "-m", "sh", "-c", "mount -t tmpfs -o size=1m tmpfs /dev/shm"]
    return subprocess.run(words, capture_output=True, timeout=BOUND).returncode == 0


mounting = pytest.mark.skipif(not may_mount(), reason="no mount namespaces here")


def by_name(text: str) -> dict[str, dict[str, str]]:
    return {check["name"]: check for check in json.loads(text)}


def test_this_machine() -> None:
    done = command_line("doctor")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert {line.split()[0] for line in lines} <= {"ok", "warn"}
    found = by_name(command_line("doctor", "--json").stdout)
    assert len(found) == len(lines)
    for name in ("linux", "/dev/shm", "descriptors", "maps of a process", "overcommit", "MADV_COLLAPSE", "sockets"):
        assert found[name]["found"], name
    for check in found.values():
        assert set(check) == {"name", "found", "status", "advice"}
        assert bool(check["advice"]) == (check["status"] != "ok"), check
    assert found["uid"]["found"].startswith(f"{os.geteuid()} ")


@mounting
@pytest.mark.parametrize(
    ("options", "name", "status", "words"),
    [
        ("size=64m", "/dev/shm", "warn", "--shm-size"),
        long("size=256m,noexec", "/dev/shm noexec", "warn", "remount,exec"),
        long("size=1m", "MADV_COLLAPSE", "warn", "make room"),
        ("size=256m,ro", "a segment", "bad", "you may write"),
    ],
)
def test_a_shared_memory_that_is_not_as_it_should_be(options: str, name: str, status: str, words: str) -> None:
    done = run(options, "--json")
    assert done.returncode == (status == "bad")
    assert done.stderr == ""
    check = by_name(done.stdout)[name]
    assert check["status"] == status
    assert words in check["advice"]


@mounting
def test_one_that_is_nearly_full() -> None:
    done = run("size=100m", script="head -c 95M /dev/zero > /dev/shm/much")
    (line,) = [line for line in done.stdout.splitlines() if " /dev/shm: " in line]
    assert line.startswith("warn")
    assert "nearly full" in line
    assert done.returncode == 0


def test_what_cannot_be_looked_at_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise PermissionError("not for you")

    broken.__name__ = "_some_thing"
    monkeypatch.setattr(doctor, "_LOOKS", [broken])
    check, *_ = doctor.examine()
    assert (check.name, check.status) == ("some thing", "warn")
    assert "not for you" in check.found


def test_the_kernel_of_the_environment_is_counted(kernel: KernelHandle, tmp_path: Path) -> None:
    def counted(path: object) -> str:
        return by_name(command_line("doctor", "--json", REALMAP_KERNEL=str(path)).stdout)["kernels"]["found"]

    assert counted(kernel.path) == "1 at work, 0 of them stuck"
    assert counted(tmp_path / "none") == "0 at work, 0 of them stuck"


def test_limits_that_are_low(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda _: (256, 1024))
    settings = {"/proc/sys/vm/max_map_count": "1000", "/proc/sys/vm/overcommit_memory": "2"}
    monkeypatch.setattr(doctor.procfs, "setting", settings.get)
    found = {check.name: check for check in doctor._limits()}
    assert {check.status for check in found.values()} == {"warn"}
    assert "ulimit -Hn" in found["descriptors"].advice
    assert "max_map_count" in found["maps of a process"].advice
