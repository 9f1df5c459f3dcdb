"""`contextmanager` and `asynccontextmanager`, of which who forgets the `with` is told so, by whatever is asked for."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, NoReturn, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class _Telling:
    _how = "with"

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"no {name!r}: use this by `{self._how} … as x`, and x has it")

    def __getitem__(self, _: object) -> NoReturn:
        raise TypeError(f"no items: use this by `{self._how} … as x`, and x has them")


class _With(_Telling, contextlib._GeneratorContextManager[T]):
    pass


class _AsyncWith(_Telling, contextlib._AsyncGeneratorContextManager[T]):
    _how = "async with"


def block(function: Callable[P, Iterator[T]]) -> Callable[P, contextlib._GeneratorContextManager[T]]:
    """As `contextlib.contextmanager`."""
    made: Any = _With
    return functools.wraps(function)(lambda *args, **kwargs: made(function, args, kwargs))


def async_block(function: Callable[P, AsyncIterator[T]]) -> Callable[P, contextlib._AsyncGeneratorContextManager[T]]:
    """As `contextlib.asynccontextmanager`."""
    made: Any = _AsyncWith
    return functools.wraps(function)(lambda *args, **kwargs: made(function, args, kwargs))
