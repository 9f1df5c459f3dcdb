"""The status page by itself: what it says, who may write to it, and readers of what is none."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from conftest import PAGE

import realmap
from realmap import Kernel, SyscallTimeout
from realmap.host import runtime
from realmap.wire import status
from realmap.wire.status import CALLER, LONGEST_NAME, PLACES, TURN, Page, Patience, Status, Work, label, look

PUNCH = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE with FALLOC_FL_KEEP_SIZE


@pytest.fixture
def page(tmp_path: Path) -> Iterator[tuple[Page, int, str]]:
    """A page of this process, its descriptor, and the path of the socket that it is looked for by."""
    path = str(tmp_path / "k.sock")
    lock, made = runtime.SocketLock(path), Page()
    number = made.open()
    lock.note(number)
    yield made, number, path
    made.close()
    lock.release()


def begin(page: Page, name: str, caller: int, ago: float) -> None:
    """As the kernel does: a handler that began some seconds ago."""
    page.name(label(name))
    page.words[TURN] = time.monotonic_ns() - int(ago * 1e9)
    page.words[CALLER] = caller


def test_what_it_says_is_read(page: tuple[Page, int, str], monkeypatch: pytest.MonkeyPatch) -> None:
    made, _, path = page
    now = time.monotonic_ns()
    monkeypatch.setattr(time, "monotonic_ns", lambda: now)  # it stands still
    me = os.getpid()
    assert look(path) == Status(me)  # it has not said anything yet
    made.turn()
    assert str(look(path)).startswith(f"kernel {me} has not come round for 0.0 s")
    begin(made, "x", 456, ago=12)
    found = look(path)
    assert str(found) == f"kernel {me} is in handler 'x' of process 456 since 12 s"
    assert found is not None
    assert found.is_stuck
    made.words[CALLER] = 0
    found = look(path)
    assert found is not None
    assert found.work is None
    assert not found.is_stuck  # it may be at a large snapshot
    assert str(found) == f"kernel {me} has not come round for 12 s"
    begin(made, "y", 7, ago=0.5)
    found = look(path)
    assert found is not None
    assert not found.is_stuck
    assert str(found).startswith(f"kernel {me} is in handler 'y' of process 7 since 0.5 s")
    made.words[CALLER] = 0
    made.rest()
    assert str(look(path)) == f"kernel {me} does not wake up"  # for who has asked it


def test_handlers_on_other_threads(page: tuple[Page, int, str]) -> None:
    made, _, path = page
    made.rest()
    now = time.monotonic()
    places = [made.begin(100 + at, label(f"h{at}"), now - 20 + at) for at in range(PLACES + 2)]
    assert sorted(places) == [-1, -1, *range(PLACES)]
    found = look(path)
    assert found is not None
    assert [(work.handler, work.caller) for work in found.beside] == [
        (f"h{at}", 100 + at) for at in reversed(range(PLACES))
    ]
    assert re.fullmatch(
        rf"kernel {os.getpid()} does not wake up; on another thread it is in handler 'h{PLACES - 1}' of process "
        rf"{99 + PLACES} since \d\.\d s, and {PLACES - 1} more",
        str(found),
    )
    for place in places:
        made.end(place)
    found = look(path)
    assert found is not None
    assert found.beside == ()
    assert made.begin(1, label("x"), now) >= 0


def test_one_that_is_stopped_is_stuck_whatever_it_was_at() -> None:
    assert Status(123, stopped=True, work=Work("x", 4, 0.1), seconds=0.1).is_stuck
    assert str(Status(123, stopped=True, seconds=3)) == "kernel 123 is stopped (SIGSTOP)"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("x" * LONGEST_NAME, "x" * LONGEST_NAME),
        ("x" * (LONGEST_NAME + 1), "x" * LONGEST_NAME),
        ("x" + "é" * 33, "x" + "é" * 31),
        ("xx" + "\U0001f600" * 17, "xx" + "\U0001f600" * 15),
        ("\x1b[31m\n'", "\x1b[31m\n'"),
        ("\udcff", "?"),
    ],
)
def test_a_name_is_cut_at_a_whole_letter(page: tuple[Page, int, str], name: str, shown: str) -> None:
    made, _, path = page
    assert len(label(name)) == LONGEST_NAME
    begin(made, name, 1, ago=2)
    found = look(path)
    assert found is not None
    assert found.work is not None
    assert found.work.handler == shown
    assert str(found).isprintable()


def by_truncate(fd: int) -> None:
    os.ftruncate(fd, 0)


def by_growing(fd: int) -> None:
    os.ftruncate(fd, 2 * PAGE)


def by_write(fd: int) -> None:
    os.pwrite(fd, b"garbage!" * 12, 0)


def by_map(fd: int) -> None:
    mmap.mmap(fd, PAGE)


def by_hole(fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    length = ctypes.c_int64(PAGE)
    if libc.fallocate(fd, PUNCH, ctypes.c_int64(0), length):
        raise OSError(ctypes.get_errno(), "fallocate")


def by_unsealing(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


WAYS = (by_truncate, by_growing, by_write, by_map, by_hole, by_unsealing)


@pytest.mark.parametrize("way", WAYS)
def test_nobody_but_the_kernel_changes_it(page: tuple[Page, int, str], way: Callable[[int], None]) -> None:
    made, number, path = page
    begin(made, "x", 456, ago=2)
    fd = os.open(f"/proc/self/fd/{number}", os.O_RDWR)  # whoever is of the same uid may
    try:
        with pytest.raises(PermissionError):
            way(fd)
    finally:
        os.close(fd)
    begin(made, "y", 789, ago=2)  # nothing is gone under the one who writes
    found = look(path)
    assert found is not None
    assert found.work is not None
    assert found.work[:2] == ("y", 789)


@pytest.mark.parametrize(
    "text",
    [b"", b"x", b"1.2", b"1.2.3.4.5", b"\xff" * 300, b"....", b"9" * 500, b"-1.-1.-1.-1", b"1\n.2.3.4"],
)
def test_a_lock_that_says_something_else(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "k.sock.lock").write_bytes(text)
    assert look(str(tmp_path / "k.sock")) is None


def test_a_lock_that_is_no_file(tmp_path: Path) -> None:
    path = str(tmp_path / "k.sock")
    assert look(path) is None
    os.mkfifo(path + ".lock")  # which nobody writes to: opened the usual way, it would be waited for
    assert look(path) is None
    os.unlink(path + ".lock")
    os.mkdir(path + ".lock")
    assert look(path) is None
    os.rmdir(path + ".lock")
    os.symlink("/dev/zero", path + ".lock")
    assert look(path) is None
    assert look("\0") is None
    assert look("") is None


def test_a_descriptor_that_is_something_else(tmp_path: Path) -> None:
    """What is behind it is not even opened; a page of another version is not read."""
    path = str(tmp_path / "k.sock")
    reader, writer = os.pipe()
    short = os.memfd_create("realmap-status")
    other = os.memfd_create("realmap-status")
    os.write(other, b"realmap\xff" + bytes(PAGE))
    file = os.open("/dev/zero", os.O_RDONLY)
    lock = runtime.SocketLock(path)
    try:
        for number in (reader, writer, short, other, file, -1, 1 << 20):
            lock.note(number)
            assert look(path) == Status(os.getpid())
    finally:
        lock.release()
        for fd in (reader, writer, short, other, file):
            os.close(fd)


def test_the_page_of_the_dead_is_not_believed(page: tuple[Page, int, str]) -> None:
    made, number, path = page
    begin(made, "x", 456, ago=12)
    namespace, pid, start = runtime.stamp_in(runtime.stamp())
    lock = Path(path + ".lock")
    assert lock.read_text() == f"{namespace}.{pid}.{start}.{number}"
    assert look(path) is not None
    lock.write_text(f"{namespace}.{pid}.{start + 1}.{number}")  # the pid is another's now
    assert look(path) is None
    lock.write_text(f"{namespace + 1}.{pid}.{start}.{number}")  # means nothing here
    assert look(path) is None
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    lock.write_text(f"{namespace}.{int(gone.stdout)}.{start}.{number}")
    assert look(path) is None


def test_it_is_found_by_a_link_to_the_socket(page: tuple[Page, int, str], tmp_path: Path) -> None:
    _, _, path = page
    link = tmp_path / "link.sock"
    link.symlink_to(path)
    assert look(str(link)) == look(path) == Status(os.getpid())


def test_a_kernel_without_a_page_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(38, "no memfd here")

    path = str(tmp_path / "k.sock")
    with monkeypatch.context() as patch:
        patch.setattr(os, "memfd_create", refuse)
        with Kernel(path=path, spin=0) as kernel:
            assert look(path) == Status(os.getpid())
            with realmap.connect(kernel.path) as me:
                assert me.query(me.map(PAGE).address).length == PAGE
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", refuse)  # the disk is full
        with Kernel(path=path) as kernel:
            assert look(path) is None
            with realmap.connect(kernel.path) as me:
                assert me.pid == os.getpid()


def test_the_page_ends_with_its_kernel(tmp_path: Path) -> None:
    path = str(tmp_path / "k.sock")
    for _ in range(2):
        with Kernel(path=path):
            assert look(path) is not None
        assert look(path) is None
        assert not list(tmp_path.iterdir())


def test_a_kernel_that_is_not_stuck_is_waited_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    now, at = [100.0], [Status(5, seconds=20.0)]
    monkeypatch.setattr(status.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(status, "look", lambda _: at[0])
    patience, waited = Patience("path", "books"), 0.0
    with pytest.raises(
        SyscallTimeout, match=r"no answer to 'books' within 30.0 s: kernel 5 has not come round for 20 s$"
    ):
        while True:
            more = patience()
            assert 0 < more <= status.LATE
            waited += more
            now[0] += more
    assert waited == status.BOUND
    patience = Patience("path", "books")
    assert patience() == status.LATE
    now[0] += 1
    at[0] = Status(5, work=Work("x", 6, 0.9), seconds=0.9)  # others' short calls come first
    assert patience() > 0
    now[0] += 1
    at[0] = Status(5, work=Work("x", 6, 1.9), seconds=1.9)
    with pytest.raises(SyscallTimeout, match=r"^kernel 5 is in handler 'x' of process 6 since 1\.9 s$") as caught:
        patience()
    assert (caught.value.name, caught.value.timeout) == ("books", 2.0)
    at[0] = None  # type: ignore[call-overload]
    assert patience() > 0  # nothing is known of it: it may answer yet


def test_one_that_gets_no_cpu_is_waited_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    now, had, would_run = [100.0], [7.0], [True]
    monkeypatch.setattr(status.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(status, "look", lambda _: Status(5, work=Work("x", 6, 9.0), seconds=9.0))
    monkeypatch.setattr(status.runtime, "kernel_at", lambda _: (5, 0))
    monkeypatch.setattr(status.procfs, "user_time", lambda _: had[0])
    monkeypatch.setattr(status.procfs, "would_run", lambda _: would_run[0])

    def asked(seconds: float) -> Patience:
        patience = Patience("path", "books")
        patience()
        now[0] += seconds
        return patience

    assert asked(1)() == status.LATE
    with pytest.raises(
        SyscallTimeout, match=r"no answer to 'books' within 30.0 s: its kernel gets no CPU, or Linux keeps it$"
    ):
        asked(30)()
    would_run[0] = False  # a handler waits for something, and keeps the GIL
    with pytest.raises(SyscallTimeout, match=r"^kernel 5 is in handler"):
        asked(1)()
    would_run[0] = True
    patience = asked(1)
    had[0] += 0.6
    with pytest.raises(SyscallTimeout, match=r"^kernel 5 is in handler"):
        patience()


def test_one_that_has_not_woken_since_it_was_asked_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    asleep = Status(5, beside=(Work("x", 6, 12.0),), seconds=12.0, asleep=True)
    at = [asleep]
    monkeypatch.setattr(status.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(status, "look", lambda _: at[0])
    patience = Patience("path", "books")
    assert patience() == status.LATE
    now[0] += 1
    assert patience() == status.LATE  # the machine may be busy
    at[0] = msgspec.structs.replace(asleep, seconds=1.5)
    now[0] += 1
    assert patience() == status.LATE  # it has woken since
    at[0] = Status(5, seconds=12.0)
    now[0] += 1
    assert patience() == status.LATE  # somebody else has asked for a large snapshot
    at[0] = Status(5, beside=asleep.beside, seconds=12.0)
    with pytest.raises(SyscallTimeout, match=r"^kernel 5 has not come round for 12 s; on another thread"):
        patience()
    at[0] = asleep
    now[0] += 1
    sentence = "kernel 5 does not wake up; on another thread it is in handler 'x' of process 6 since 12 s"
    with pytest.raises(SyscallTimeout, match=f"^{sentence}$"):
        patience()
