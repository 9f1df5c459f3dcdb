"""Calls and answers of a few plain values, as who answers reads and writes them in one step: like the decoder."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mangled import mangle

from realmap._core import look_over, read_call, write_done
from realmap.wire import messages

call_of, done_of = msgspec.msgpack.Decoder(messages.Call).decode, msgspec.msgpack.Decoder(messages.Done).decode
numbers = st.integers(0, (1 << 64) - 1)
texts = st.text(max_size=40)
plain = st.one_of(
    st.none(), st.booleans(), st.integers(-(1 << 63), (1 << 63) - 1), st.floats(), texts, st.binary(max_size=300)
)
values = st.one_of(plain, st.just((1 << 64) - 1), st.just([]), st.just({"a": 1}))


class Odd(int):
    """A number that is more than that."""


class Name(str):
    """A text that is more than that."""


def same(one: Any, other: Any) -> bool:
    """Whether these are equal, and of one type; not a number is, too."""
    return type(one) is type(other) and repr(one) == repr(other)


def as_decoded(data: bytes) -> tuple[int, str, list[Any]]:
    call = call_of(data)
    assert (call.timeout, call.names) == (None, None)
    return call.id, call.name, messages.arguments(call.args)


@settings(max_examples=100, deadline=None)
@given(numbers, texts, st.lists(plain, max_size=15))
def test_plain_calls_are_read(number: int, name: str, args: list[Any]) -> None:
    data = msgspec.msgpack.encode([1, number, name, args])
    assert len(data) > 2048 or same(read_call(data), (number, name, args))


@settings(max_examples=300, deadline=None)
@given(st.lists(values, max_size=17), st.data())
def test_whatever_is_read_the_decoder_reads_alike(args: list[Any], more: st.DataObject) -> None:
    data = bytearray(msgspec.msgpack.encode([1, more.draw(numbers), "a name", args]))
    mangle(data, more, 3, 20)
    read = read_call(bytes(data))
    if read is not None:
        assert look_over(bytes(data)) is None
        assert same(read, as_decoded(bytes(data)))


CALL = b"\x94\x01\x05\xa1n"


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\x94", b"\x94\x01", CALL, CALL + b"\x91", CALL + b"\x91\xc0\xc0", CALL + b"\x91\xc1", CALL + b"\xc0"),
        *(b"\x94\x02\x05\xa1n\x90", b"\x93\x01\x05\x90\xc0", b"\x94\x01\xff\xa1n\x90", b"\x94\x01\xa1n\xa1n\x90"),
        *(b"\x94\x01\x05\xc4\x01n\x90", b"\x94\x01\x05\xa1\xff\x90", b"\x94\x01\xd0\x05\xa1n\x90", b"\x94\x01\xcd\0"),
        *(CALL + b"\x91" + head for head in [b"\xd9", b"\xda\0", b"\xc5\xff\xff", b"\xcf\0", b"\xcb", b"\xca\0\0\0\0"]),
        *(CALL + b"\x91\x90", CALL + b"\x91\x80", CALL + b"\x91\xc7\x10\x01" + bytes(16), CALL + b"\xdc\0\0"),
        CALL + b"\x91\xc5" + (2048).to_bytes(2, "big") + bytes(2048),
    ],
    ids=lambda data: data[:12].hex(),
)
def test_what_is_no_plain_call_is_left_to_the_decoder(data: bytes) -> None:
    assert read_call(data) is None


@pytest.mark.parametrize("number", [-1, -(1 << 63), 1 << 63, (1 << 64) - 1])
def test_a_request_is_read_just_where_an_answer_can_have_its_number(number: int) -> None:
    data = msgspec.msgpack.encode([1, number, "a name", [], None])
    if number < 0:
        with pytest.raises(msgspec.ValidationError):
            call_of(data)
        with pytest.raises(OverflowError):
            write_done(number, None)
    else:
        assert done_of(write_done(call_of(data).id, None) or b"").id == number


@settings(max_examples=100, deadline=None)
@given(numbers, values)
def test_an_answer_is_written_as_by_the_encoder(number: int, value: Any) -> None:
    data = write_done(number, value)
    if data is None:
        assert isinstance(value, list | dict) or value == (1 << 64) - 1
    else:
        done = done_of(data)
        assert same((done.id, done.value, done.descriptors), (number, value, 0))


@pytest.mark.parametrize(
    "value",
    [1 << 64, -(1 << 63) - 1, Odd(1), Name("x"), "\ud800", "x" * 2048, bytes(2048), bytearray(b"x"), (), object()],
)
def test_an_answer_that_is_not_so_plain_is_left_to_the_encoder(value: Any) -> None:
    assert write_done(1, value) is None


def test_what_is_no_message_and_no_number() -> None:
    for odd in ("text", bytearray(CALL), None):
        with pytest.raises(TypeError):
            read_call(odd)  # type: ignore[arg-type]
    with pytest.raises((OverflowError, TypeError, ValueError)):
        write_done(-1, None)
    with pytest.raises(TypeError):
        write_done("1", None)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        write_done(1)  # type: ignore[call-arg]
