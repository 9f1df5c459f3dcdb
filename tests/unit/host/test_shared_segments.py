"""Every segment of shared memory of the machine, and who has it: real segments, held by processes of ours."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import secrets
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import BOUND, PAGE, scaled
from strangers import stranger

from realmap._core import device_maps
from realmap.host import procfs, shared_segments
from realmap.host.shared_segments import ANONYMOUS, MEMFD, POSIX, SYSV, UNLINKED, Segment, look
from realmap.host.stranger import may_open_map_files

IPC_PRIVATE, IPC_CREAT, IPC_RMID = 0, 0o1000, 0
MAP_FIXED = 0x10
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p


@pytest.fixture
def name() -> Iterator[str]:
    """A name in /dev/shm that is nobody else's."""
    name = f"realmap-test-{os.getpid()}-{secrets.token_hex(4)}"
    yield name
    with suppress(FileNotFoundError):
        os.unlink(f"/dev/shm/{name}")


@contextmanager
def holder(hold: Callable[[], object]) -> Iterator[int]:
    """The pid of a child that has what `hold` returns, until the end of the block."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            kept = hold()
            os.write(writer, b"x")
            signal.pause()
            del kept
        finally:
            os._exit(1)
    try:
        os.close(writer)
        assert os.read(reader, 1) == b"x", "the child could not"
        yield pid
    finally:
        os.close(reader)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def made(name: str, pages: int) -> int:
    fd = os.open(f"/dev/shm/{name}", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    os.posix_fallocate(fd, 0, pages * PAGE)
    return fd


def held(pid: int) -> list[Segment]:
    """What a process has."""
    return [segment for segment in look().segments if pid in segment.holders]


def of_name(name: str) -> Segment:
    (found,) = [segment for segment in look().segments if name in segment.names]
    return found


def test_a_name_with_who_maps_it_and_who_has_it_open(name: str) -> None:
    fd = made(name, 3)
    windows = [mmap.mmap(fd, PAGE, offset=at * PAGE) for at in (0, 2)]  # apart: Linux joins no two of them

    def hold() -> object:
        for window in windows:
            window.close()
        return os.dup(fd)

    with holder(hold) as pid:
        os.close(fd)
        found = of_name(name)
    for window in windows:
        window.close()
    assert (found.kind, found.size, found.resident, found.exact) == (POSIX, 3 * PAGE, 3 * PAGE, True)
    assert found.uid == os.geteuid()
    ours = sorted((each.offset, each.end - each.start) for each in found.maps if each.pid == os.getpid())
    assert ours == [(0, PAGE), (2 * PAGE, PAGE)]
    assert found.opened == {pid: 2, os.getpid(): 2}  # an mmap.mmap has a descriptor of its own


def test_what_only_its_name_holds_and_its_second_name(name: str) -> None:
    os.close(made(name, 1))
    os.link(f"/dev/shm/{name}", f"/dev/shm/{name}.2")
    try:
        found = of_name(name)
    finally:
        os.unlink(f"/dev/shm/{name}.2")
    assert sorted(found.names) == [name, f"{name}.2"]
    assert not found.holders


def mapped_alone(name: str, pages: int) -> mmap.mmap:
    """A map of an unlinked segment, and no descriptor of it."""
    fd = made(name, pages)
    os.unlink(f"/dev/shm/{name}")
    address = mmap.mmap(-1, pages * PAGE)
    place = ctypes.addressof(ctypes.c_char.from_buffer(address))
    got = ctypes.CDLL(None).mmap
    got.restype = ctypes.c_void_p
    MAP_FIXED = 0x10
    where = got(
        ctypes.c_void_p(place), ctypes.c_size_t(pages * PAGE), 3, mmap.MAP_SHARED | MAP_FIXED, fd, ctypes.c_long(0)
    )
    assert where == place
    os.close(fd)
    return address


def test_what_only_a_map_holds(name: str) -> None:
    with holder(lambda: mapped_alone(name, 5)) as pid:
        (found,) = held(pid)
        assert (found.kind, found.name, found.size, found.names) == (UNLINKED, name, 5 * PAGE, [])
        assert not found.opened
        if not os.geteuid():
            assert (found.resident, found.exact) == (5 * PAGE, True)


def test_of_what_is_not_ours_to_follow_what_was_touched_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ordinary user may read the maps of its processes, but not follow them."""
    real = os.stat

    def refused(path: object, **options: object) -> os.stat_result:
        if "map_files" in str(path):
            raise PermissionError
        return real(path, **options)  # type: ignore[arg-type]

    def hold() -> object:
        window = mapped_alone(name, 5)
        window[0] = window[3 * PAGE] = 1
        return window

    monkeypatch.setattr(shared_segments.os, "stat", refused)
    with holder(hold) as pid:
        (found,) = held(pid)
    assert (found.size, found.resident, found.exact) == (5 * PAGE, 2 * PAGE, False)


