"""Whose turn it is: of a client's messages, of the jobs of processes, of who looks for heirs."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from queue import Empty
from typing import Any

import msgspec
import pytest
from conftest import BOUND, PAGE
from raw_client import RawClient

import realmap
from realmap import Kernel, Limits
from realmap.kernel.books import Books
from realmap.kernel.heirs import Heirs
from realmap.kernel.processes import UserProcess
from realmap.kernel.services import SERVICES
from realmap.memory import KernelMemory
from realmap.rights import MemoryType, u_rw
from realmap.serving.workers import IDLE, Share, Workers
from realmap.wire import channel, messages


def test_one_message_a_turn_and_what_came_by_the_socket_first() -> None:
    """Of a client that keeps its socket and its ring full: others have their turn after each of its messages."""
    noted: list[str] = []

    @realmap.syscall
    def note(call: realmap.Call, what: str) -> None:
        noted.append(what)

    kernel = Kernel(syscalls=[note])
    kernel._open()
    try:
        clients: list[RawClient] = []
        connecting = threading.Thread(target=lambda: clients.append(RawClient(kernel.path)))
        connecting.start()
        while not clients:
            kernel.loop.attend(0.05)
        connecting.join(BOUND)

        def packed(what: str) -> bytes:
            return msgspec.msgpack.encode(messages.Call(0, "note", [what]))  # type: ignore[arg-type]

        with clients[0] as client:
            for number in range(4):
                client.sock.send(bytes([channel.WHOLE]) + packed(f"socket {number}"))
            kernel.clients.rings[0].owner.behind = True  # as its ring says
            assert client.ring._send(packed("ring"), -1) >= 0
            for turn in range(1, 6):
                kernel.clients.take_from_ring(kernel.clients.rings[0])
                assert len(noted) == turn
            client.sock.send(bytes([channel.WHOLE]) + packed("socket 4"))
            assert client.ring._send(packed("ring"), -1) >= 0
            kernel.clients.take_from_ring(kernel.clients.rings[0])
            kernel.loop.attend(0)  # it has had its turn
            assert noted[5:] == ["ring"]
            kernel.loop.attend(0)
        assert noted == [*(f"socket {number}" for number in range(4)), "ring", "ring", "socket 4"]
    finally:
        kernel._close()


class Elsewhere:
    """In place of a loop and its workers: jobs are run when the test says so."""

    def __init__(self) -> None:
        self.jobs: list[Callable[[], None]] = []

    def submit(self, job: Callable[[], None]) -> None:
        self.jobs.append(job)

    def post(self, job: Callable[[], None]) -> None:
        job()

    def after(self, seconds: float, job: Callable[[], None]) -> None:
        self.jobs.append(job)


def test_jobs_wait_for_those_of_their_own_process_alone() -> None:
    elsewhere, beside, failed = Elsewhere(), [], []  # type: ignore[var-annotated]
    one, two, other = (Share(elsewhere, 1, each) for each in (beside, beside, []))  # type: ignore[arg-type]
    for share in (one, two, two, other):
        share.submit(lambda: None, failed.append)
    assert (len(elsewhere.jobs), one.running, two.running, other.running) == (2, 1, 0, 1)
    one.ended()
    assert (len(elsewhere.jobs), one.running, two.running) == (3, 0, 1)
    for share in (one, two):
        share.cancel()
    assert (len(failed), beside) == (1, [two])
    two.ended()
    assert (len(elsewhere.jobs), beside) == (3, [])


def test_an_idle_thread_whose_job_another_one_took_ends_all_the_same() -> None:
    workers, waits = Workers(), []

    class Taken:
        def get(self, timeout: float | None = None) -> None:
            waits.append(timeout)
            workers._idle = len(waits) - 1  # at first the job is promised, then the other one has it
            raise Empty

    workers._queue = Taken()  # type: ignore[assignment]
    assert workers._next() is None
    assert waits == [IDLE] * 2


def test_any_number_of_jobs_fail_one_after_the_other_and_not_within_one_another() -> None:
    class NoThread(Workers):
        def submit(self, job: Callable[[], None]) -> None:
            raise RuntimeError("can't start new thread")

    told: list[BaseException] = []

    def failed(error: BaseException) -> None:
        told.append(error)
        share.hold(False)  # as who sends the error does, while its client has some to read

    share = Share(NoThread(), 4, [])
    share.hold(True)
    for _ in range(2000):
        share.submit(lambda: None, failed)
    share.hold(False)
    assert (len(told), share.running) == (2000, 0)


def ended(books: Books, pid: int) -> UserProcess:
    """A process that had forked, and has a page."""
    process = books.admit(pid, 7)
    answer: Any = SERVICES[messages.Map](
        books, process, messages.Map(1, PAGE, int(MemoryType.HEAP), int(u_rw), None, None, True)
    )
    channel.close_all(answer[1])
    process.forked = True
    assert books.reap(process, 0.0)
    return process


def test_one_search_for_all_that_have_ended_by_then() -> None:
    books, elsewhere = Books({}, Limits(), KernelMemory(length=16 * PAGE)), Elsewhere()
    heirs = Heirs(books, elsewhere, elsewhere)  # type: ignore[arg-type]
    for pid in range(1, 21):
        heirs.search(ended(books, pid))
    assert (len(elsewhere.jobs), len(books.inheritance)) == (1, 20)
    elsewhere.jobs.pop()()
    assert (len(elsewhere.jobs), len(books.inheritance)) == (1, 19)
    elsewhere.jobs.pop()()
    assert (len(elsewhere.jobs), len(books.inheritance), books.frames.segments) == (0, 0, 0)


@pytest.mark.parametrize("short_of", ["threads", "descriptors"])
def test_who_could_not_be_looked_for_is_looked_for_again(short_of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    books, elsewhere = Books({}, Limits(), KernelMemory(length=16 * PAGE)), Elsewhere()
    heirs = Heirs(books, elsewhere, elsewhere)  # type: ignore[arg-type]
    monkeypatch.setattr("realmap.kernel.heirs.LONGEST_REST", 0.0)

    def fail(*_: object) -> None:
        raise RuntimeError if short_of == "threads" else OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as short:
        if short_of == "threads":
            short.setattr(elsewhere, "submit", fail)
        else:
            short.setattr("realmap.kernel.heirs.procfs.who_maps", fail)
        heirs.search(ended(books, 1))
        if short_of == "descriptors":
            elsewhere.jobs.pop()()
        assert (len(books.inheritance), heirs.searches) == (1, 1)
    while elsewhere.jobs:
        elsewhere.jobs.pop()()
    assert (len(books.inheritance), heirs.searches, books.frames.segments) == (0, 0, 0)
