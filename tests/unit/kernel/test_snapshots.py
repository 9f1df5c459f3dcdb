"""The books for whoever asks: of one moment, however long it takes to write them, and in turn with everybody else."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from conftest import PAGE

from realmap.errors import LimitReached, PhysicalMemoryExhaustion
from realmap.host import room
from realmap.kernel import dump, snapshots
from realmap.kernel.books import Books
from realmap.kernel.dump import Around, Picture
from realmap.kernel.limits import Limits
from realmap.kernel.processes import UserProcess
from realmap.kernel.snapshots import Snapshots
from realmap.memory.frames import OwnedFrames
from realmap.memory.kernel_memory import KernelMemory
from realmap.observe.audit import _recount
from realmap.observe.snapshot import Snapshot
from realmap.rights import MemoryType, u_rw
from realmap.wire import messages


@pytest.fixture
def books() -> Iterator[Books]:
    made = Books({}, Limits(), KernelMemory(length=64 * PAGE, lazy_unmap=8 * PAGE))
    yield made
    for process in made.processes:
        made.reap(process, 0.0)
    made.handles.clear()
    assert (made.frames.segments, made.frames.used) == (0, 0)


def around() -> Around:
    return Around(path="", alone=False, controls=0, threads=0, running=(), given_up=0, outbox=[])


def mapped(process: UserProcess, pages: int = 1, fragment: int | None = None) -> Any:
    frames = process.memory.allocator.allocate(pages * PAGE, fragment)
    return process.memory.enter_anywhere(frames, pages * PAGE, MemoryType.HEAP, u_rw)


def read(parts: Iterator[bytes]) -> Snapshot:
    return Snapshot.read(msgspec.msgpack.decode(b"".join(parts)))


class Desk:
    """Those who ask, and a loop whose jobs run when the test says so."""

    def __init__(self, take: Callable[[], Any]) -> None:
        self.jobs: deque[Callable[[], None]] = deque()
        self.snapshots = Snapshots(SimpleNamespace(post=self.jobs.append), take)  # type: ignore[arg-type]
        self.answers: list[Any] = []

    def ask(self, connection: Any) -> None:
        self.snapshots.begin(connection).begin(self.answers.append)

    def run(self) -> int:
        """Until nothing waits; how many turns that took."""
        turns = 0
        while self.jobs:
            self.jobs.popleft()()
            turns += 1
        return turns


def content(answer: Any) -> bytes:
    length, (descriptor,) = answer
    try:
        assert os.fstat(descriptor).st_size == length
        return os.pread(descriptor, length, 0)
    finally:
        os.close(descriptor)


def asker(closed: bool = False) -> Any:
    class Asker:  # compared by identity, as connections are
        pass

    made: Any = Asker()
    made.closed = closed
    return made


def test_a_picture_is_of_one_moment(books: Books) -> None:
    one, other = books.admit(1, 0), books.admit(2, 0)
    made = [mapped(one) for _ in range(300)]
    wide = mapped(other, 150, PAGE)  # more segments than rows are written at a time
    many = [mapped(other)]
    for _ in range(200):
        at = other.memory.find_available_space(PAGE)
        many.append(other.memory.map_partial_shared_mapping(many[0].frames, at, 0, PAGE, MemoryType.HEAP, u_rw))
    share = messages.Share(1, made[0].address, PAGE, int(u_rw), 2, 50.0, 0.0)
    token = books.handles.share(one, share, now=0.0)
    kept = one.memory.mirror_mapping(made[1].address, PAGE, kernel=books.memory)
    mirror = one.memory.mirror_mapping(made[2].address + 5, PAGE, kernel=books.memory)
    kept.drop()
    before = read(Picture(books, around()).written())
    parts = Picture(books, around()).written()
    got = [next(parts)]
    # All that a reader could see changes between the first part and the others.
    mirror.drop()
    for mapping in [*made[:100], wide, *many[:50]]:
        (one if mapping in made else other).memory.unmap(mapping.address, mapping.length).release()
    books.handles.revoke(one, token, 0.0)
    mapped(one, 3)
    books.reap(other, 0.0)
    after = read(iter([*got, *parts]))
    assert msgspec.structs.replace(after, time=0, handles=[], stats={}) == msgspec.structs.replace(
        before, time=0, handles=[], stats={}
    )
    assert [(each.uses, each.maker, each.length) for each in after.handles] == [(2, one.number, PAGE)]
    assert [len(process.mappings) for process in after.processes] == [300, 202]
    assert sorted(len(frames.segments) for frames in after.frames)[-2:] == [1, 150]
    assert max(frames.refcount for frames in after.frames) == 201
    assert len(after.mirrors) == len(after.kept) == len(after.handles) == 1
    assert _recount(after) == []
    assert len(got) == 1


@pytest.mark.parametrize("count", [0, 1, 15, 16, dump.BATCH - 1, dump.BATCH, dump.BATCH + 1, 2 * dump.BATCH])
def test_lists_of_any_length(books: Books, count: int) -> None:
    process = books.admit(1, 0)
    first = mapped(process, count, PAGE) if count else None
    for _ in range(count):
        mapped(process)
    found = read(Picture(books, around()).written())
    assert len(found.processes[0].mappings) == count + (first is not None)
    assert sorted(len(each.segments) for each in found.frames) == sorted([*[1] * count, *([count] if count else [])])


@pytest.mark.parametrize("each", [10_000, pytest.param(50_000, marks=pytest.mark.slow)])
def test_very_many_mappings(books: Books, each: int) -> None:
    for number in range(4):
        process = books.admit(number, 0)
        for at in range(each):
            address = process.memory.start + at * PAGE
            frames = OwnedFrames(PAGE)
            process.memory.create_regular_mapping(address, PAGE, MemoryType.NORMAL, u_rw, frames=frames)
    desk = Desk(lambda: Picture(books, around()))
    desk.ask(asker())
    turns = desk.run()
    data = content(desk.answers.pop())
    gc.collect()
    assert len(data) > 60 * each
    assert turns > each // 2500  # of a millisecond each: others had their turn as often
    found = msgspec.msgpack.decode(data)
    assert [len(mappings) for *_, mappings, _ in found["processes"]] == [each] * 4


# ---- who asks -------------------------------------------------------------------------------


class Pages:
    """Stands for a picture: a number of its own, in some parts."""

    taken = 0

    def __init__(self) -> None:
        Pages.taken += 1
        self.number = Pages.taken

    def written(self) -> Iterator[bytes]:
        for _ in range(5):
            yield b"%d;" % self.number


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setattr(snapshots, "SLICE", -1)
    monkeypatch.setattr(Pages, "taken", 0)
    return Desk(Pages)


def test_others_have_their_turn_between_the_parts(desk: Desk) -> None:
    desk.ask(asker())
    assert len(desk.jobs) == 1
    assert desk.answers == []
    assert desk.run() == 6
    assert content(desk.answers.pop()) == b"1;" * 5


def test_who_asks_while_one_is_written_shares_the_next(desk: Desk) -> None:
    desk.ask(asker())
    for _ in range(3):
        desk.ask(asker())
    desk.run()
    assert [content(answer) for answer in desk.answers] == [b"1;" * 5, *[b"2;" * 5] * 3]
    desk.answers.clear()
    desk.ask(asker())
    desk.run()
    assert content(desk.answers.pop()) == b"3;" * 5


def test_who_asks_too_often_is_told(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "MOST", 3)
    greedy = asker()
    for _ in range(4):  # one that is being written, and three that wait
        desk.ask(greedy)
    with pytest.raises(LimitReached):
        desk.ask(greedy)
    desk.ask(asker())
    desk.run()
    assert len([content(answer) for answer in desk.answers]) == 5


def test_nothing_is_left_where_everybody_has_gone(desk: Desk) -> None:
    before = len(os.listdir("/proc/self/fd"))
    gone = asker()
    desk.ask(gone)
    desk.jobs.popleft()()
    assert len(os.listdir("/proc/self/fd")) == before + 1
    gone.closed = True
    assert desk.run() == 1
    assert desk.answers == []
    assert len(os.listdir("/proc/self/fd")) == before
    desk.ask(asker())
    desk.run()
    assert content(desk.answers.pop()) == b"2;" * 5


def test_a_fork_keeps_none(desk: Desk) -> None:
    before = len(os.listdir("/proc/self/fd"))
    desk.ask(asker())
    desk.jobs.popleft()()
    desk.snapshots.after_fork_in_child()  # as in a child, which has copies of both
    assert len(os.listdir("/proc/self/fd")) == before
    desk.snapshots.after_fork_in_child()
    assert desk.answers == []


def test_nobody_can_change_what_was_sent(desk: Desk) -> None:
    desk.ask(asker())
    desk.ask(asker())
    desk.run()
    (_, (one,)), _ = desk.answers
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(one, b"x")
    again = os.open(f"/proc/self/fd/{one}", os.O_RDWR)
    with pytest.raises(PermissionError):
        os.pwrite(again, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(again, 1)
    assert fcntl.fcntl(again, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SEAL
    os.close(again)
    assert [content(answer) for answer in desk.answers] == [b"1;" * 5, b"2;" * 5]


@pytest.mark.parametrize("where", ["memfd_create", "write", "open", "memory"])
def test_want_of_memory_is_an_error_to_who_asked(desk: Desk, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    before = len(os.listdir("/proc/self/fd"))

    def fail(*_: object) -> int:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with monkeypatch.context() as patched:
        if where == "memory":
            patched.setattr(room, "memory_left", lambda: 1)
            patched.setattr(room, "_allowance", 0)
        else:
            patched.setattr(os, where, fail)
        desk.ask(asker())
        desk.ask(asker())
        desk.run()
    assert [type(answer) for answer in desk.answers] == [PhysicalMemoryExhaustion] * 2
    assert len(os.listdir("/proc/self/fd")) == before
    desk.answers.clear()
    desk.ask(asker())
    desk.run()
    assert content(desk.answers.pop()).endswith(b";")


def test_a_full_dev_shm_does_not_matter(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    full = SimpleNamespace(f_blocks=1, f_bavail=0, f_frsize=PAGE)
    monkeypatch.setattr(room, "_allowance", 0)
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    desk.ask(asker())
    desk.run()
    assert content(desk.answers.pop()) == b"1;" * 5
