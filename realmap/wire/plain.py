"""What travels in calls and answers: plain values, as they are. Nothing is converted on the way without being said.

Numbers, text, bytes, lists, dicts and None; a tuple arrives as a list, a bytearray as bytes, one of numpy's integers,
floats or bools as a plain one of the same value. The encoder would take more (a set, a dataclass, an Enum), and make
something else of it: so it is looked at before.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from realmap._core import TOO_DEEP
from realmap.wire.messages import FLAWS

#: What is sent as it is.
PLAIN: frozenset[type] = frozenset({int, float, bool, str, bytes, bytearray, type(None)})
#: numpy's numbers that are one of Python's, by kind and bytes
_NUMBERS = {("b", 1), ("f", 4), ("f", 8), *((kind, size) for kind in "iu" for size in (1, 2, 4, 8))}
#: Of what is sent often instead, by the name of its type or of one that it derives from: what to send.
_ADVICE = {
    "ndarray": "a Buffer (buffer.array(…) is an array of one), or array.tolist()",
    "float16": "float(value)",
    "longdouble": "float(value), which rounds it, or str(value)",
    "complexfloating": "[value.real, value.imag]",
    "generic": "value.item()",
    "complex": "[value.real, value.imag]",
    "memoryview": "the Buffer itself, or buffer.slice(…), to pass memory; bytes(view) to pass a copy",
    "array": "array.tolist(), or array.tobytes()",
    "datetime": "value.isoformat(), or value.timestamp()",
    "date": "value.isoformat()",
    "time": "value.isoformat()",
    "timedelta": "value.total_seconds()",
    "Decimal": "str(value)",
    "Fraction": "str(value)",
    "UUID": "str(value), or value.bytes",
    "PurePath": "str(value)",
    "set": "list(value)",
    "frozenset": "list(value)",
    "range": "list(value)",
    "tuple": "tuple(value), which arrives as a list, or value._asdict()",
    "list": "list(value)",
    "dict": "dict(value)",
    "str": "str(value)",
    "bytes": "bytes(value)",
    "bytearray": "bytes(value)",
    "int": "int(value)",
    "float": "float(value)",
    "UserBuffer": "data.copy_in() for its bytes, or data.address for where it is",
    "coroutine": "the answer itself: a handler is no async function",
}


def check(values: Iterable[Any], also: type | None, what: str) -> None:
    """Looks through `values`, lists and dicts within them too. TypeError: one cannot travel; it is said what can.

    `also`: what else can (a buffer). `what`: what they are, for the error ("an argument of 'name'").
    """
    try:
        _look(values, also, what)
    except RecursionError:
        raise TypeError(f"this cannot travel: {FLAWS[TOO_DEEP]}") from None


def _look(values: Iterable[Any], also: type | None, what: str) -> None:
    for value in values:
        kind = type(value)
        if kind in PLAIN or kind is also:
            continue
        if kind is list or kind is tuple:
            if not PLAIN.issuperset(map(type, value)):  # many numbers, or texts: without a turn of this loop for each
                _look(value, also, what)
        elif kind is dict:
            _look(value, also, what)
            _look(value.values(), also, what)
        elif not is_number(value):
            refuse(value, what)


def is_number(value: Any) -> bool:
    """Whether it is one of numpy's numbers that is exactly one of Python's."""
    numpy: Any = sys.modules.get("numpy")  # whoever has one has imported it
    if numpy is None or not isinstance(value, numpy.generic):
        return False
    return (value.dtype.kind, value.dtype.itemsize) in _NUMBERS


def refuse(value: Any, what: str) -> NoReturn:
    """TypeError: what to send instead of `value`."""
    kind = type(value)
    instead = next((_ADVICE[each.__name__] for each in kind.__mro__ if each.__name__ in _ADVICE), "")
    if isinstance(value, enum.Enum):
        instead = "value.value, or value.name"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        instead = "dataclasses.asdict(value)"
    said = f": send {instead}" if instead else ""
    raise TypeError(
        f"a value of type {kind.__name__} cannot travel as {what}{said}; numbers, text, bytes, lists, dicts, None and, "
        "as arguments, buffers of this Process can"
    )
