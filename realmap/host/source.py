"""cloudpickle, and beside each function that it sends by value where that was written: for tracebacks.

By itself it forgets the file (`<dynamic-code>`). A file that is there is named; what was typed into a notebook or a
shell is in this process alone (`linecache`), and goes along.
"""

from __future__ import annotations

import io
import linecache
import types
from collections import ChainMap
from collections.abc import Callable
from typing import Any, ClassVar

import cloudpickle

_reduce = cloudpickle.CloudPickler.dispatch_table[types.CodeType]


def _reduce_code(code: types.CodeType) -> tuple[Any, ...]:
    make, args = _reduce(code)[:2]
    entry = linecache.cache.get(code.co_filename)
    # Without a time it is of no file; the list is one object, and pickled once.
    lines = entry[2] if entry is not None and len(entry) == 4 and entry[1] is None else None
    return _made, (make, args, code.co_filename, lines)


def _made(make: Callable[..., types.CodeType], args: Any, file: str, lines: list[str] | None) -> types.CodeType:
    """There: the code again."""
    if lines is not None:
        linecache.cache.setdefault(file, (sum(map(len, lines)), None, lines, file))
    return make(*args).replace(co_filename=file)


class _Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]
    dispatch_table: ClassVar[Any] = ChainMap({types.CodeType: _reduce_code}, cloudpickle.CloudPickler.dispatch_table)


def dumps(value: Any) -> bytes:
    """`value` as `pickle.loads` takes it, in a process that has this module. Errors as `cloudpickle.dumps`."""
    with io.BytesIO() as file:
        _Pickler(file).dump(value)
        return file.getvalue()
