"""The ways into a process, as root and as an ordinary user: which are left, and what is said to be missing."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import BOUND, PAGE
from forked import in_a_child
from strangers import FREE, pattern, stranger

from realmap import (
    AccessDenied,
    ForeignProcess,
    InvalidAddress,
    InvalidMemState,
    KernelError,
    MemoryFault,
    PhysicalMemoryExhaustion,
    k_rw,
)
from realmap.host import procfs
from realmap.host import stranger as ways
from realmap.observe import doctor

NOBODY = 65534
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x1000_0000
PR_SET_DUMPABLE = 4
CAP_SYS_ADMIN = 21
root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
mounts = pytest.mark.skipif(not ways.has_capability(CAP_SYS_ADMIN), reason="to mount takes CAP_SYS_ADMIN")


@pytest.fixture
def folder() -> Iterator[Path]:
    """Everybody's."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        os.chmod(name, 0o777)
        yield Path(name)


def as_nobody(work: Callable[[], None], before: Callable[[], None] = lambda: None) -> None:
    """Does it in a child that has no capability; `before` it is root."""

    def run() -> None:
        before()
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1)  # as of who was never anybody else
        work()

    in_a_child(run)


def own_mounts(*commands: str) -> Callable[[], None]:
    """A mount namespace of its own, where these are run."""

    def enter() -> None:
        assert ctypes.CDLL(None).unshare(CLONE_NEWNS) == 0
        for command in ("mount --make-rprivate /", *commands):
            subprocess.run(command.split(), check=True, timeout=BOUND)

    return enter


@root
@pytest.mark.parametrize("kind", ["posix", "memfd", "file"])
def test_somebody_of_the_same_uid_goes_by_descriptor_or_name(folder: Path, kind: str) -> None:
    with stranger(folder, user=NOBODY) as other:
        kept = other.map(kind, 2, flags="ku", seed=1)
        named = other.map(kind, 2, flags="", seed=2)

        def work() -> None:
            assert not ways.may_open_map_files()
            with ForeignProcess(other.pid) as process:
                with process.mirror(kept.address + 5, PAGE, k_rw) as mirror:
                    assert bytes(mirror) == pattern(2 * PAGE, 1)[5 : PAGE + 5]
                    mirror[0] = 99
                if kind != "memfd":
                    with process.mirror(named.address, PAGE, k_rw) as mirror:
                        assert bytes(mirror) == pattern(PAGE, 2)

        as_nobody(work)
        assert other.tell("get", kept.address + 5) == "99"


@root
@pytest.mark.parametrize("kind", ["posix", "memfd", "sysv", "anonymous"])
def test_what_has_neither_is_told_with_the_capability_that_it_takes_and_copied(folder: Path, kind: str) -> None:
    with stranger(folder, user=NOBODY) as other:
        place = other.map(kind, 2, flags="u", seed=3)

        def work() -> None:
            with ForeignProcess(other.pid) as process:
                with pytest.raises(AccessDenied, match="CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE") as caught:
                    process.mirror(place.address, 1)
                assert caught.value.address == place.address
                (entry,) = [each for each in process.mappings() if each.address == place.address]
                assert "CAP_CHECKPOINT_RESTORE" in entry.why_not
                assert process.copy_in(place.address + 7, PAGE) == pattern(2 * PAGE, 3)[7 : PAGE + 7]
                process.copy_out(place.address + 7, b"written")
                assert process.copy_in(place.address + 7, 7) == b"written"

        as_nobody(work)


@root
def test_a_file_that_may_not_be_opened_anew_is_had_as_the_process_has_it(folder: Path) -> None:
    with stranger(folder, user=NOBODY) as other:
        place = other.map("file", 2, flags="k", seed=4)
        os.chmod(place.name, 0)

        def work() -> None:
            with ForeignProcess(other.pid) as process:
                with process.mirror(place.address, PAGE, k_rw) as mirror:
                    assert bytes(mirror) == pattern(PAGE, 4)
                    mirror[1] = 7
                process.copy_out(place.address + 2, b"\x08")

        as_nobody(work)
        assert [other.tell("get", place.address + at) for at in (1, 2)] == ["7", "8"]


@root
def test_a_process_of_somebody_else_is_not_looked_at(folder: Path) -> None:
    with stranger(folder) as other:

        def work() -> None:
            with ForeignProcess(other.pid) as process:
                for ask in (process.mappings, lambda: process.mirror(FREE, 1), lambda: process.copy_in(FREE, 1)):
                    with pytest.raises(AccessDenied, match="its uid and gid, 0 and 0"):
                        ask()

        as_nobody(work)


