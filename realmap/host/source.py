"""cloudpickle, and beside each function that it sends by value where that was written: for tracebacks.

By itself it forgets the file (`<dynamic-code>`). A file that is there is named; what was typed into a notebook or a
shell is in this process alone (`linecache`), and goes along. What stands in a module that is just being imported goes
by value, too: to import it there would start the same process again, and again.
"""

from __future__ import annotations

import contextlib
import io
import linecache
import operator
import sys
import types
from collections import ChainMap
from collections.abc import Callable, Iterator
from types import FrameType
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

    def reducer_override(self, obj: Any) -> Any:
        """Of a layout of ctypes that is no module's: cloudpickle cannot take its fields. Of an end of a pipe: it would
        take the number of its descriptor, which is another's there.
        """
        pipes: Any = sys.modules.get("multiprocessing.connection")
        if pipes is not None and isinstance(obj, pipes._ConnectionBase):
            raise TypeError(f"{type(obj).__name__} objects should only be shared through inheritance")
        ctypes: Any = sys.modules.get("ctypes")
        if ctypes is not None and isinstance(obj, type):
            if issubclass(obj, ctypes.Structure | ctypes.Union):
                module = sys.modules.get(obj.__module__)
                if obj.__module__ == "__main__" or getattr(module, obj.__qualname__, None) is not obj:
                    return _reduce_layout(obj)
            elif issubclass(obj, ctypes.Array) and obj is not ctypes.Array:
                array: Any = obj
                return operator.mul, (array._type_, array._length_)
        return super().reducer_override(obj)


def _reduce_layout(layout: type) -> tuple[Any, ...]:
    own = {name: value for name, value in vars(layout).items() if type(value).__name__ not in _MADE}
    first = {name: own.pop(name) for name in list(own) if name in _LAYOUT}
    # What is not part of the layout (methods, which may name it) comes after it is there.
    return _made_layout, (layout.__name__, layout.__bases__, first), own, None, None, _fill


#: What makes a layout, and has to be there when it is made; and what is made of that.
_LAYOUT = ("_anonymous_", "_pack_", "_align_", "_layout_", "_fields_", "__module__", "__qualname__")
_MADE = ("CField", "getset_descriptor")


def _made_layout(name: str, bases: tuple[type, ...], own: dict[str, Any]) -> type:
    """There: the layout again, of a type that no module has a name for."""
    made: type = type(bases[0])(name, bases, own)
    return made


def _fill(layout: type, own: dict[str, Any]) -> None:
    for name, value in own.items():
        setattr(layout, name, value)


def dumps(value: Any) -> bytes:
    """`value` as `pickle.loads` takes it, in a process that has this module. Errors as `cloudpickle.dumps`."""
    with io.BytesIO() as file, _by_value(_being_imported()):
        _Pickler(file).dump(value)
        return file.getvalue()


def _being_imported() -> list[str]:
    """The modules whose own statements this thread is at."""
    found = []
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "<module>":
            found.append(str(frame.f_globals.get("__name__")))
        frame = frame.f_back
    return found


@contextlib.contextmanager
def _by_value(names: list[str]) -> Iterator[None]:
    """Meanwhile cloudpickle takes those of these modules, and of what is in them where they are packages, by value."""
    already = cloudpickle.list_registry_pickle_by_value()
    modules = [sys.modules[name] for name in set(names) - already - {"__main__"} if name in sys.modules]
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in modules:
            with contextlib.suppress(ValueError):  # another thread's, which was quicker
                cloudpickle.unregister_pickle_by_value(module)
