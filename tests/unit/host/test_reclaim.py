"""Unlinking what nobody uses: never what anybody has, wherever and however; nothing is lost on any way out."""

from __future__ import annotations

import errno
import mmap
import os
import random
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import BOUND, PAGE, scaled, wait_until

from realmap.host import reclaim, runtime
from realmap.host.reclaim import IN_USE, Named, unlink_unused

SHM = "/dev/shm"


@pytest.fixture
def name() -> Iterator[str]:
    """What names in /dev/shm begin with that are this test's."""
    name = f"realmap-test-{os.getpid()}-{secrets.token_hex(4)}"
    yield name
    for left in os.listdir(SHM):
        if left.startswith(name):
            with suppress(IsADirectoryError, PermissionError):
                os.unlink(f"{SHM}/{left}")


def make(*names: str) -> Named:
    """A segment of a page with these names, which nobody has open."""
    fd = os.open(f"{SHM}/{names[0]}", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    os.posix_fallocate(fd, 0, PAGE)
    status = os.fstat(fd)
    os.close(fd)
    for other in names[1:]:
        os.link(f"{SHM}/{names[0]}", f"{SHM}/{other}")
    return Named(names, status.st_dev, status.st_ino)


def is_there(file: Named) -> bool:
    """Under all of its names."""
    found = []
    for name in file.names:
        try:
            status = os.stat(f"{SHM}/{name}")
            found.append((status.st_dev, status.st_ino) == (file.device, file.inode))
        except FileNotFoundError:
            found.append(False)
    assert len(set(found)) == 1, "some names went, some stayed"
    return found[0]


def outcome(file: Named) -> str:
    ((_, why),) = unlink_unused(SHM, [file])
    return why


def test_what_nobody_has_goes_with_all_of_its_names(name: str) -> None:
    files = [make(f"{name}{number}", f"{name}{number}.2") for number in range(reclaim.BATCH + 3)]
    assert list(unlink_unused(SHM, files)) == [(file, "") for file in files]
    assert not [left for left in os.listdir(SHM) if left.startswith(name)]


def _by_map(path: str) -> Callable[[], None]:
    fd = os.open(path, os.O_RDONLY)
    window = mmap.mmap(fd, PAGE, prot=mmap.PROT_READ)
    os.close(fd)
    return window.close


def _by_descriptor(path: str) -> Callable[[], None]:
    fd = os.open(path, os.O_RDONLY)
    return lambda: os.close(fd)


def _on_its_way(path: str) -> Callable[[], None]:
    """In no process's table: /proc does not show it."""
    ours, theirs = socket.socketpair()
    fd = os.open(path, os.O_RDWR)
    socket.send_fds(ours, [b"x"], [fd])
    os.close(fd)
    ours.close()
    return theirs.close


def _by_another(path: str) -> Callable[[], None]:
    """A process of other namespaces."""
    unshare = ["unshare", "-mpf", "--mount-proc"] if not os.geteuid() else []
    child = subprocess.Popen(
        [*unshare, "sh", "-c", f'exec 3<"{path}"; echo; read x'], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.readline()

    def end() -> None:
        child.communicate(b"\n", timeout=BOUND)

    return end


@pytest.mark.parametrize("have", [_by_map, _by_descriptor, _on_its_way, _by_another])
def test_what_anybody_has_stays(name: str, have: Callable[[str], Callable[[], None]]) -> None:
    file, free = make(name), make(f"{name}.free")
    let_go = have(f"{SHM}/{name}")
    try:
        assert list(unlink_unused(SHM, [file, free])) == [(file, IN_USE), (free, "")]
        assert is_there(file)
    finally:
        let_go()
    assert outcome(file) == ""


def test_another_file_of_that_name_stays(name: str) -> None:
    file = make(name)
    os.unlink(f"{SHM}/{name}")
    other = make(name)
    assert outcome(file) == "another file has that name by now"
    assert is_there(other)
    os.unlink(f"{SHM}/{name}")
    assert outcome(other) == "gone already"


def test_one_that_comes_between_the_look_and_the_rename_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make(name)
    others = []
    real = os.rename

    def rename(old: str, new: str) -> None:
        if not others:
            os.unlink(old)
            others.append(make(name))
        real(old, new)

    monkeypatch.setattr(reclaim.os, "rename", rename)
    assert outcome(file) == "another file has that name by now"
    assert is_there(others[0])


def test_what_is_no_segment_stays(name: str) -> None:
    os.mkfifo(f"{SHM}/{name}.fifo")
    os.symlink("/etc/passwd", f"{SHM}/{name}.link")
    os.mkdir(f"{SHM}/{name}.folder")
    try:
        for kind in ("fifo", "link", "folder"):
            status = os.lstat(f"{SHM}/{name}.{kind}")
            assert outcome(Named((f"{name}.{kind}",), status.st_dev, status.st_ino)) != ""
            assert os.path.lexists(f"{SHM}/{name}.{kind}")
    finally:
        os.rmdir(f"{SHM}/{name}.folder")
    assert os.path.exists("/etc/passwd")


def opening(name: str) -> int:
    """A child that opens it, says whether the name still leads to it, and ends."""
    pid = os.fork()
    if not pid:
        fd = os.open(f"{SHM}/{name}", os.O_RDWR)
        os._exit(0 if os.fstat(fd).st_nlink else 1)
    return pid


def test_whoever_opens_it_meanwhile_gets_it_and_it_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the lease and the rename: the one moment at which the name is still found."""
    file, children = make(name), []
    real = os.rename

    def rename(old: str, new: str) -> None:
        children.append(opening(name))
        if len(children) == 1:  # it waits for the lease, in open(2)
            place = Path(f"/proc/{children[0]}/wchan")
            wait_until(lambda: "break_lease" in place.read_text(), "the wait of whoever opens it")
        real(old, new)

    monkeypatch.setattr(reclaim.os, "rename", rename)
    assert outcome(file) == IN_USE
    assert os.waitpid(children[0], 0)[1] == 0
    assert is_there(file)


def test_a_name_given_to_another_meanwhile_is_the_others(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file, others = make(name), []
    monkeypatch.setattr(reclaim._Taken, "is_free", property(lambda self: others.append(make(name))))
    assert outcome(file) == IN_USE
    assert is_there(others[0])
    assert os.stat(f"{SHM}/{name}").st_nlink == 1


def test_without_an_inode_for_a_second_name_the_first_is_put_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full /dev/shm."""
    file = make(name)

    def link(*names: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(reclaim.os, "link", link)
    monkeypatch.setattr(reclaim._Taken, "is_free", False)
    assert outcome(file) == IN_USE
    assert is_there(file)


def test_interrupted_it_puts_back_what_it_has_not_unlinked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [make(f"{name}{number}", f"{name}{number}.2") for number in range(5)]

    def interrupt(seconds: float) -> None:
        assert not any(is_there(file) for file in files)
        raise KeyboardInterrupt

    monkeypatch.setattr(reclaim.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(unlink_unused(SHM, files))
    assert all(is_there(file) for file in files)
    monkeypatch.undo()
    going = unlink_unused(SHM, files)
    assert next(going) == (files[0], "")
    going.close()
    assert [is_there(file) for file in files] == [False, True, True, True, True]


@pytest.mark.alone
def test_killed_amid_it_what_is_left_is_swept(name: str) -> None:
    file = make(name)
    pid = os.fork()
    if not pid:
        reclaim.time.sleep = lambda seconds: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        outcome(file)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert not is_there(file)
    assert any(runtime.maker_of(left) == pid for left in runtime.sweep())


def test_what_is_another_users_stays(name: str) -> None:
    if os.geteuid():
        pytest.skip("needs root, for another user")
    file = make(name)
    os.chmod(f"{SHM}/{name}", 0o666)
    pid = os.fork()
    if not pid:
        os.setgid(65534)
        os.setuid(65534)
        os._exit(outcome(file) != "it belongs to uid 0")
    assert os.waitpid(pid, 0)[1] == 0
    assert is_there(file)


# ---- raced ------------------------------------------------------------------------------------


def attach(name: str, draw: random.Random) -> str:
    """Opens it about when it is reclaimed, keeps it for a while by a map alone, and says what became of it."""
    end = time.perf_counter() + draw.random() * 0.003
    while time.perf_counter() < end:
        pass
    try:
        fd = os.open(f"{SHM}/{name}", os.O_RDWR)
    except FileNotFoundError:
        return "gone"
    window = mmap.mmap(fd, PAGE)
    at = os.fstat(fd)
    os.close(fd)
    time.sleep(draw.random() * 0.02)  # the reclaim goes on
    try:
        here = os.path.samestat(os.stat(f"{SHM}/{name}"), at)
    except FileNotFoundError:
        here = False
    window.close()
    return "attached" if here else "taken"


def attacher(name: str, seed: int, ours: socket.socket) -> None:
    draw = random.Random(seed)
    while said := ours.recv(100):
        ours.send(attach(f"{name}{said.decode()}", draw).encode())


def race(name: str, rounds: int) -> dict[str, int]:
    """How often it went, how often it stayed; it fails where one in use was taken."""
    draw, ends, pids = random.Random(name), [], []
    for seed in range(3):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if not pid:
            for end in [ours, *ends]:
                end.close()
            attacher(name, seed, theirs)
            os._exit(0)
        theirs.close()
        ends.append(ours)
        pids.append(pid)
    counts = {"went": 0, "stayed": 0}
    for number in range(rounds):
        file = make(f"{name}{number}")
        for end in ends:
            end.send(str(number).encode())
        wait = time.perf_counter() + draw.random() * 0.003
        while time.perf_counter() < wait:
            pass
        why = outcome(file)
        said = [end.recv(100).decode() for end in ends]
        assert "taken" not in said, f"round {number}: {why!r}, {said}"
        assert why in ("", IN_USE)
        assert is_there(file) == bool(why)
        counts["stayed" if why else "went"] += 1
        if why:
            assert outcome(file) == ""
    for end, pid in zip(ends, pids, strict=True):
        end.close()
        assert os.waitpid(pid, 0)[1] == 0
    return counts


def test_raced_by_attaching_processes(name: str) -> None:
    counts = race(name, 100)
    assert counts["went"] and counts["stayed"], counts


@pytest.mark.slow
def test_raced_by_attaching_processes_many_times(name: str) -> None:
    race(name, scaled(2000))
