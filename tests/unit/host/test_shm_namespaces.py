"""Every byte of a /dev/shm of one's own, in a mount namespace: full, without a limit, on a disk, in a storm."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BOUND, SUPPORT, scaled


def private(*command: str, mount: str = "mount -t tmpfs -o size=64m tmpfs /dev/shm") -> str:
    """What a program prints that has a /dev/shm of its own."""
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs root, for a mount namespace of its own")
    shell = f'{mount} && exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", shell, "-", sys.executable, "-W", "error", *command],
        capture_output=True,
        text=True,
        timeout=20 * BOUND,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


STORM = str(SUPPORT / "shm_storm.py")


@pytest.mark.parametrize("uid", ["0", "65534"])
def test_every_byte_is_explained_in_a_storm(uid: str) -> None:
    assert "all explained" in private(STORM, "7", "1", uid)


@pytest.mark.slow
@pytest.mark.parametrize("uid", ["0", "65534"])
def test_every_byte_is_explained_in_a_long_storm(uid: str) -> None:
    assert "all explained" in private(STORM, str(scaled(1000)), "2", uid)


def test_a_full_one() -> None:
    code = """
import os
from realmap.host.shared_segments import look
fd = os.open("/dev/shm/all", os.O_CREAT | os.O_RDWR)
try:
    while True:
        os.write(fd, b"x" * 1_000_000)
except OSError:
    pass
(mount,) = [each for each in look().mounts if each.root == "/dev/shm"]
(found,) = [each for each in look().segments if each.names == ["all"]]
print(mount.used == mount.size == found.resident == 1 << 20)
"""
    assert private("-c", code, mount="mount -t tmpfs -o size=1m tmpfs /dev/shm") == "True\n"


def test_no_limit_and_no_file_system_to_be_asked() -> None:
    code = "from realmap.host.shared_segments import look; print(look().mounts[0].used)"
    assert private("-c", code, mount="mount -t tmpfs -o size=0 tmpfs /dev/shm") == "None\n"


def test_a_directory_on_a_disk(tmp_path: Path) -> None:
    """Some containers have no more: what else the disk holds is not to be explained."""
    (tmp_path / "here").write_bytes(b"x")
    code = "from realmap.host.shared_segments import look; m = look(); print(m.mounts[0].used, m.segments[0].names)"
    if subprocess.run(["stat", "-fc", "%T", tmp_path], capture_output=True, text=True).stdout == "tmpfs\n":
        pytest.skip("the tests' directory is in memory")
    assert private("-c", code, mount=f"mount --bind {tmp_path} /dev/shm") == "None ['here']\n"


def test_no_proc() -> None:
    code = """
import os
from realmap.host.shared_segments import look
os.close(os.open("/dev/shm/here", os.O_CREAT | os.O_RDWR))
found = look()
print(found.processes, [each.names for each in found.segments], found.mounts[0].path)
"""
    mount = "mount -t tmpfs -o size=1m tmpfs /dev/shm && mount -t tmpfs tmpfs /proc"
    assert private("-c", code, mount=mount) == "0 [['here']] /dev/shm\n"


@pytest.mark.slow
def test_ten_thousand_segments_in_little_memory() -> None:
    count = scaled(10_000)
    code = f"""
import mmap, os, resource
from realmap.observe import shm
kept = []
for number in range({count}):
    fd = os.open(f"/dev/shm/s{{number}}", os.O_CREAT | os.O_RDWR)
    os.posix_fallocate(fd, 0, 4096)
    kept.append(mmap.mmap(fd, 4096))
    os.close(fd)
pid = os.fork()
if not pid:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = shm.report(shm.look())
    mine = [row for row in found.segments if row.device == os.stat("/dev/shm").st_dev]  # others have one, too
    assert [len(row.holders) for row in mine] == [2] * {count}
    assert found.dev_shm.used == found.dev_shm.explained
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(grown < 60_000, flush=True)  # KiB; what was there already is an interpreter, and the maps' own books
    os._exit(0)
os.waitpid(pid, 0)
"""
    assert private("-c", code, mount="ulimit -n $(ulimit -H -n); mount -t tmpfs -o size=64m tmpfs /dev/shm") == "True\n"