@mounts
@root
def test_a_proc_that_hides_others_and_none_at_all(folder: Path) -> None:
    with stranger(folder) as other:

        def hidden() -> None:
            with pytest.raises(AccessDenied, match="hidepid"):
                ForeignProcess(other.pid)

        def missing() -> None:
            with pytest.raises(AccessDenied, match="/proc is not mounted"):
                ForeignProcess(other.pid)

        as_nobody(hidden, before=own_mounts("mount -t proc -o hidepid=2 proc /proc"))
        as_nobody(missing, before=own_mounts("mount -t tmpfs tmpfs /proc"))


@mounts
@root
def test_a_name_in_another_mount_namespace(folder: Path) -> None:
    """The file is called the same here, but is another one."""
    with stranger(folder, user=NOBODY) as other:
        place = other.map("posix", 1, flags="", seed=5)

        def work() -> None:
            with ForeignProcess(other.pid) as process, process.mirror(place.address, PAGE) as mirror:
                assert bytes(mirror) == pattern(PAGE, 5)

        def elsewhere() -> None:
            own_mounts("mount -t tmpfs tmpfs /dev/shm")()
            Path(f"/dev/shm{place.name}").write_bytes(b"another one" * 1000)
            os.chmod(f"/dev/shm{place.name}", 0o666)

        as_nobody(work, before=elsewhere)


@pytest.mark.skipif("overlay" not in Path("/proc/filesystems").read_text(), reason="no overlays here")
@mounts
@root
def test_a_file_that_has_other_numbers_where_it_is_mapped(folder: Path) -> None:
    """On an overlay of two file systems."""

    def work() -> None:
        for name in ("lower", "upper", "shown"):
            (folder / name).mkdir()
        own_mounts(f"mount -t tmpfs tmpfs {folder}/lower", f"mount -t tmpfs tmpfs {folder}/upper")()
        for name in ("files", "work"):
            (folder / "upper" / name).mkdir()
        layers = f"lowerdir={folder}/lower,upperdir={folder}/upper/files,workdir={folder}/upper/work"
        mount = f"mount -t overlay -o {layers},xino=off overlay {folder}/shown"
        subprocess.run(mount.split(), check=True, timeout=BOUND)
        with stranger(folder / "shown") as other, ForeignProcess(other.pid) as process:
            place = other.map("file", 2, flags="", seed=6)
            (entry,) = procfs.maps(other.pid, place.address, place.address + 1)
            assert os.stat(place.name).st_dev != procfs.device_number(entry.device)
            with process.mirror(place.address + 5, PAGE, k_rw) as mirror:
                assert bytes(mirror) == pattern(2 * PAGE, 6)[5 : PAGE + 5]
            came, limits = [], resource.getrlimit(resource.RLIMIT_NOFILE)
            while came[-1:] != [None]:  # with 0, 1, 2, … descriptors
                with ForeignProcess(other.pid) as anew:
                    probe = os.open("/dev/null", os.O_RDONLY)
                    os.close(probe)
                    resource.setrlimit(resource.RLIMIT_NOFILE, (probe + len(came), limits[1]))
                    try:
                        came.append(anew.mirror(place.address, 1).drop())
                    except KernelError as error:
                        came.append(type(error))
                    finally:
                        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
                    assert anew._stranger.file_system(entry.device) == "overlay"  # and none on FUSE
            assert len(came) > 3 and set(came[:-1]) == {PhysicalMemoryExhaustion}
            empty = other.map("file", 1, flags="", seed=7)
            os.truncate(empty.name, 0)
            with pytest.raises(MemoryFault), process.mirror(empty.address, PAGE) as mirror:
                assert bytes(mirror) == bytes(PAGE)
            another = Path(place.name).with_name("another")
            another.write_bytes(bytes(PAGE))
            os.replace(another, place.name)
            assert not ways._is_mapped_as(os.open(place.name, os.O_PATH), entry)

    in_a_child(work)


@root
def test_a_file_on_fuse_is_not_even_looked_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stranger(folder) as other:
        place = other.map("file", 1)
        with ForeignProcess(other.pid) as process, monkeypatch.context() as patched:
            patched.setattr(ways.Stranger, "file_system", lambda self, device: "fuse.sshfs")
            patched.setattr(os, "fstat", None)
            with pytest.raises(InvalidMemState, match="FUSE"):
                process.mirror(place.address, 1)


def test_file_systems_by_device(folder: Path) -> None:
    found = ways.Stranger(os.getpid())
    for path, kind in {"/proc": "proc", "/dev/shm": "tmpfs"}.items():
        number = os.stat(path).st_dev
        assert found.file_system(f"{os.major(number):02x}:{os.minor(number):02x}") == kind
    assert found.file_system("ff:77") == ""
    found.close()


