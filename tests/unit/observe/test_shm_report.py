"""Whose a segment is, and whether anybody can still need it: from plain data, and processes of ours."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from conftest import BOUND, PAGE

from realmap.host import procfs, runtime
from realmap.host.reclaim import Named
from realmap.host.shared_segments import ANONYMOUS, MEMFD, POSIX, SYSV, UNLINKED, Machine, Mount, Segment, Shown
from realmap.observe import shm
from realmap.observe.shm import FAMILIES, KEPT, ORPHAN, UNSURE, USED, Report, SegmentRow, reclaimable

NOW = time.time()
#: Of this test's /dev/shm.
DEVICE = 7


@pytest.fixture(scope="module")
def gone() -> int:
    """The pid of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        pass
    return child.pid


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The pid of a process that is called as PostgreSQL's are."""
    path = tmp_path_factory.mktemp("bin") / "postgres"
    path.symlink_to("/bin/sleep")
    with subprocess.Popen([path, "1000"]) as child:
        end = time.monotonic() + BOUND
        while procfs.comm(child.pid) != "postgres":
            assert time.monotonic() < end
        yield child.pid
        child.kill()


def segment(name: str, kind: str = POSIX, age: float = 10.0, inode: int = 1, **more: object) -> Segment:
    facts = {"uid": os.geteuid(), "names": [name] if kind == POSIX else []} | more
    return Segment(kind, name, DEVICE, inode, 3 * PAGE, 2 * PAGE, True, touched=NOW - age, **facts)  # type: ignore[arg-type]


def machine(*segments: Segment, used: int | None = None, other: int = 0, unseen: int = 0) -> Machine:
    mount = Mount("/dev/shm", "/dev/shm", DEVICE, size=1 << 20, used=used, other=other)
    return Machine(NOW, [mount], list(segments), 3, unseen)


def row(found: Segment) -> SegmentRow:
    (only,) = shm.report(machine(found)).segments
    return only


NAMES = [
    ("realmap", "realmap.4026531836.{pid}.123.4", True),
    ("realmap", "realmap.4026531836.{pid}.123.4.0123456789abcdef", True),
    ("Python", "psm_0a1b2c3d", False),
    ("Python", "sem.mp-abc_1234", False),
    ("loky", "sem.loky-{pid}-tlnvagi8", True),
    ("torch", "torch_{pid}_3372036854_17", True),
    ("Open MPI", "sm_segment.some.node.1000.73dc0001.2", False),
    ("Open MPI", "vader_segment.xf03id-srv5.73dc0001.2", False),
    ("Open MPI", "open_mpi.0003", False),
    ("SGLang", "sgl_shm_mm_feature_{pid}_0a1b2c3d", True),
    ("SGLang", "multi_tokenizer_args_{pid}", True),
    ("vLLM", "vllm_offload_63f63241-9def-4261-b65e-000000000000.mmap", False),
    ("vLLM", "VLLM_OBJECT_STORAGE_SHM_BUFFER_910f0d901ec64c9f8bf3bc40af9fd162", False),
    ("vLLM", "VLLM_OBJECT_STORAGE_SHM_BUFFER", False),
    ("NCCL", "nccl-Ab3xYz", False),
    ("semaphore", "sem.mine", False),
]


@pytest.mark.parametrize(("family", "name", "stamped"), NAMES)
def test_a_maker_that_is_gone_makes_an_orphan(gone: int, family: str, name: str, stamped: bool) -> None:
    """By its pid where the name has it; else only by how long nothing has changed."""
    young = row(segment(name.format(pid=gone)))
    old = row(segment(name.format(pid=gone), age=shm.OLDER + 10))
    assert (young.family, young.maker) == (family, gone if stamped else None)
    assert young.state == (ORPHAN if stamped else UNSURE)
    assert old.state == ORPHAN
    assert str(gone) in old.why if stamped else "nothing has changed it for 60 min" in old.why


@pytest.mark.parametrize("name", [name for _, name, stamped in NAMES if stamped and not name.startswith("realmap")])
def test_a_maker_that_lives_keeps_it(name: str) -> None:
    """Unless it started after the segment was there: then another has its pid now."""
    mine = row(segment(name.format(pid=os.getpid()), age=0))
    assert (mine.state, mine.maker) == (KEPT, os.getpid())
    assert row(segment(name.format(pid=os.getpid()), age=3 * 3600 * 24 * 365)).state == ORPHAN


def test_realmap_s_own_tell_more() -> None:
    assert row(segment(runtime.own_name())).state == KEPT
    namespace, pid, start = runtime.stamp().split(".")
    assert row(segment(f"realmap.{namespace}.{pid}.{int(start) + 1}.0")).state == ORPHAN
    assert row(segment(f"realmap.{int(namespace) + 1}.{pid}.{int(start) + 1}.0")).state == KEPT  # it cannot be told


def test_postgresql_s_are_kept_while_it_runs_though_nobody_maps_them(postgres: int) -> None:
    assert row(segment("PostgreSQL.123456", age=shm.OLDER + 10)).state == KEPT
    assert row(segment("PostgreSQL.123456", uid=12_345)).state == ORPHAN  # of another user's


def test_names_that_no_program_is_known_to_give_are_never_orphans() -> None:
    for name in ("data.bin", "psm_", "psm_0a1b2c3d.bak", "torch_1_2", "PostgreSQL.x", "folder/psm_0a1b2c3d", "nccl-"):
        assert (row(segment(name, age=1e9)).state, row(segment(name)).family) == (UNSURE, "")


