"""What a handler takes, and what travels: keywords, types against annotations, numpy's numbers, nothing converted."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import datetime
import decimal
import enum
import pathlib
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from typing import Any, Optional, Union

import msgspec
import numpy as np
import pytest
import syscalls
from conftest import BOUND, PAGE, tried_with

import realmap
from realmap import Call, KernelHandle, Process, SyscallFailed, UserBuffer, WrongArguments
from realmap.wire import messages

CARRIERS = ("ring", "socket")


@realmap.syscall
def typed(
    call: Call,
    data: UserBuffer,
    count: int,
    factor: float = 1.0,
    name: str | None = None,
    *rest: bytes,
    flag: bool = False,
    **more: int,
) -> list[Any]:
    """Says what came."""
    return [len(data), count, factor, name, list(rest), flag, more]


@realmap.syscall(blocking=True)
def on_a_worker(call: Call, count: int, *, data: UserBuffer) -> list[int]:
    """Says what came, on a thread of its own."""
    return [count, len(data)]


@realmap.syscall
def older(call: Call, items: Optional[list[int]], either: Union[int, str], table: dict[str, int]) -> list[Any]:  # noqa: UP007, UP045
    """Annotated as it used to be written."""
    return [items, either, table]


@realmap.syscall
def untyped(call, a, b=2):  # type: ignore[no-untyped-def]
    """Takes anything."""
    return [a, b]


@realmap.syscall
def odd(call: Call, when: datetime.datetime, what: Nobody) -> list[Any]:  # type: ignore[name-defined]  # noqa: F821
    """Annotated with what never arrives, and with what nobody knows."""
    return [when, what]


@realmap.syscall
def hand_back(call: Call, kind: str) -> Any:
    """Answers what it is asked for."""
    return ANSWERS[kind]


class Colour(enum.Enum):
    """Is no plain value."""

    RED = 1


@dataclasses.dataclass
class Point:
    """Is no plain value."""

    x: int


Pair = collections.namedtuple("Pair", "a b")
#: What would be converted, or has no plain form, and what is said to be sent instead.
UNFIT: list[tuple[Any, str]] = [
    (Point(1), "asdict"),
    (Colour.RED, "value.value"),
    (signal.SIGTERM, "value.value"),
    (realmap.u_r, "value.value"),
    (datetime.datetime(2026, 1, 2), "isoformat"),
    (datetime.timedelta(1), "total_seconds"),
    (decimal.Decimal("1.1"), "str"),
    (uuid.uuid4(), "str"),
    (pathlib.Path("/"), "str"),
    ({1}, "list"),
    (frozenset(), "list"),
    (range(3), "list"),
    (Pair(1, 2), "tuple"),
    (collections.OrderedDict(a=1), "dict"),
    (memoryview(b"x"), "the Buffer itself"),
    (1j, "real"),
    (np.arange(3), "tolist"),
    (np.float16(1), "float"),
    (np.longdouble(1), "float"),
    (np.complex128(1), "real"),
    (np.str_("x"), "str"),
    (np.datetime64("2026-01-02"), "item"),
    (object(), "numbers, text"),
    (lambda: 0, "numbers, text"),
]
ANSWERS: dict[str, Any] = {"int": np.int64(-3), "float": np.float32(0.1), "bool": np.bool_(True), "set": {1}}
HERE = [typed, on_a_worker, older, untyped, odd, hand_back]


@pytest.fixture(scope="module")
def kernel(request: pytest.FixtureRequest) -> Iterator[KernelHandle]:
    """A kernel with the handlers of this file beside the others."""
    with realmap.boot(syscalls=[*syscalls.ALL, *HERE], spin=0 if request.param == "socket" else 100) as handle:
        handle.stats()
        yield handle


# ---- by keyword ---------------------------------------------------------------------------


def test_arguments_by_keyword(me: Process) -> None:
    buffer = me.map(3 * PAGE)
    part = buffer.slice(1, 77)
    assert me.call("typed", part, 1) == [77, 1, 1.0, None, [], False, {}]
    assert me.call("typed", part, count=2, name="ü", flag=True) == [77, 2, 1.0, "ü", [], True, {}]
    assert me.call("typed", count=3, data=part) == [77, 3, 1.0, None, [], False, {}]
    assert me.call("typed", part, 1, 2, None, b"a", b"b", other=5) == [
        77,
        1,
        2,
        None,
        [b"a", b"b"],
        False,
        {"other": 5},
    ]
    assert me.call("on_a_worker", 5, data=buffer) == [5, 3 * PAGE]
    assert me.call("untyped", b=[part.address], a={"x": (1,)}) == [{"x": [1]}, [part.address]]


def test_several_buffers_by_position_and_by_keyword_are_each_their_own(me: Process) -> None:
    one, two, three = (me.map(size) for size in (11, 12, 13))
    one[:] = bytes(range(11))
    me.call("copy", one, target=two)
    assert two[:11] == bytes(range(11))
    me.call("copy", target=three, source=two)
    assert three[:11] == bytes(range(11))


def test_arguments_by_keyword_in_asyncio(me: Process) -> None:
    assert asyncio.run(me.acall("untyped", b=1, a=2)) == [2, 1]


@pytest.mark.parametrize(
    ("args", "kwargs", "says"),
    [
        ((), {}, "missing a required argument: 'a'"),
        ((1, 2, 3), {}, "too many positional arguments"),
        ((1,), {"c": 3}, "unexpected keyword argument 'c'"),
        ((1,), {"a": 3}, "multiple values for argument 'a'"),
        ((1,), {"call": 3}, "multiple values for argument 'call'"),
    ],
)
def test_arguments_that_a_handler_does_not_have(me: Process, args: Any, kwargs: Any, says: str) -> None:
    with pytest.raises(WrongArguments, match=rf"'untyped': .*{says}.*untyped\(a, b=2\)") as caught:
        me.call("untyped", *args, **kwargs)
    assert isinstance(caught.value, TypeError)
    assert caught.value.name == "untyped"


def test_a_handler_with_a_parameter_named_timeout_is_refused() -> None:
    @realmap.syscall
    def wait(call: Call, timeout: float) -> None: ...

    @realmap.syscall
    def by_position(call: Call, timeout: float, /) -> None: ...

    for start in (realmap.boot, realmap.Kernel):
        with pytest.raises(TypeError, match="'wait' has a parameter named timeout"):
            start(syscalls=[wait])
    realmap.Kernel(syscalls=[by_position])


@pytest.mark.parametrize("handler", [lambda: 0, lambda *, call: 0, lambda **more: 0])
def test_a_handler_that_takes_no_call(handler: Any) -> None:
    with pytest.raises(TypeError, match="first argument of a handler is its Call"):
        realmap.Kernel(syscalls=[handler])


def test_what_is_no_list_of_handlers() -> None:
    async def later(call: Call) -> None: ...

    with pytest.raises(TypeError, match=r"list of handlers: \[untyped\]"):
        realmap.boot(syscalls=untyped)
    with pytest.raises(TypeError, match="async"):
        realmap.boot(syscalls=[later])


# ---- types --------------------------------------------------------------------------------


DO_NOT_FIT: list[tuple[str, Any, dict[str, Any], str, str]] = [
    ("typed", (1, 1), {}, "data", "UserBuffer"),
    ("typed", ("BUFFER", "1"), {}, "count", "int"),
    ("typed", ("BUFFER", 1.0), {}, "count", "int"),
    ("typed", ("BUFFER", "BUFFER"), {}, "count", "a buffer"),
    ("typed", ("BUFFER", 1, "x"), {}, "factor", "float"),
    ("typed", ("BUFFER", 1, 1.0, 5), {}, "name", "str | None"),
    ("typed", ("BUFFER", 1, 1.0, "x", b"", "no"), {}, "rest", "bytes"),
    ("typed", ("BUFFER", 1), {"flag": 1}, "flag", "bool"),
    ("typed", ("BUFFER", 1), {"other": "x"}, "more", "int"),
    ("on_a_worker", (1,), {"data": b"x"}, "data", "UserBuffer"),
    ("older", (5, 1, {}), {}, "items", "Optional"),
    ("older", (None, [], {}), {}, "either", "Union"),
    ("older", (None, 1, []), {}, "table", "dict"),
]


def test_a_type_that_does_not_fit(me: Process) -> None:
    buffer = me.map(100)
    for name, args, kwargs, argument, says in DO_NOT_FIT * 2:
        with tried_with(name, args, kwargs):
            with pytest.raises(WrongArguments) as caught:
                me.call(name, *(buffer if each == "BUFFER" else each for each in args), **kwargs)
            assert f"argument {argument!r} of syscall {name!r}" in str(caught.value)
            assert says in str(caught.value)


def test_types_that_fit(me: Process) -> None:
    assert me.call("typed", me.map(1), True, 3) == [1, True, 3, None, [], False, {}]
    for items in (None, [1], ["never looked into"]):
        for either in (1, "x"):
            assert me.call("older", items, either, {"a": 1}) == [items, either, {"a": 1}]
    assert me.call("odd", "2026-01-02", b"what") == ["2026-01-02", b"what"]


def test_many_combinations_of_types(me: Process) -> None:
    """More than are remembered."""
    values: list[Any] = [1, 1.5, "x", b"x", [1], {"a": 1}, None, True, False]
    for one in values:
        for two in values:
            assert me.call("untyped", one, two) == [one, two]
            assert me.call("untyped", [one], two) == [[one], two]


def test_annotations_of_a_script_are_known(tmp_path: pathlib.Path) -> None:
    """A function by value comes without the globals that only its annotations use."""
    source = """
