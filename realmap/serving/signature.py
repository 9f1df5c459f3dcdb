"""Whether a handler takes what it is called with: read once from its annotations, and remembered by types.

    def resize(call, image: UserBuffer, width: int, height: int | None = None)

Checked are int, float, str, bytes, bool, list, dict, None, UserBuffer, and unions of them (for typing, a float may
be an int, an int a bool; of a list[int] that it is a list). Any other annotation, and none, takes everything.
"""

from __future__ import annotations

import inspect
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from realmap.errors import WrongArguments

#: What of the values that arrive fits an annotation.
_FITS: dict[Any, frozenset[type]] = {
    int: frozenset({int, bool}),
    float: frozenset({float, int, bool}),
    str: frozenset({str}),
    bytes: frozenset({bytes}),
    bool: frozenset({bool}),
    list: frozenset({list}),
    dict: frozenset({dict}),
    None: frozenset({type(None)}),
    type(None): frozenset({type(None)}),
}
#: So many combinations of types are remembered of a handler: a peer makes up as many as it likes.
REMEMBERED = 64


class Signature:
    """What one handler takes. `check` says no in words."""

    def __init__(self, name: str, function: Callable[..., Any], buffer: type) -> None:
        """`buffer`: what a buffer arrives as. TypeError: it takes no call at all, or has a parameter named timeout."""
        self._name = name
        self._buffer = buffer
        #: The types, in order, of arguments that are known to fit.
        self.known: set[tuple[type, ...]] = set()
        try:
            self._signature = _signature(function)
        except (ValueError, TypeError, NameError):  # of something built in, say: it says itself what it takes
            self._signature = inspect.signature(lambda *args, **kwargs: None)
        parameters = list(self._signature.parameters.values())
        if not parameters or parameters[0].kind in (parameters[0].KEYWORD_ONLY, parameters[0].VAR_KEYWORD):
            what = f"{name}{self._signature}"
            raise TypeError(f"the first argument of a handler is its Call: def {name}(call, …), not {what}")
        for parameter in parameters:
            if parameter.name == "timeout" and parameter.kind is not parameter.POSITIONAL_ONLY:
                raise TypeError(
                    f"syscall {name!r} has a parameter named timeout: a caller's timeout= is how long it waits, and "
                    "never arrives; give the parameter another name (seconds)"
                )
        namespace = _names(function, buffer)
        self._fits = {each.name: _fitting(each.annotation, namespace, buffer) for each in parameters[1:]}
        self._plain = not any(self._fits.values())

    def check(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """WrongArguments: too many, too few, an unknown name, or a type that does not fit its annotation."""
        try:
            bound = self._signature.bind(None, *args, **kwargs)
        except TypeError as error:
            raise WrongArguments(self._name, why=f"syscall {self._name!r}: {error}; it is {self}") from None
        if not self._plain:
            given = iter(bound.arguments.items())
            next(given, None)  # its Call
            for name, value in given:
                self._check(name, value)
        if not kwargs and len(self.known) < REMEMBERED:
            self.known.add(tuple(map(type, args)))

    def _check(self, name: str, value: Any) -> None:
        fits = self._fits.get(name)
        if fits is None:
            return
        kind = self._signature.parameters[name].kind
        several = kind is inspect.Parameter.VAR_POSITIONAL, kind is inspect.Parameter.VAR_KEYWORD
        for each in value if several[0] else value.values() if several[1] else (value,):
            if type(each) not in fits:
                wanted = self._signature.parameters[name].annotation
                shown = wanted if isinstance(wanted, str) else inspect.formatannotation(wanted)
                is_what = "a buffer" if type(each) is self._buffer else f"of type {type(each).__name__}"
                why = f"argument {name!r} of syscall {self._name!r} is {is_what}, and should be {shown}; it is {self}"
                raise WrongArguments(self._name, why=why)

    def __str__(self) -> str:
        """What its callers pass: as its author wrote it, without its Call and what it returns."""
        first, *others = self._signature.parameters.values()
        passed = [first, *others] if first.kind is first.VAR_POSITIONAL else others
        return f"{self._name}{inspect.Signature(passed)}"


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    if sys.version_info >= (3, 14):
        import annotationlib

        return inspect.signature(function, annotation_format=annotationlib.Format.FORWARDREF)
    return inspect.signature(function)


def _names(function: Callable[..., Any], buffer: type) -> dict[str, Any]:
    """What the names in its annotations mean.

    A function that came from a script by value has only the globals that it uses, and not those of its annotations: so
    these are known by name.
    """
    known = {**vars(typing), "typing": typing, "realmap": sys.modules[buffer.__module__], buffer.__name__: buffer}
    return known | getattr(inspect.unwrap(getattr(function, "__func__", function)), "__globals__", {})


def _fitting(annotation: Any, namespace: dict[str, Any], buffer: type) -> frozenset[type] | None:
    """The types that fit; None: everything does."""
    if isinstance(annotation, str):
        try:
            annotation = eval(annotation, namespace)
        except Exception:  # whatever it means, it is not known here
            return None
    if annotation is buffer:
        return frozenset({buffer})
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        several = [_fitting(each, namespace, buffer) for each in typing.get_args(annotation)]
        return None if None in several else frozenset().union(*(each for each in several if each is not None))
    try:
        return _FITS.get(typing.get_origin(annotation) or annotation)
    except TypeError:  # nothing that could be a key
        return None
