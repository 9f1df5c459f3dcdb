"""Asking by a socket that is there: whether anybody can have read what was asked, where the other side ends."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mangled import mangle

from realmap._core import ANSWERED, DIED, ENDED, NONSENSE, Answer, Bell, Endpoint, Window, fall_asleep, wake_up
from realmap.errors import InvalidMemState, KernelDied, KernelError, SyscallTimeout
from realmap.memory import KERNEL_LAND
from realmap.pages import PAGE_SIZE
from realmap.wire import messages
from realmap.wire.client.requester import Requester
from realmap.wire.ring import RingEnd


class Pair(NamedTuple):
    """Who asks, and the other side: its socket, and its end of the ring."""

    endpoint: Endpoint
    sock: socket.socket
    ring: RingEnd


@contextlib.contextmanager
def connected() -> Iterator[Pair]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ring, fd = RingEnd.create()
    with ours, theirs:
        endpoint = Endpoint._of(ours.fileno())
        assert isinstance(endpoint, Endpoint)
        assert endpoint.join(fd, 0) == 0
        os.close(fd)
        ours.close()  # the endpoint has a descriptor of its own
        yield Pair(endpoint, theirs, ring)
        endpoint.close()
        ring._close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    with connected() as found:
        yield found


def ask(pair: Pair, number: int) -> Answer:
    """A request on its way."""
    bell = Bell(lambda: None, lambda _: None, lambda: False)
    data = msgspec.msgpack.encode(messages.Query(number, 1))
    return pair.endpoint.start(number, data, None, bell)


def read_to_end(pair: Pair) -> None:
    """Linux may say first that the other side had not read all."""
    bell = Bell(lambda: None, lambda _: None, lambda: False)
    while pair.endpoint.read(bell) and not pair.endpoint.end:
        pass


def end_of(pair: Pair, *answers: Answer) -> list[bool]:
    """The other side ends: whether nobody can have read each of these."""
    pair.sock.close()
    read_to_end(pair)
    assert pair.endpoint.end == DIED
    assert [answer.outcome for answer in answers] == [ENDED] * len(answers)
    return [answer.unread for answer in answers]


def test_a_socket_that_is_there_carries_requests(pair: Pair) -> None:
    pair.sock.send(b"\0" + msgspec.msgpack.encode(messages.Done(7, None)))
    query = msgspec.msgpack.encode(messages.Query(7, 1))
    assert pair.endpoint.request(7, query, 5.0, None, None).outcome == ANSWERED


def test_what_is_no_descriptor_is_an_errno() -> None:
    assert Endpoint._of(-1) == errno.EBADF


def test_what_was_taken_out_of_the_ring_may_have_begun_and_what_is_still_there_has_not(pair: Pair) -> None:
    first, second = ask(pair, 1), ask(pair, 2)
    assert pair.ring._pop()
    assert end_of(pair, first, second) == [False, True]


def test_what_went_by_the_socket_may_have_been_read(pair: Pair) -> None:
    for number in range(1, 33):  # the ring is full then
        ask(pair, number)
    assert end_of(pair, ask(pair, 33)) == [False]


def test_what_could_not_be_sent_was_not_read(pair: Pair) -> None:
    kept = [ask(pair, number) for number in range(1, 33)]
    pair.sock.close()
    late = ask(pair, 33)
    assert late.outcome == ENDED
    assert late.unread
    assert all(answer.unread for answer in kept)


def test_what_is_asked_after_the_end_was_not_read(pair: Pair) -> None:
    end_of(pair)
    answer = ask(pair, 1)
    assert (answer.outcome, answer.unread) == (ENDED, True)


def test_a_part_of_a_message_was_not_read(pair: Pair) -> None:
    """The socket takes the first parts of a long one only: what came of it is no request."""
    pair.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    data = msgspec.msgpack.encode(messages.Call(1, "long", bytes(900_000)))
    bell = Bell(lambda: None, lambda _: None, lambda: False)
    answer = pair.endpoint.start(1, data, None, bell)
    assert end_of(pair, answer) == [True]


def test_an_answer_that_came_before_the_end_is_one(pair: Pair) -> None:
    answer = ask(pair, 1)
    pair.ring._pop()
    pair.sock.send(b"\0" + msgspec.msgpack.encode(messages.Done(1, "value")))
    pair.sock.close()
    read_to_end(pair)
    assert answer.outcome == ANSWERED
    assert answer.unread is False


def test_an_unmapping_is_not_heard_before_a_call_that_lies_in_the_socket(pair: Pair) -> None:
    """The call names the address, which may be another buffer's once that is unmapped."""
    assert fall_asleep([pair.ring])
    ask(pair, 1)  # so it takes the socket
    wake_up([pair.ring])
    fd = os.memfd_create("test")
    os.truncate(fd, PAGE_SIZE)
    window = Window._map(KERNEL_LAND.start, 3, [(fd, 0, PAGE_SIZE)], 0, PAGE_SIZE, 1)
    os.close(fd)
    said = msgspec.msgpack.encode(messages.Unmap(2, window.address, PAGE_SIZE))
    window._farewell(pair.endpoint, said, None)
    pair.sock.send(b"\0" + msgspec.msgpack.encode(messages.Done(2, None)))
    answer = pair.endpoint.unmap(window, 2, said)
    assert isinstance(answer, Answer) and answer.outcome == ANSWERED
    assert pair.ring._pop() == b""  # the socket comes first
    assert pair.sock.recv(100)[1:] == msgspec.msgpack.encode(messages.Query(1, 1))
    assert pair.ring._pop() == said


