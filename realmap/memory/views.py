"""Which views keep memory from being unmapped: by the names that a program has for them."""

from __future__ import annotations

import sys
from inspect import CO_OPTIMIZED
from types import FrameType
from typing import Any

#: So many functions are looked through, from the innermost that is the program's.
FRAMES = 8


def named(error: BufferError, owner: object) -> BufferError:
    """The error, with the variables that show the memory of `owner`, of the functions at work on this thread."""
    found: list[str] = []
    frame: FrameType | None = sys._getframe(1)
    for _ in range(FRAMES):
        while frame is not None and frame.f_globals.get("__name__", "").startswith("realmap."):
            frame = frame.f_back
        if frame is None:
            break
        found += [f"{each} in {frame.f_code.co_name}" for each in _names(frame, owner)]
        frame = frame.f_back
    if not found:
        return error
    first = found[0].split()[-3]
    return BufferError(f"{error}: {', and '.join(found)} (`del {first}`)")


def in_module(function: Any, owner: object) -> list[str]:
    """The variables of the function's module that show the memory of `owner`."""
    variables = getattr(function, "__globals__", {})
    return [f"the global {name}" for name, value in list(variables.items()) if _shows(value, owner)]


def _names(frame: FrameType, owner: object) -> list[str]:
    variables = frame.f_locals
    try:
        return [f"the {type(value).__name__} {name}" for name, value in variables.items() if _shows(value, owner)]
    finally:
        # Before Python 3.13 it is a copy, which the frame keeps: with it the views.
        if sys.version_info < (3, 13) and frame.f_code.co_flags & CO_OPTIMIZED:
            variables.clear()


def _shows(value: Any, owner: object) -> bool:
    """Whether it is a memoryview of that, or an array over one."""
    try:
        for _ in range(FRAMES):
            value = value.obj if isinstance(value, memoryview) else getattr(value, "base", None)
            if value is None:
                return False
            if getattr(value, "_window", value) is getattr(owner, "_window", owner):
                return True
    except Exception:  # whatever it is: it is asked for an attribute
        pass
    return False
