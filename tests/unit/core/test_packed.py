"""What is looked over before anything is made of it: sound MessagePack, of a bounded cost, and nothing else."""

from __future__ import annotations

import datetime
import gc
import tracemalloc
from typing import Any

import msgspec
import pytest
from conftest import scaled
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.msgpack import Ext

from realmap._core import BROKEN, DEEPEST, FOREIGN, KEY_NO_TEXT, TOO_DEEP, TOO_LONG, TOO_MUCH, flaw_of, look_over
from realmap.wire.messages import MAX_MESSAGE, MAX_OBJECTS, buffer_ext

encode = msgspec.msgpack.encode
SOUND = 0


def deep(depth: int, inside: bytes) -> bytes:
    """Containers within one another, that many, and nil."""
    return inside * depth + b"\xc0"


class Foreign(Exception):
    """An extension that is no buffer."""


def allowed(code: int, data: memoryview) -> tuple[int, bytes]:
    """What a decoder makes of an extension."""
    if code != 1 or len(data) != 16:
        raise Foreign
    return code, bytes(data)


def has_odd_key(value: Any) -> bool:
    """Whether a dict somewhere in it has a key that is no text, or it holds a time."""
    if isinstance(value, dict):
        return any(not isinstance(key, str) for key in value) or any(map(has_odd_key, value.values()))
    if isinstance(value, datetime.datetime):
        return True
    return isinstance(value, list) and any(map(has_odd_key, value))


numbers = st.integers(-(1 << 63), (1 << 64) - 1) | st.sampled_from(
    [-1, -33, 127, 128, 255, 256, 65_535, 65_536, 1 << 32]
)
extensions = st.builds(Ext, st.sampled_from([1, 1, 1, 0, 2, -1]), st.sampled_from([16, 16, 12, 1, 3]).map(bytes))
leaves = st.none() | st.booleans() | numbers | st.floats() | st.text(max_size=40) | st.binary(max_size=40) | extensions
values = st.recursive(
    leaves,
    lambda inside: (
        st.lists(inside, max_size=20)
        | st.dictionaries(st.text(max_size=40), inside, max_size=20)
        | st.dictionaries(numbers | st.text(max_size=3), inside, max_size=3)
    ),
    max_leaves=60,
)


def agree(data: bytes) -> None:
    """What is sound can be decoded, into what is allowed; what is broken cannot."""
    flaw = flaw_of(data)
    found = look_over(data)
    assert found == flaw if flaw else not isinstance(found, int)
    try:
        made = msgspec.msgpack.decode(data, ext_hook=allowed)
    except Foreign:
        assert flaw != SOUND
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        assert flaw != SOUND
    except TypeError:  # a key that cannot be hashed
        assert flaw == KEY_NO_TEXT
    else:
        assert flaw != BROKEN
        assert (flaw != SOUND) or not has_odd_key(made)


def random_bytes(data: bytes) -> None:
    agree(data)


def changed_bytes(value: Any, more: st.DataObject) -> None:
    data = bytearray(encode(value))
    for _ in range(more.draw(st.integers(0, 3))):
        how, at = more.draw(st.integers(0, 3)), more.draw(st.integers(0, len(data)))
        if how == 0:
            del data[at:]
        elif how == 1 and at < len(data):
            data[at] = more.draw(st.integers(0, 255))
        elif how == 2:
            data[at:at] = more.draw(st.binary(max_size=4))
        else:
            data += data[at:]
    agree(bytes(data))


def what_is_encoded_is_never_broken(value: Any) -> None:
    assert flaw_of(encode(value)) in (SOUND, KEY_NO_TEXT, FOREIGN)


FEW, MANY = settings(max_examples=100, deadline=None), settings(max_examples=scaled(5000), deadline=None)
test_random_bytes = FEW(given(st.binary(max_size=60))(random_bytes))
test_changed_bytes = FEW(given(values, st.data())(changed_bytes))
test_what_is_encoded_is_never_broken = FEW(given(values)(what_is_encoded_is_never_broken))
test_random_bytes_full_count = pytest.mark.slow(MANY(given(st.binary(max_size=60))(random_bytes)))
test_changed_bytes_full_count = pytest.mark.slow(MANY(given(values, st.data())(changed_bytes)))
test_what_is_encoded_is_never_broken_full_count = pytest.mark.slow(MANY(given(values)(what_is_encoded_is_never_broken)))


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_all_that_begins_with_these_bytes_of_text(length: int) -> None:
    """UTF-8 as Python reads it: every first and second byte, and the edges of the others."""
    for first in range(0x7F, 0x100):
        for second in range(0x7E, 0x100) if length > 1 else [0x80]:
            for rest in (0x7F, 0x80, 0xBF, 0xC0):
                text = bytes([first, second, rest, rest])[:length]
                try:
                    text.decode()
                except UnicodeDecodeError:
                    assert flaw_of(bytes([0xA0 + length]) + text) == BROKEN
                else:
                    assert flaw_of(bytes([0xA0 + length]) + text) == SOUND