def test_before_linux_could_be_asked_about_one_map(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not ways.may_open_map_files():
        pytest.skip("it takes CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE")
    monkeypatch.setattr(ways, "map_at", lambda fd, address: None)
    monkeypatch.setattr("realmap.memory.foreign.map_at", lambda fd, address: None)
    with stranger(folder) as other, ForeignProcess(other.pid) as process:
        for seed in range(3):
            other.map("memfd", 2, FREE, seed=seed)
            for _ in range(2):
                with process.mirror(FREE, PAGE) as mirror:
                    assert bytes(mirror) == pattern(PAGE, seed)


@pytest.mark.parametrize("at", [0, 1])
def test_a_map_that_linux_leaves_out_of_its_list(folder: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """As Linux 6.18 does now and then of one that is split or merged meanwhile."""
    listed, asked = procfs.maps, []

    def maps(*args: Any) -> list[procfs.Map]:
        if args[0] == "self":  # its own: where it looks whether a descriptor led to the right file
            return listed(*args)
        asked.append(args)
        return listed(*args) if len(asked) > 1 else listed(*args)[:at]

    with stranger(folder) as other, ForeignProcess(other.pid) as process:
        other.map("memfd", 1, FREE, seed=1)
        other.map("memfd", 1, FREE + PAGE, seed=2)
        monkeypatch.setattr(procfs, "maps", maps)
        with process.mirror(FREE + 1, 2 * PAGE - 1) as mirror:
            assert bytes(mirror) == (pattern(PAGE, 1) + pattern(PAGE, 2))[1:]
        assert len(asked) == 2


@pytest.mark.parametrize("another", [False, True])
def test_a_way_in_that_is_gone_for_a_moment(folder: Path, monkeypatch: pytest.MonkeyPatch, another: bool) -> None:
    """As where a process runs another program: its maps that are open still show what its folder has no more. Or where
    it has mapped another file for a moment, and then one that has got the first one's number."""
    if not ways.may_open_map_files():
        pytest.skip("it takes CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE")
    way, tried = ways.Stranger._by_map_files, []

    def once_gone(self: ways.Stranger, entry: procfs.Map) -> Any:
        tried.append(entry)
        if len(tried) > 1:
            yield from way(self, entry)
        elif another:
            yield ways.Descriptor(partial(os.open, __file__, os.O_PATH))
        else:
            raise FileNotFoundError

    with stranger(folder) as other, ForeignProcess(other.pid) as process:
        other.map("memfd", 1, FREE, "", seed=1)
        monkeypatch.setattr(ways.Stranger, "_by_map_files", once_gone)
        with process.mirror(FREE, PAGE) as mirror:
            assert bytes(mirror) == pattern(PAGE, 1)
        assert len(tried) == 2


def test_a_child_that_has_its_parents_memory_until_it_runs_a_program(folder: Path) -> None:
    with stranger(folder) as other:
        other.map("memfd", 1, FREE, seed=1)
        child = int(other.tell("vfork"))
        try:
            with ForeignProcess(child) as process:
                for _ in range(2):
                    with process.mirror(FREE, PAGE) as mirror:
                        assert bytes(mirror) == pattern(PAGE, 1)
                assert other.tell("go") == "ready"  # the child says so: it is a program of its own now
                with pytest.raises(InvalidAddress):
                    process.mirror(FREE, PAGE)
                other.map("memfd", 1, FREE, seed=2)
                with process.mirror(FREE, PAGE) as mirror:
                    assert bytes(mirror) == pattern(PAGE, 2)
        finally:
            os.kill(child, signal.SIGKILL)


def test_doctor_says_which_ways_there_are() -> None:
    found = {check.name: check for check in doctor.examine()}
    mirrors, copies = found["mirrors of any process"], found["copies of its private memory"]
    assert mirrors.status == copies.status == "ok" or mirrors.advice or copies.advice
    if ways.may_open_map_files():
        assert mirrors.found == "of all that it shares"


@root
def test_doctor_says_what_is_missing() -> None:
    def work() -> None:
        found = {check.name: check for check in doctor._ways()}
        check = found["mirrors of any process"]
        assert check.status == "warn"
        assert "cap_checkpoint_restore" in check.advice

    as_nobody(work)

    def inside() -> None:
        assert ctypes.CDLL(None).unshare(CLONE_NEWUSER) == 0
        assert any("user namespace" in each for each in ways.obstacles())

    in_a_child(inside)