def test_what_somebody_has_is_no_orphan(gone: int) -> None:
    name, map_ = f"torch_{gone}_1_2", Shown(os.getpid(), 0x1000, 0x2000, 0, "rw-s")
    for more in ({"maps": [map_, map_]}, {"opened": {os.getpid(): 3}}):
        found = row(segment(name, **more))
        assert found.state == USED
        (holder,) = found.holders
        assert (holder.pid, holder.program) == (os.getpid(), procfs.program(os.getpid()))
        assert (holder.maps, holder.descriptors) in ((2, 0), (0, 3))
    assert row(segment("0x0", SYSV, makers=[gone, gone], attached=1)).state == USED


def test_system_v_by_who_made_it_and_who_used_it_last(gone: int) -> None:
    orphan = row(segment("0x0000162e", SYSV, inode=5, makers=[gone, 0]))
    assert (orphan.state, orphan.maker) == (ORPHAN, gone)
    assert "ipcrm -m 5" in orphan.why
    assert row(segment("0x0000162e", SYSV, makers=[gone, os.getpid()], age=0)).state == KEPT


def test_what_has_no_name_is_no_orphan() -> None:
    for kind in (UNLINKED, MEMFD, ANONYMOUS):
        assert row(segment("psm_0a1b2c3d", kind, age=1e9)).state != ORPHAN


def test_a_pid_of_an_inner_namespace_lives(gone: int) -> None:
    """A container that shares /dev/shm: its pids are other ones there."""
    if os.geteuid() or subprocess.run(["unshare", "-pf", "true"], capture_output=True).returncode:
        pytest.skip("needs root, for a pid namespace of its own")
    inner = next(pid for pid in range(2, 400) if not os.path.exists(f"/proc/{pid}"))
    code = f"echo {inner - 1} > /proc/sys/kernel/ns_last_pid; sleep 1000 & echo $!; wait"
    with subprocess.Popen(["unshare", "-pf", "--mount-proc", "sh", "-c", code], stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            within = int(child.stdout.readline())
            assert within in procfs.inner_pids()
            if not os.path.exists(f"/proc/{within}"):
                assert row(segment(f"torch_{within}_1_2", age=0)).state == KEPT
        finally:
            for at in subprocess.run(["pgrep", "-P", str(child.pid)], capture_output=True, text=True).stdout.split():
                os.kill(int(at), 9)  # the first of that namespace: with it all of them end


def test_every_byte() -> None:
    parts = [segment("a", inode=1), segment("b", UNLINKED, inode=2), segment("c", MEMFD, inode=3)]
    found = shm.report(machine(*parts, used=10 * PAGE, other=PAGE)).dev_shm
    assert found is not None
    assert (found.named, found.unlinked, found.other, found.explained) == (2 * PAGE, 2 * PAGE, PAGE, 5 * PAGE)
    assert (found.used, found.unexplained, found.size) == (10 * PAGE, 5 * PAGE, 1 << 20)


# ---- what may go ------------------------------------------------------------------------------


def choice(found: Machine, *names: str, force: bool = False) -> tuple[set[str], dict[str, str]]:
    may, stay = reclaimable(found, shm.report(found), names, force)
    assert all(isinstance(file, Named) and file.names for _, file in may)
    return {row.name for row, _ in may}, dict(stay)


@pytest.fixture
def mixed(gone: int) -> Machine:
    return machine(
        segment(f"torch_{gone}_1_2", inode=1),
        segment("data", inode=2),
        segment(f"torch_{os.getpid()}_1_2", inode=3, age=0),
        segment("used", inode=4, opened={os.getpid(): 1}),
        segment("odd\n\x1b", inode=5),
        segment("0x0000162e", SYSV, inode=6, makers=[gone]),
        segment(f"torch_{gone}_9_9", UNLINKED, inode=7),
    )


def test_without_names_the_orphans(mixed: Machine, gone: int) -> None:
    assert choice(mixed) == ({f"torch_{gone}_1_2"}, {})


def test_with_names_these_alone_but_never_what_is_used(mixed: Machine, gone: int) -> None:
    mine = f"torch_{os.getpid()}_1_2"
    may, stay = choice(mixed, "data", "/data", "/dev/shm/data", mine, "used", "nope", "odd\\n\\x1b")
    assert may == {"data", "odd\n\x1b"}
    assert set(stay) == {mine, "used", "nope"}
    assert f"in use by {os.getpid()}" in stay["used"]
    assert choice(mixed, mine, "used", force=True)[0] == {mine}


def test_of_another_dev_shm_nothing(mixed: Machine) -> None:
    mixed.mounts.insert(0, Mount("/dev/shm", "/dev/shm", DEVICE + 1))
    assert choice(mixed) == (set(), {})
    assert choice(mixed, "data")[0] == set()


def test_the_table_says_its_sources() -> None:
    """Each row, in the comment beside it."""
    with open(shm.__file__) as file:
        rows = re.findall(r"^    Family\(.*\),(.*)$", file.read(), re.MULTILINE)
    assert len(rows) == len(FAMILIES)
    assert all(re.match(r"  # .+", row) for row in rows)


def test_what_cannot_be_seen_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(unseen: int = 0) -> Report:
        return shm.report(machine(unseen=unseen))

    monkeypatch.setattr(procfs, "pid_namespace", lambda: shm.FIRST_PID_NAMESPACE)
    assert blind().blind == []
    assert blind(1).blind == ["1 process may not be looked into: what it holds is not told"]
    assert blind(3).blind == ["3 processes may not be looked into: what they hold is not told"]
    assert shm.cannot_tell_makers(blind(3)) == ""  # that they are there is seen; who holds what, Linux is asked
    monkeypatch.setattr(procfs, "pid_namespace", lambda: 5)
    assert "a pid namespace of its own" in shm.cannot_tell_makers(blind())
    monkeypatch.setattr(procfs, "pids", lambda: [])
    assert "/proc shows no processes" in shm.cannot_tell_makers(blind())
