"""The books by themselves: no kernel runs, nobody is connected, and time is what the test says it is."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from realmap.errors import (
    AccessDenied,
    InvalidHandle,
    InvalidSize,
    LimitReached,
    PhysicalMemoryExhaustion,
    VirtualMemoryExhaustion,
)
from realmap.kernel import Kernel, handles, inheritance, limits, observer, ports, processes
from realmap.kernel import books as books_
from realmap.kernel.books import Books
from realmap.kernel.limits import Limits
from realmap.kernel.processes import UserProcess
from realmap.kernel.services import LONG_BYTES, SERVICES, Later
from realmap.memory.kernel_memory import KernelMemory
from realmap.pages import PAGE_SIZE as PAGE
from realmap.rights import MemoryType, u_r, u_rw
from realmap.serving import registry
from realmap.wire import channel, messages

FLOOR = [books_, handles, inheritance, limits, observer, ports, processes, registry]


@pytest.mark.parametrize("module", FLOOR, ids=lambda module: module.__name__.rpartition(".")[2])
def test_no_sockets_no_threads_no_clock(module: ModuleType) -> None:
    found: set[str] = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    assert found
    assert not found & {"select", "socket", "threading", "time"}


@pytest.fixture
def books() -> Iterator[Books]:
    made = Books(
        {},
        Limits(processes=2, mappings=3, handles=2),
        KernelMemory(length=16 * PAGE),
        memory_limit=8 * PAGE,
        process_limit=4 * PAGE,
    )
    yield made
    for process in made.processes:
        made.reap(process, 0.0)
    made.handles.clear()
    for dead in made.inheritance:
        made.inheritance.end(dead)
    assert (made.frames.segments, made.frames.used) == (0, 0)


def ask(books: Books, process: UserProcess, request: messages.Request) -> Any:
    """The value of the answer of the service for it."""
    answer = SERVICES[type(request)](books, process, request)
    assert answer is not None and not isinstance(answer, Later)
    value, descriptors = answer
    channel.close_all(descriptors)
    return value


def mapped(books: Books, process: UserProcess, length: int = PAGE) -> int:
    """The address of a new mapping."""
    request = messages.Map(1, length, int(MemoryType.HEAP), int(u_rw), None, None, True)
    address: int = ask(books, process, request)[0]
    return address


def test_every_request_but_calls_and_asks_has_a_service() -> None:
    of_seats = Kernel()._seats.services
    assert set(SERVICES | of_seats) == set(messages.Request.__args__) - {messages.Call, messages.Ask}


def test_what_each_may_have(books: Books) -> None:
    one = books.admit(1, 0)
    books.admit(2, 0)
    with pytest.raises(LimitReached, match="2 processes"):
        books.admit(3, 0)
    with pytest.raises(PhysicalMemoryExhaustion):
        mapped(books, one, 5 * PAGE)
    for _ in range(3):
        mapped(books, one)
    with pytest.raises(VirtualMemoryExhaustion, match="3 mappings"):
        mapped(books, one)
    assert not books.reap(one, 0.0)
    assert not one.alive
    assert (books.frames.used, len(books.processes)) == (0, 1)


def test_a_handle_ends_when_the_time_that_is_given_says_so(books: Books) -> None:
    one, two = books.admit(1, 0), books.admit(2, 0)
    request = messages.Share(1, mapped(books, one), PAGE, int(u_r), None, 5.0, 0.0)
    token = books.handles.share(one, request, 100.0)
    assert books.handles.find(token, 104.9).maker is one
    with pytest.raises(AccessDenied, match="process 1 made"):
        books.handles.revoke(two, token, 104.9)
    books.handles.expire(104.9)
    assert len(books.handles) == 1
    books.handles.expire(105.0)
    with pytest.raises(InvalidHandle, match="expired"):
        books.handles.find(token, 105.0)


def published(name: str, length: int = PAGE, keep: float = 0.0) -> messages.Publish:
    memory = messages.Map(1, length, int(MemoryType.HEAP), int(u_rw), None, None, True)
    return messages.Publish(1, memory, name, keep)


def test_memory_and_its_name_come_together(books: Books) -> None:
    one, two = books.admit(1, 0), books.admit(2, 0)
    address, length, *_ = ask(books, one, published("both", 100))
    assert (length, ask(books, one, messages.Query(1, address)).refcount) == (PAGE, 2)
    found = ask(books, two, messages.Attach(1, messages.NAMED + "both", 0, None, None))
    assert (found[6], found[7]) == (100, u_rw)
    ask(books, two, messages.Revoke(1, messages.NAMED + "both"))
    assert ask(books, one, published("both"))


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (published("taken"), InvalidHandle),
        (published("other", keep=-1.0), InvalidSize),
        (published("other", keep=math.nan), InvalidSize),
        (published("other", 5 * PAGE), PhysicalMemoryExhaustion),
        (published("other", -1), InvalidSize),
    ],
)
def test_neither_comes_alone(books: Books, request_: messages.Publish, error: type[Exception]) -> None:
    one = books.admit(1, 0)
    ask(books, one, published("taken"))
    with pytest.raises(error):
        ask(books, one, request_)
    assert (len(one.memory), len(books.handles), books.frames.used, books.frames.segments) == (1, 1, PAGE, 1)


def test_a_name_beyond_the_limit_takes_no_memory(books: Books) -> None:
    one = books.admit(1, 0)
    for name in ("one", "two"):
        ask(books, one, published(name))
    with pytest.raises(LimitReached, match="handles"):
        ask(books, one, published("three"))
    assert (len(one.memory), len(books.handles), books.frames.used) == (2, 2, 2 * PAGE)


def test_a_name_that_is_taken_while_its_memory_is(books: Books) -> None:
    made = Books({}, Limits(), KernelMemory(length=16 * PAGE))
    one, size = made.admit(1, 0), LONG_BYTES + PAGE
    got = [SERVICES[messages.Publish](made, one, published("twice", size)) for _ in range(2)]
    first, second = [(each, each.work()) for each in got if isinstance(each, Later)]
    channel.close_all(first[0].end(first[1])[1])
    with pytest.raises(InvalidHandle, match="twice"):
        second[0].end(second[1])
    del second, got
    assert (len(one.memory), len(made.handles), made.frames.used) == (1, 1, size)
    made.reap(one, 0.0)
    assert made.frames.used == 0


def test_what_is_shared_lives_as_long_as_anybody_has_it(books: Books) -> None:
    one, two = books.admit(1, 0), books.admit(2, 0)
    address = mapped(books, one)
    token = ask(books, one, messages.Share(1, address, PAGE, int(u_rw), None, None, 0.0))
    there = ask(books, two, messages.Attach(1, token, 0, None, None))[0]
    assert ask(books, two, messages.Query(1, there)).refcount == 3
    books.reap(one, 0.0)
    assert ask(books, two, messages.Query(1, there)).refcount == 1
    assert (len(books.handles), books.frames.used) == (0, PAGE)
    ask(books, two, messages.Unmap(1, there, PAGE))
    assert books.frames.used == 0


def test_a_forked_child_comes_for_what_it_inherited(books: Books) -> None:
    told: list[tuple[UserProcess, int]] = []
    books.inheritance.came = lambda dead, pid: told.append((dead, pid))
    parent = books.admit(1, 0)
    address = mapped(books, parent)
    serial = parent.memory.query_memory(address).serial
    assert SERVICES[messages.Forked](books, parent, messages.Forked(0)) is None
    assert books.reap(parent, 0.0)
    assert books.frames.used == PAGE
    child, places = books.admit(2, 0), [(address, PAGE, serial), (address + PAGE, PAGE, serial)]
    assert ask(books, child, messages.Adopt(1, "another secret", places)) == [False, False]
    assert ask(books, child, messages.Adopt(1, parent.secret, [(address, PAGE, serial + 1)])) == [False]
    assert ask(books, child, messages.Adopt(1, parent.secret, places, more=True)) == [True, False]
    assert told == [(parent, 2)]
    assert ask(books, child, messages.Adopt(1, parent.secret, places)) == [False, False]  # said twice
    assert told == [(parent, 2)] * 2
    books.inheritance.end(parent)
    assert ask(books, child, messages.Query(1, address)).refcount == 1


def inherited(process: UserProcess, *addresses: int) -> list[tuple[int, int, int]]:
    """What a child of it says of its mappings there."""
    found = [process.memory.query_memory(address) for address in addresses]
    return [(mapping.address, mapping.length, mapping.serial) for mapping in found]


def test_what_a_child_has_mapped_since_is_not_covered_by_what_it_inherits(books: Books) -> None:
    parent, child = books.admit(1, 0), books.admit(2, 0)
    own = mapped(books, parent)
    wide = mapped(books, parent, 2 * PAGE)
    for _ in range(3):
        there = mapped(books, child)
    assert own < wide < there < wide + 2 * PAGE  # in its second half
    ask(books, child, messages.Unmap(1, own, PAGE))
    assert ask(books, child, messages.Adopt(1, parent.secret, inherited(parent, own, wide))) == [True, False]


def test_what_is_inherited_counts_beside_what_is_on_its_way(books: Books) -> None:
    parent, child = books.admit(1, 0), books.admit(2, 0)
    places = inherited(parent, mapped(books, parent), mapped(books, parent))
    child.coming = books.limits.mappings - 1
    assert ask(books, child, messages.Adopt(1, parent.secret, places)) == [True, False]