@pytest.mark.process
def test_who_has_it_where_the_first_thread_has_ended(tmp_path: Path) -> None:
    with stranger(tmp_path) as other:
        kept, mapped = other.map("posix", 1, flags="k", seed=1), other.map("memfd", 2, flags="", seed=1)
        other.tell("leave")
        (named,) = [segment for segment in held(other.pid) if segment.kind == POSIX]
        (memfd,) = [segment for segment in held(other.pid) if segment.kind == MEMFD]
        assert (named.names, named.opened) == ([kept.name.removeprefix("/")], {other.pid: 1})
        assert [(each.pid, each.start) for each in memfd.maps] == [(other.pid, mapped.address)]
        assert (memfd.size, memfd.exact) == (2 * PAGE, may_open_map_files())
        assert procfs.start_time(other.pid) and procfs.comm(other.pid) == "stranger"
        other.process.kill()
        other.process.wait(BOUND)
        assert not held(other.pid)
        with pytest.raises(ProcessLookupError):
            procfs.start_time(other.pid)


def test_memfds_and_shared_anonymous_memory() -> None:
    def hold() -> object:
        fd = os.memfd_create("some name")
        os.ftruncate(fd, 3 * PAGE)
        anonymous = mmap.mmap(-1, 2 * PAGE)
        anonymous[0] = 1
        return fd, anonymous

    with holder(hold) as pid:
        found = {segment.kind: segment for segment in held(pid)}
    assert sorted(found) == [ANONYMOUS, MEMFD]
    assert (found[MEMFD].name, found[MEMFD].size, found[MEMFD].resident) == ("some name", 3 * PAGE, 0)
    assert (found[ANONYMOUS].name, found[ANONYMOUS].size) == ("", 2 * PAGE)
    assert found[ANONYMOUS].resident == PAGE


def test_private_memory_and_files_are_no_shared_memory(tmp_path: object) -> None:
    path = f"{tmp_path}/ 00:01 /memfd:x"  # what looks like a device, in a path
    os.makedirs(os.path.dirname(path))
    with open(path, "wb") as file:
        file.write(b"x" * PAGE)

    def hold() -> object:
        with open(path, "r+b") as file:
            return mmap.mmap(file.fileno(), PAGE), mmap.mmap(-1, PAGE, mmap.MAP_PRIVATE), open("/dev/zero", "rb")

    with holder(hold) as pid:
        assert held(pid) == []


@pytest.fixture
def sysv() -> Iterator[int]:
    """The id of a System V segment of 3 pages."""
    number = libc.shmget(IPC_PRIVATE, 3 * PAGE, IPC_CREAT | 0o600)
    if number < 0:
        pytest.skip("no System V shared memory here")
    yield number
    libc.shmctl(number, IPC_RMID, None)


def test_system_v(sysv: int) -> None:
    def found() -> Segment:
        (one,) = [each for each in look().segments if each.kind == SYSV and each.inode == sysv]
        return one

    alone = found()
    assert (alone.name, alone.size, alone.resident, alone.attached) == ("0x00000000", 3 * PAGE, 0, 0)
    assert alone.makers[0] == os.getpid()

    def attach() -> object:
        ctypes.memset(libc.shmat(sysv, None, 0), 1, 1)
        return None

    with holder(attach) as pid:
        with_one = found()
    assert with_one.holders == {pid}
    assert (with_one.attached, with_one.resident, with_one.makers) == (1, PAGE, [os.getpid(), pid])


@pytest.mark.parametrize("odd", ["new\nline", "esc\x1b[31m", "bad\udcff", " 00:01 ", "x (deleted)", "back\\012slash"])
def test_odd_names(name: str, odd: str) -> None:
    fd = made(name + odd, 1)
    window = mmap.mmap(fd, PAGE)
    os.close(fd)
    try:
        assert of_name(name + odd).holders == {os.getpid()}
    finally:
        os.unlink(f"/dev/shm/{name}{odd}")
    gone = next(each for each in held(os.getpid()) if each.name.startswith(name))
    window.close()
    assert gone.kind == UNLINKED
    assert gone.name == name + odd


