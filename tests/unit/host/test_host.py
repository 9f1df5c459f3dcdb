"""What is asked of Linux: segments, liveness, /proc."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import posix_ipc
import pytest
from conftest import PAGE, own_names, wait_until

from realmap._core import map_at
from realmap.errors import AccessDenied, InvalidHandle, PhysicalMemoryExhaustion, ProcessKilled
from realmap.host import files, liveness, procfs, room, segment, translate
from realmap.host.files import Descriptor
from realmap.host.segment import Segment

# ---- segments -----------------------------------------------------------------------------


def test_a_segment_has_no_name_and_all_its_space() -> None:
    made = Segment(3 * PAGE)
    status = os.fstat(made.fd)
    assert (status.st_size, status.st_blocks * 512, status.st_ino) == (3 * PAGE, 3 * PAGE, made.inode)
    assert own_names() == []
    assert os.pread(made.fd, 3 * PAGE, 0) == bytes(3 * PAGE)
    assert not os.get_inheritable(made.fd)
    made.close()
    made.close()


def test_without_commit_no_space_is_taken() -> None:
    made = Segment(64 * PAGE, commit=False)
    assert (os.fstat(made.fd).st_size, os.fstat(made.fd).st_blocks) == (64 * PAGE, 0)
    made.close()


def test_a_named_segment_can_be_opened_by_name_until_it_is_closed() -> None:
    name = f"test-{os.getpid()}"
    made = Segment(PAGE, name=name)
    other = posix_ipc.SharedMemory("/" + name)
    assert os.fstat(other.fd).st_ino == made.inode
    with pytest.raises(InvalidHandle, match="exists already"):
        Segment(PAGE, name=name)
    os.close(other.fd)
    made.close()
    assert not os.path.exists(f"/dev/shm/{name}")
    assert own_names() == []


def test_a_name_is_given_up_before_the_memory() -> None:
    name = f"mine-{os.getpid()}"
    made = Segment(PAGE, name=name)
    os.pwrite(made.fd, b"abc", 0)
    made.unlink()
    made.unlink()
    assert made.name is None and not os.path.exists(f"/dev/shm/{name}")
    assert os.pread(made.fd, 3, 0) == b"abc"
    later = Segment(PAGE, name=name)
    made.close()  # which leaves the later one's name alone
    assert os.path.exists(f"/dev/shm/{name}")
    later.close()
    assert not os.path.exists(f"/dev/shm/{name}")


def test_a_later_segment_of_the_same_name_is_not_unlinked() -> None:
    name = f"test-{os.getpid()}"
    made = Segment(PAGE, name=name)
    os.unlink(f"/dev/shm/{name}")
    later = posix_ipc.SharedMemory("/" + name, posix_ipc.O_CREX)
    made.close()
    assert os.path.exists(f"/dev/shm/{name}")
    os.close(later.fd)
    later.unlink()


@pytest.mark.parametrize("name", ["", "/", "a/b", "..", ".", "x" * 255, "a\0b", "realmap.x"])
def test_unusable_names(name: str) -> None:
    with pytest.raises(InvalidHandle):
        segment.checked_name(name)


def test_a_name_is_a_str() -> None:
    with pytest.raises(TypeError, match="int"):
        segment.checked_name(3)
    assert segment.checked_name("/frames") == "frames"


def test_more_than_there_is_is_refused_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(os, "posix_fallocate", lambda fd, offset, length: taken.append(length))
    for length in (1 << 40, 1 << 62):
        with pytest.raises(PhysicalMemoryExhaustion, match="/dev/shm") as caught:
            Segment(length)
        assert caught.value.size == length
    assert not taken


def test_memory_is_asked_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < room.memory_left() < 1 << 50
    monkeypatch.setattr(room, "memory_left", lambda: 10 * PAGE)
    monkeypatch.setattr(room, "_allowance", 0)
    Segment(10 * PAGE).close()
    with pytest.raises(PhysicalMemoryExhaustion):
        Segment(11 * PAGE)


@pytest.mark.parametrize("most", ["max", str((1 << 63) - PAGE)])
def test_a_group_without_a_limit_is_asked_nothing_more(tmp_path: Path, most: str) -> None:
    limit, use, stat = tmp_path / "limit", tmp_path / "use", tmp_path / "stat"
    limit.write_text(most + "\n")
    assert room._room(limit, use, stat, "") is None  # it has no files for the rest
    limit.write_text("1000")
    use.write_text("600\n")
    stat.write_text("active_file 50\ninactive_file 1\nanon 7\n")
    assert room._room(limit, use, stat, "") == 451


def test_no_descriptors_left() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open("/dev/null", os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(PhysicalMemoryExhaustion, match="descriptors"):
            Segment(PAGE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_cancelled_one_leaves_nothing() -> None:
    with pytest.raises(ProcessKilled):
        Segment(3 * segment.STEP, cancelled=lambda: True)


def test_a_read_only_descriptor_cannot_be_mapped_writable() -> None:
    made = Segment(PAGE)
    fd = made.open_anew(writable=False)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(fd, b"x", 0)
    os.close(fd)
    made.close()


# ---- processes ----------------------------------------------------------------------------


def test_death_is_seen_by_pidfd() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    pidfd = os.pidfd_open(child.pid)
    start = procfs.start_time(child.pid)
    assert not liveness.is_dead(pidfd)
    assert not liveness.wait_death(pidfd, 0.01)
    assert liveness.same_process_lives(child.pid, start)
    assert not liveness.same_process_lives(child.pid, start + 1)
    child.send_signal(signal.SIGKILL)
    assert liveness.wait_death(pidfd, 30)
    assert not liveness.same_process_lives(child.pid, start), "a zombie does not live"
    child.wait()
    assert not liveness.same_process_lives(child.pid, start)
    with pytest.raises(ProcessLookupError):
        procfs.maps(child.pid)
    os.close(pidfd)


def test_one_map_is_asked_for_as_it_is_listed() -> None:
    fd = os.open("/proc/self/maps", os.O_RDONLY)
    try:
        if map_at(fd, procfs.maps()[0].start) is None:
            pytest.skip("Linux before 6.11")
        made = [mmap.mmap(-1, 3 * PAGE), mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE)]
        listed = procfs.maps()
        found = [map_at(fd, entry.end - 1) for entry in listed]
        same = [bool(each) and procfs.is_that(each, entry) for each, entry in zip(found, listed, strict=True)]
        odd = [entry.path for entry, is_same in zip(listed, same, strict=True) if not is_same]
        assert set(odd) <= {"[heap]", "[vsyscall]", ""}, odd  # the heap grows meanwhile; vsyscall is no map
        shared = next(at for at, entry in enumerate(listed) if entry.perms == "rw-s" and entry.length == 3 * PAGE)
        for other in (listed[shared]._replace(perms="rw-p"), listed[shared]._replace(inode=1)):
            assert not procfs.is_that(found[shared], other)  # type: ignore[arg-type]
        assert map_at(fd, 0) is None and map_at(-1, 0) is None
        with pytest.raises(OverflowError):
            map_at(fd, -1)
        del made
    finally:
        os.close(fd)


def test_a_name_with_odd_letters_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a\rb\nc "
    path.write_bytes(bytes(PAGE))
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0):
        for entries in (procfs.maps(), [each.map for each in procfs.smaps("self")]):
            (entry,) = [each for each in entries if each.path.endswith("a\rb\\012c ")]
            assert entry.inode == path.stat().st_ino


def test_a_descriptor_is_closed_once() -> None:
    made = Descriptor(partial(os.open, "/dev/null", os.O_RDONLY))
    fd = made.fd
    assert os.fstat(fd)
    made.close()
    other = os.open("/dev/null", os.O_RDONLY)
    assert other == fd  # it is somebody else's now
    made.close()
    del made
    os.close(other)
    with pytest.raises(FileNotFoundError):
        Descriptor(partial(os.open, "/dev/nothing", os.O_RDONLY))


def test_own_start_time_and_maps() -> None:
    assert procfs.start_time(os.getpid()) == procfs.start_time(os.getpid()) > 0
    entries = procfs.maps("self")
    assert any(entry.path == "[stack]" for entry in entries)
    assert all(low.end <= high.start for low, high in itertools.pairwise(entries))
    assert procfs.address_bits() >= 47
    assert procfs.obstacle(entries[3].start, 1) == (entries[3].start, entries[3].end)
    assert procfs.obstacle(0x2345_0000_0000, PAGE) == (0, 0)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, PhysicalMemoryExhaustion),
        (errno.ENOMEM, PhysicalMemoryExhaustion),
        (errno.EMFILE, PhysicalMemoryExhaustion),
        (errno.ENFILE, PhysicalMemoryExhaustion),
        (errno.EFBIG, PhysicalMemoryExhaustion),
        (errno.EACCES, AccessDenied),
        (errno.EIO, PhysicalMemoryExhaustion),
    ],
)
def test_errno_becomes_an_error_of_ours(number: int, kind: type[Exception]) -> None:
    error = translate.frames_error(OSError(number, os.strerror(number)), PAGE)
    assert type(error) is kind
    assert len(str(error)) > 20


def test_the_mount_of_shm_is_found() -> None:
    mount, options = translate.shm_mount()
    assert mount in ("/dev/shm", "/dev", "/")
    assert options


def test_what_runs_and_what_waits() -> None:
    assert procfs.would_run(os.getpid())
    before = os.times().user
    assert before <= procfs.user_time(os.getpid()) <= os.times().user
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as child:
        wait_until(lambda: not procfs.would_run(child.pid), "that it waits")
        child.communicate()
    for ask in (procfs.would_run, procfs.user_time):
        with pytest.raises(OSError):
            ask(child.pid)


@pytest.mark.parametrize(("sent", "got"), [(1, 1), (2, 0), (3, 0)])
def test_no_more_descriptors_are_received_than_are_wanted(sent: int, got: int) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        socket.send_fds(theirs, [b"x"], [0] * sent)
        before = len(os.listdir("/proc/self/fd"))
        data, found = files.receive(ours, 9, 1)
        assert (data, len(found)) == (b"x", got)
        assert len(os.listdir("/proc/self/fd")) == before + got
        for fd in found:
            os.close(fd)