from __future__ import annotations
import realmap
from realmap import UserBuffer

@realmap.syscall
def one(call, data: UserBuffer): pass

@realmap.syscall
def two(call, data: realmap.UserBuffer | None, count: int): pass

with realmap.boot(syscalls=[one, two]) as kernel, kernel.connect() as me:
    for name, args in [("one", (1,)), ("two", (1, 1)), ("two", (None, "1"))]:
        try:
            me.call(name, *args)
        except TypeError as error:
            print(type(error).__name__, str(error).split(";")[0])
"""
    script = tmp_path / "script.py"
    script.write_text(source)
    said = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=BOUND)
    assert said.stdout.splitlines() == [
        "WrongArguments argument 'data' of syscall 'one' is of type int, and should be UserBuffer",
        "WrongArguments argument 'data' of syscall 'two' is of type int, and should be realmap.UserBuffer | None",
        "WrongArguments argument 'count' of syscall 'two' is of type str, and should be int",
    ]


# ---- what travels -------------------------------------------------------------------------


def test_nothing_is_converted(me: Process) -> None:
    for value, says in UNFIT:
        with tried_with(value):
            for within in (value, [value], {"a": (1, [value])}):
                with pytest.raises(TypeError, match=f"as an argument of 'echo'.*{says}"):
                    me.call("echo", within)
            with pytest.raises(TypeError, match=says):
                me.call("echo", 1, key=value)
            assert me.call("nop") is None


def test_an_answer_is_not_converted_either(me: Process) -> None:
    with pytest.raises(SyscallFailed, match=r"the answer of 'hand_back': send list\(value\)"):
        me.call("hand_back", "set")


@pytest.mark.parametrize(
    "number",
    [
        np.int8(-128),
        np.uint8(255),
        np.int16(-(1 << 15)),
        np.uint32((1 << 32) - 1),
        np.int64(-(1 << 63)),
        np.uint64((1 << 64) - 1),
        np.float32(0.1),
        np.float64(0.1),
        np.bool_(True),
        np.bool_(False),
    ],
)
def test_a_number_of_numpy_is_a_plain_one(me: Process, number: Any) -> None:
    plain, within = me.call("untyped", number, [number, {"a": number}])
    assert (type(plain), plain) == (type(number.item()), number.item())
    assert within == [number.item(), {"a": number.item()}]


def test_an_answer_may_be_a_number_of_numpy(me: Process) -> None:
    for kind in ("int", "float", "bool"):
        value = me.call("hand_back", kind)
        assert (type(value), value) == (type(ANSWERS[kind].item()), ANSWERS[kind].item())


def test_a_list_within_itself(me: Process) -> None:
    endless: list[Any] = [1]
    endless += [endless, endless]
    with pytest.raises(TypeError, match="flatter"):
        me.call("echo", endless)


@pytest.mark.parametrize("names", [("a", "b"), ("a", "a", "a"), ("call",)])
def test_a_peer_that_names_more_than_there_is(me: Process, names: tuple[str, ...]) -> None:
    with pytest.raises(realmap.KernelError):
        me._own_client.request(
            messages.Call(me._own_client.next_id(), "untyped", msgspec.Raw(b"\x91\x01"), None, names)
        )
    assert me.call("nop") is None