class Asking(Requester):
    """Who asks by a pair."""

    def __init__(self, pair: Pair) -> None:
        super().__init__(pair.endpoint, msgspec.msgpack.Encoder(), pair.endpoint.next_id)

    def unanswered(self, name: str, timeout: float | None) -> SyscallTimeout:
        return SyscallTimeout(name, timeout)

    def elsewhere(self) -> KernelError:
        return KernelDied("path", why="elsewhere")

    def ended(self, unread: bool = False) -> KernelError:
        return KernelDied("path", why="ended")


@pytest.mark.parametrize(
    "answer",
    [
        b"\x94\x01\x01\xa1\xff\0",  # text that is no UTF-8
        b"\x94\x01\x01" + b"\x91" * 100_000,
        b"\x94\x01\x01\x81\x80\1\0",  # a dict with a dict as its key
        msgspec.msgpack.encode(messages.Failed(1, messages.Error(InvalidMemState.code, [0, 77], ""))),
    ],
)
def test_an_answer_that_is_no_message_ends_it(pair: Pair, answer: bytes) -> None:
    asked = ask(pair, 1)
    pair.sock.send(b"\0" + answer[:60_000])
    pair.endpoint.read(Bell(lambda: None, lambda _: None, lambda: False))
    with pytest.raises(KernelDied, match="ended"):
        Asking(pair).value(asked)
    assert pair.endpoint.end == NONSENSE


# ---- calls of plain values ----------------------------------------------------------------------

numbers = st.integers(-(1 << 63), (1 << 64) - 1) | st.integers(0, 64).map(lambda bits: (1 << bits) - 1)
texts = st.text(max_size=40) | st.integers(0, 2100).map("x".__mul__)
plain = st.none() | st.booleans() | numbers | st.floats() | texts | texts.map(str.encode)
values = plain | st.lists(plain, max_size=3) | st.dictionaries(st.text(max_size=3), plain, max_size=2)


class Odd(int):
    """A number that is more than that."""


class Name(str):
    """A text that is more than that."""


call_of, done_of = msgspec.msgpack.Decoder(messages.Call).decode, msgspec.msgpack.Decoder(messages.Done).decode


def same(one: Any, other: Any) -> bool:
    """Whether these are equal, and of one type; not a number is, too."""
    return type(one) is type(other) and repr(one) == repr(other)


def is_beyond(value: Any) -> bool:
    """Whether it is more than a plain value of 64 bits."""
    return isinstance(value, list | dict) or (type(value) is int and value >= 1 << 63)


@settings(max_examples=60, deadline=None)
@given(name=texts, args=st.lists(values, max_size=20), value=values)
def test_a_call_is_written_and_its_answer_read_as_by_the_encoder(name: str, args: list[Any], value: Any) -> None:
    with connected() as pair:
        number = pair.endpoint.next_id() + 1
        answer = msgspec.msgpack.encode(messages.Done(number, value))
        by_ring = pair.ring._send(answer, pair.sock.fileno()) >= 0
        if not by_ring:
            pair.sock.send(b"\0" + answer)
        got = pair.endpoint.call(name, tuple(args), {})
        sent = pair.ring._pop()
    if got is NotImplemented:
        assert sent is None
        is_long = sum(len(each) for each in [name, *args] if isinstance(each, str | bytes)) > 1000
        assert is_long or len(args) > 15 or any(map(is_beyond, args))
        return
    assert sent is not None
    call = call_of(sent)
    assert (call.id, call.name, call.timeout, call.names) == (number, name, None, None)
    assert same(msgspec.msgpack.decode(call.args), args)
    assert same(done_of(got.data or b"").value if isinstance(got, Answer) else got, value)
    assert isinstance(got, Answer) == isinstance(value, list | dict)


@pytest.mark.parametrize(
    "answer",
    [
        messages.Done(1, None, 1),
        messages.Failed(1, messages.Error(1, [], "")),
        msgspec.Raw(b"\x94\x01\x01\xd9\x05abcd\0"),
        msgspec.Raw(b"\x94\x01\x01\xa1\xff\0"),  # no UTF-8
        msgspec.Raw(b"\x94\x01\x01\xc0\xc0\0"),
        msgspec.Raw(b"\x94\x01\x01\xda\0"),
    ],
)
def test_an_answer_that_is_no_plain_value_is_given_as_it_is(pair: Pair, answer: Any) -> None:
    data = msgspec.msgpack.encode(answer)
    if data[-1] == 1:
        pair.sock.send(b"\0" + msgspec.msgpack.encode(messages.Carrier(1)))
    assert pair.ring._send(data, pair.sock.fileno()) >= 0
    got = pair.endpoint.call("name", (), {})
    assert isinstance(got, Answer)
    assert (got.outcome, got.data, got.value) == (ANSWERED, data, NotImplemented)