@pytest.mark.parametrize(
    ("data", "flaw"),
    [
        (b"", BROKEN),
        (b"\xc1", BROKEN),
        (b"\xc0\xc0", BROKEN),
        (b"\x92\xc0", BROKEN),
        (b"\xdb\x7f\xff\xff\xff", BROKEN),
        (b"\xdd\xff\xff\xff\xff", TOO_MUCH),
        (deep(DEEPEST, b"\x91"), SOUND),
        (deep(DEEPEST + 1, b"\x91"), TOO_DEEP),
        (deep(DEEPEST, b"\x81\xa1x"), SOUND),
        (deep(DEEPEST + 1, b"\x81\xa1x"), TOO_DEEP),
        (encode({1: 2}), KEY_NO_TEXT),
        (encode({"a": [{"b": {None: 1}}]}), KEY_NO_TEXT),
        (b"\x81\x90\xc0", KEY_NO_TEXT),
        (encode(Ext(1, bytes(15))), FOREIGN),
        (encode(Ext(2, bytes(16))), FOREIGN),
        (encode(datetime.datetime(2031, 5, 7, tzinfo=datetime.UTC)), FOREIGN),
        (encode(bytes(MAX_MESSAGE - 5)), SOUND),
        (encode(bytes(MAX_MESSAGE - 4)), TOO_LONG),
        (encode([[]] * 40_000), SOUND),
        (encode([[]] * 60_000), TOO_MUCH),
        (encode(["x" * 250_000] * 4)[:-20], BROKEN),
        (encode("x" * 1_000_000), SOUND),
        (encode("x" * 800_000 + "\U0001f600"), SOUND),
        (encode("x" * 900_000 + "\U0001f600"), TOO_MUCH),  # one wide character widens all
        (encode([0] * 500_000), SOUND),
        (encode([0] * 530_000), TOO_MUCH),
        (encode({str(number): 0 for number in range(30_000)}), TOO_MUCH),
    ],
)
def test_flaws(data: bytes, flaw: int) -> None:
    assert flaw_of(data) == flaw
    assert not isinstance(look_over(data), int) if flaw == SOUND else look_over(data) == flaw


def test_buffers_are_found_in_order_wherever_they_stand() -> None:
    places = [(number << 12, number) for number in (1, (1 << 52) - 1, 3, 2, 5)]
    one, two, three, four, five = (buffer_ext(*place) for place in places)
    assert look_over(encode([1, one, {"x": [two, {"y": three}]}, [[four]], "z", five])) == places
    assert look_over(encode([1, "x", {"x": [2]}])) is None
    long_form = b"\xc7\x10\x01" + bytes([7] + [0] * 15)
    assert look_over(long_form) == [(7, 0)]
    assert look_over(encode([one, two]) + b"\0") == BROKEN


@pytest.mark.parametrize("odd", ["text", None, bytearray(b"\xc0"), 5])
def test_only_bytes_are_looked_over(odd: Any) -> None:
    for function in (flaw_of, look_over):
        with pytest.raises(TypeError):
            function(odd)


def wide(count: int) -> Any:
    return ["\u0100" * 20 + str(number) for number in range(count)]


@pytest.mark.parametrize(
    "make",
    [
        lambda count: [[]] * count,
        lambda count: [{}] * count,
        lambda count: [{"a": None}] * count,
        lambda count: [{str(each): None for each in range(6)}] * count,
        lambda count: {str(number): number + 300 for number in range(count)},
        lambda count: {"k" * 40 + str(number): [] for number in range(count)},
        lambda count: [1 << 62] * count,
        lambda count: [1.5] * count,
        lambda count: [b""] * count,
        lambda count: [b"xyz" * 5] * count,
        lambda count: [""] * count,
        lambda count: ["x\xe9"] * count,
        lambda count: "\U0001f600" * count,
        wide,
        lambda count: [None] * count,
        lambda count: [[[[1000]]]] * count,
    ],
)
def test_no_more_memory_is_taken_than_may_be(make: Any) -> None:
    """The most of a kind that is sound takes no more than the bound: no estimate is less than what it takes."""
    least = 1
    while flaw_of(encode(make(2 * least))) == SOUND:
        least *= 2
    most = 2 * least
    while most - least > 1 + least // 50:
        middle = (least + most) // 2
        least, most = (middle, most) if flaw_of(encode(make(middle))) == SOUND else (least, middle)
    data = encode(make(least))
    assert least > 1000
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        made = msgspec.msgpack.decode(data)
        took = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert made
    assert took <= MAX_OBJECTS