def test_a_map_of_a_file_whose_path_is_longer_than_linux_shows(tmp_path: Path) -> None:
    folders = [os.open(tmp_path, os.O_PATH)]
    try:
        for _ in range(17):
            os.mkdir("d" * 250, dir_fd=folders[-1])
            folders.append(os.open("d" * 250, os.O_PATH, dir_fd=folders[-1]))
        fd = os.open("file", os.O_RDWR | os.O_CREAT, dir_fd=folders[-1])
        os.truncate(fd, PAGE)
        file = os.fstat(fd)
        with mmap.mmap(fd, PAGE):
            asked = device_maps(b"/proc/self/maps", struct.pack("=Q", file.st_dev))
        os.close(fd)
        os.unlink("file", dir_fd=folders[-1])
    finally:
        for folder in folders[-2::-1]:
            os.rmdir("d" * 250, dir_fd=folder)
        for folder in folders:
            os.close(folder)
    assert asked is None or [row[6] for row in asked if row[5] == file.st_ino] == [b""]


def test_maps_that_go_while_they_are_looked_at_hide_no_others(name: str) -> None:
    """One that has gone between being found and being asked for its name ended the list."""
    fd = made(name, 1)
    file = os.fstat(fd)

    def come_and_go() -> None:
        while not over.is_set():
            for window in [mmap.mmap(fd, PAGE) for _ in range(3)]:
                window.close()

    steady = [mmap.mmap(fd, PAGE) for _ in range(8)]
    over = threading.Event()
    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(scaled(3000)):
            asked = device_maps(b"/proc/self/maps", struct.pack("=Q", file.st_dev))
            assert asked is None or sum(row[5] == file.st_ino for row in asked) >= len(steady)
    finally:
        over.set()
        thread.join()
        for window in steady:
            window.close()
        os.close(fd)


def test_maps_are_the_same_where_linux_shows_them_as_text_alone(name: str) -> None:
    """Before 6.11 it cannot be asked about single ones."""
    fd = made(f"{name} 00:01 \n", 3)
    windows = [mmap.mmap(fd, PAGE, mmap.MAP_PRIVATE, mmap.PROT_READ), mmap.mmap(fd, 2 * PAGE, offset=PAGE)]
    windows += [mmap.mmap(-1, PAGE)]
    devices = struct.pack("=2Q", os.fstat(fd).st_dev, shared_segments._internal_device())
    os.unlink(f"/dev/shm/{name} 00:01 \n")
    asked = device_maps(b"/proc/self/maps", devices)
    with open("/proc/self/maps", "rb") as file:
        read = shared_segments._parsed(file.read(), devices)
    for window in windows:
        window.close()
    os.close(fd)
    assert len(read) >= 3
    assert asked is None or sorted(asked) == sorted(read)


def test_what_dies_meanwhile_is_left_out(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Between any two steps of the pass."""
    real = shared_segments._maps
    fd = made(name, 1)
    for step in ("before", "between"):
        with holder(lambda: os.dup(fd)) as pid:
            child = pid

            def maps(path: bytes, devices: bytes, child: int = child, step: str = step) -> Any:
                at = int(path.split(b"/")[2])
                if at == child and step == "before":
                    os.kill(child, signal.SIGKILL)
                    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
                found = real(path, devices)
                if at == child and step == "between":
                    os.kill(child, signal.SIGKILL)
                    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
                return found

            monkeypatch.setattr(shared_segments, "_maps", maps)
            assert of_name(name).holders == {os.getpid()}
    os.close(fd)


def test_without_descriptors_it_says_so() -> None:
    """And does not take everybody for gone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 2, hard))
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
        with pytest.raises(OSError, match="Too many open files"):
            look()
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_dev_shm_of_another_mount_namespace(name: str) -> None:
    """As it is from there, and seen from here."""
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs root, for a mount namespace of its own")
    code = f"""
import os
fd = os.open("/dev/shm/{name}", os.O_CREAT | os.O_RDWR)
os.posix_fallocate(fd, 0, {3 * PAGE})
print(flush=True)
input()
"""
    shell = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
    with subprocess.Popen(
        ["unshare", "-m", "sh", "-c", shell, "-", sys.executable, "-c", code],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        assert child.stdout is not None
        child.stdout.readline()
        machine = look()
        seen_from_here = os.path.join(f"/proc/{child.pid}", "root", "dev", "shm")
        (there,) = [each for each in machine.mounts if each.root == seen_from_here]
        (found,) = [each for each in machine.segments if name in each.names]
        child.communicate("\n")
    assert machine.mounts[0].root == "/dev/shm"
    assert (there.size, there.used, found.device, found.opened) == (1 << 20, 3 * PAGE, there.device, {child.pid: 1})