@pytest.mark.parametrize(
    "args", [([1],), ({},), (1 << 64,), ("\ud800",), (object(),), (None,) * 16, (bytes(2048),), (Odd(1),)]
)
def test_a_call_that_is_not_so_plain_is_left_to_the_encoder(pair: Pair, args: tuple[Any, ...]) -> None:
    assert pair.endpoint.call("name", args, {}) is NotImplemented
    assert pair.endpoint.plain("name", args, {}) is None
    assert (pair.endpoint.pending, pair.ring._pop()) == (0, None)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([b"\x94\x01\x01", b"\x94\x01\xcc\x01", b"\x94\x01\xcf" + bytes(7) + b"\x01", b"\x93\x01\x01"]),
    values, st.integers(0, 1), st.data(),
)  # fmt: skip
def test_a_value_is_read_from_bytes_as_they_come_where_the_decoder_reads_the_same(
    head: bytes, value: Any, descriptors: int, more: st.DataObject
) -> None:
    data = bytearray(msgspec.msgpack.encode(value) + bytes([descriptors]))
    mangle(data, more, 2, 12)
    bell = Bell(lambda: None, lambda _: None, lambda: False)
    with connected() as pair:
        answer = ask(pair, 1)
        pair.sock.send(b"\0" + head + data)  # by the ring, descriptors that it says it has would be waited for
        pair.endpoint.read(bell)
        assert answer.outcome == ANSWERED
        read = answer.value
    try:
        right = done_of(head + data)
    except messages.UNREADABLE:
        assert read is NotImplemented
        return
    if read is not NotImplemented:
        assert right.descriptors == 0
        assert same(read, right.value)


@pytest.mark.parametrize(("args", "others"), [([], {}), ((), 5), ((), ["name"]), (None, {})])
def test_what_is_no_tuple_or_no_dict_is_no_call(pair: Pair, args: Any, others: Any) -> None:
    for ask_by in (pair.endpoint.call, pair.endpoint.plain):
        with pytest.raises(TypeError):
            ask_by("name", args, others)


@pytest.mark.parametrize("number", [127, 128, 255, 256, 65_535, 65_536])
def test_the_number_of_a_call(pair: Pair, number: int) -> None:
    while pair.endpoint.next_id() < number - 1:
        pass
    assert pair.ring._send(msgspec.msgpack.encode(messages.Done(number, 5)), pair.sock.fileno()) >= 0
    assert pair.endpoint.call("name", (), {}) == 5
    assert call_of(pair.ring._pop() or b"").id == number


def test_a_plain_call_that_is_awaited(pair: Pair) -> None:
    written = pair.endpoint.plain("name", (1, "x"), {})
    assert written is not None
    number, data = written
    call = call_of(data)
    assert (call.id, call.name, msgspec.msgpack.decode(call.args)) == (number, "name", [1, "x"])
    bell = Bell(lambda: None, lambda _: None, lambda: False)
    answer = pair.endpoint.start(number, data, None, bell)
    assert answer.value is NotImplemented
    assert pair.ring._send(msgspec.msgpack.encode(messages.Done(number, 5)), pair.sock.fileno()) >= 0
    pair.endpoint.read(bell)
    assert (answer.outcome, answer.value) == (ANSWERED, 5)


def test_a_call_of_another_name_is_not_made(pair: Pair) -> None:
    for name in ["other", 7, Name("name")]:
        assert pair.endpoint.call(name, (), {"other": NotImplemented}) is NotImplemented  # type: ignore[arg-type]
    route = object()
    assert pair.endpoint.call("other", ([],), {"other": route}) is route
    assert pair.endpoint.plain("other", (), {"other": route}) is None
    assert (pair.endpoint.pending, pair.ring._pop()) == (0, None)


def test_a_call_has_the_number_of_who_counts(pair: Pair) -> None:
    with connected() as other:
        for _ in range(5):
            other.endpoint.next_id()
        assert pair.ring._send(msgspec.msgpack.encode(messages.Done(6, "got")), pair.sock.fileno()) >= 0
        assert pair.endpoint.call("name", (), other.endpoint) == "got"
        assert call_of(pair.ring._pop() or b"").id == 6
        assert (other.endpoint.next_id(), pair.endpoint.next_id()) == (7, 1)


def test_a_call_by_an_endpoint_that_has_ended_is_not_made(pair: Pair) -> None:
    pair.endpoint.close()
    assert pair.endpoint.call("name", (), {}) is NotImplemented
