"""The registry: plain functions under their names, and how often each was called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar, overload

from realmap._core import Durations
from realmap.serving.signature import Signature
from realmap.wire import status

F = TypeVar("F", bound=Callable[..., Any])
_MARK = "__realmap_syscall__"


@dataclass(eq=False, slots=True)
class Syscall:
    """A handler under its name; `blocking` ones run on a worker thread. And how often it was called so far."""

    name: str
    function: Callable[..., Any]
    blocking: bool
    signature: Signature
    calls: int = 0
    #: Calls that ended in an error.
    failed: int = 0
    #: Calls of a handler that is not `blocking`, and lost the loop.
    late: int = 0
    #: How many are `GivenUp` now.
    given_up: int = 0
    #: How long its calls took: from when the loop took them up, or a worker thread began.
    durations: Durations = field(default_factory=Durations)
    #: Its name on the status page.
    label: bytes = field(init=False)
    #: Whether it is an `async` one, which only a service runs.
    is_async: bool = field(init=False)
    #: Of its signature: looked into at every call.
    known: set[tuple[type, ...]] = field(init=False)

    def __post_init__(self) -> None:
        self.label = status.label(self.name)
        self.known = self.signature.known
        self.is_async = inspect.iscoroutinefunction(self.function)


@overload
def syscall(function: F, /) -> F: ...
@overload
def syscall(*, name: str | None = None, blocking: bool = False) -> Callable[[F], F]: ...
def syscall(function: Any = None, /, *, name: str | None = None, blocking: bool = False) -> Any:
    """Makes a function a syscall: `@syscall`, or `@syscall(name=None, blocking=False)`.

    It is called as `function(call, *args, **kwargs)`: `call` is a `Call`, buffers among the arguments arrive as
    `UserBuffer`, other arguments as the plain values they were (tuples as lists). Where they are annotated as int,
    float, str, bytes, bool, list, dict, None, UserBuffer, or unions of these, others are a TypeError at the call. What
    it returns goes back to the caller. A `KernelError` it raises reaches the caller as itself, anything else as
    `SyscallFailed` with the traceback. What it prints, and what it logs, comes out where the kernel was booted.

    What it keeps in a global stays there, from call to call, for all handlers that came along: in the kernel's
    process, not in this one. `boot(initializer=…)` is where that begins. Two handlers never run at once, but where one
    is `blocking` or takes longer than 20 ms: what they share with that has a lock.

    Handlers run one after the other on the thread that has the kernel's loop;
    one that takes longer than 20 ms loses it, others are served meanwhile, and its caller gets the answer all the
    same. One that is known to take long is declared `blocking=True`, and runs on a thread of its own from the start.
    Either way nobody is served while a C function of it keeps the GIL, and it never runs on the main thread.

    An `async` one is for `me.serve`, which runs it in an event loop.

    TypeError: it is not applied to a function that returns (but to a generator, say), or the name is no str.
    """

    def mark(target: F) -> F:
        if not callable(target):
            raise TypeError(f"@syscall goes on a function, not on {target!r}")
        _require_answer(target)
        if inspect.iscoroutinefunction(target) and blocking:
            raise TypeError(f"an async handler runs in an event loop, not on a thread of its own: {target!r}")
        called = name if name is not None else getattr(target, "__name__", None)
        if not isinstance(called, str) or not called:
            raise TypeError(f"the name of a syscall is a str, not {called!r}")
        setattr(target, _MARK, (called, blocking))
        return target

    return mark if function is None else mark(function)


def _require_answer(function: Callable[..., Any]) -> None:
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(f"a handler returns its answer: {function!r} yields")


def registry(
    functions: Iterable[Callable[..., Any]], buffer: type, *, may_be_async: bool = False
) -> dict[str, Syscall]:
    """The syscalls by name; a function that is not marked goes by its own name. `buffer`: what a buffer arrives as.

    TypeError: something is no function that can be a handler, or has no name. ValueError: two have the same name.
    """
    if callable(functions):
        raise TypeError(f"syscalls is a list of handlers: [{getattr(functions, '__name__', '…')}]")
    found: dict[str, Syscall] = {}
    for function in functions:
        if not hasattr(function, _MARK):
            if not callable(function) or not hasattr(function, "__name__"):
                raise TypeError(f"a syscall is a function with a name, not {function!r}")
            _require_answer(function)
            name, blocking = function.__name__, False
        else:
            name, blocking = getattr(function, _MARK)
        if inspect.iscoroutinefunction(function) and not may_be_async:
            raise TypeError(f"the kernel has no event loop for {function!r}, which is async: `me.serve` serves it")
        if name in found:
            raise ValueError(f"two syscalls are named {name!r}; give one another name with @syscall(name=...)")
        found[name] = Syscall(name, function, blocking, Signature(name, function, buffer))
    return found


def marked(values: Iterable[Any]) -> list[Callable[..., Any]]:
    """Those of `values` that `@syscall` was put on, each once."""
    found = {id(value): value for value in values if callable(value) and hasattr(value, _MARK)}
    return list(found.values())
