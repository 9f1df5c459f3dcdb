"""Syscalls: plain functions, registered by name, and how one is run for a caller."""

from __future__ import annotations

import errno
import inspect
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, overload

import msgspec

from realmap._core import faults as host_faults
from realmap.errors import KernelError, MemoryFault
from realmap.kernel import faults
from realmap.kernel.logs import log
from realmap.kernel.user_buffer import UserBuffer
from realmap.wire.messages import Done, Failed, error_of

if TYPE_CHECKING:
    from realmap.kernel.kernel import Kernel
    from realmap.kernel.processes import UserProcess

F = TypeVar("F", bound=Callable[..., Any])
_MARK = "__realmap_syscall__"


@dataclass(eq=False, slots=True)
class Syscall:
    """A handler under its name; `blocking` ones run on a worker thread. And how often it was called so far."""

    name: str
    function: Callable[..., Any]
    blocking: bool
    calls: int = 0
    #: Calls that ended in an error.
    failed: int = 0


class Call(msgspec.Struct, eq=False):  # a Struct because it is made in C: one for every call
    """Who is calling: the first argument of every handler.

    `process` is the caller (`.pid`, `.memory`), `name` the syscall, `kernel` the `Kernel` that runs it.
    """

    process: UserProcess
    name: str
    kernel: Kernel


@overload
def syscall(function: F, /) -> F: ...
@overload
def syscall(*, name: str | None = None, blocking: bool = False) -> Callable[[F], F]: ...
def syscall(function: Any = None, /, *, name: str | None = None, blocking: bool = False) -> Any:
    """Makes a function a syscall: `@syscall`, or `@syscall(name=None, blocking=False)`.

    It is called as `function(call, *args)`: `call` is a `Call`, buffers among the arguments arrive as
    `UserBuffer`, other arguments as the plain values they were (tuples as lists). What it returns
    goes back to the caller. A `KernelError` it raises reaches the caller as itself, anything else as
    `SyscallFailed` with the traceback. Handlers run one after the other on the kernel's thread; one
    that takes long is declared `blocking=True` and runs on a thread of its own.

    TypeError: it is not applied to a function that returns (but to an `async` one, say), or the name is no str.
    """

    def mark(target: F) -> F:
        if not callable(target):
            raise TypeError(f"@syscall goes on a function, not on {target!r}")
        if inspect.iscoroutinefunction(target) or inspect.isgeneratorfunction(target):
            raise TypeError(
                f"a handler returns its answer: {target!r} is async or yields; blocking=True takes its time"
            )
        called = name if name is not None else getattr(target, "__name__", None)
        if not isinstance(called, str) or not called:
            raise TypeError(f"the name of a syscall is a str, not {called!r}")
        setattr(target, _MARK, (called, blocking))
        return target

    return mark if function is None else mark(function)


def registry(functions: Iterable[Callable[..., Any]]) -> dict[str, Syscall]:
    """The syscalls by name; a function that is not marked goes by its own name.

    TypeError: something is not callable or has no name. ValueError: two have the same name.
    """
    found: dict[str, Syscall] = {}
    for function in functions:
        if not hasattr(function, _MARK):
            if not callable(function) or not hasattr(function, "__name__"):
                raise TypeError(f"a syscall is a function with a name, not {function!r}")
            name, blocking = function.__name__, False
        else:
            name, blocking = getattr(function, _MARK)
        if name in found:
            raise ValueError(f"two syscalls are named {name!r}; give one another name with @syscall(name=...)")
        found[name] = Syscall(name, function, blocking)
    return found


def marked(values: Iterable[Any]) -> list[Callable[..., Any]]:
    """Those of `values` that `@syscall` was put on, each once."""
    found = {id(value): value for value in values if callable(value) and hasattr(value, _MARK)}
    return list(found.values())


def _unsendable(value: Any) -> Any:
    raise TypeError(
        f"a {type(value).__name__} cannot travel to a caller: numbers, text, bytes, lists, dicts and None can "
        "(of numpy's numbers: value.item()); "
        "large or mutable bytes belong into a buffer"
    )


_encoder = msgspec.msgpack.Encoder(enc_hook=_unsendable)


def run(syscall: Syscall, call: Call, id: int, args: list[Any], buffers: Sequence[UserBuffer]) -> bytes:
    """Runs the handler; its answer, or its error, as a message. Never raises.

    MemoryFault where bytes of `buffers` were gone when it touched them, whatever it made of them.
    """
    before = host_faults()
    try:
        answer = _encoder.encode(Done(id, syscall.function(call, *args)))
        if host_faults() != before:
            fault = _fault(call, buffers, None, before)
            if fault is not None:
                syscall.failed += 1
                return failed(id, fault)
        return answer
    except BaseException as error:  # SystemExit too: a handler ends its call and nothing else
        syscall.failed += 1
        if host_faults() != before or (isinstance(error, OSError) and error.errno == errno.EFAULT):
            fault = _fault(call, buffers, error, before)
            if fault is not None:
                return failed(id, fault)
        if isinstance(error, KernelError):
            return failed(id, error)
        text = "".join(traceback.format_exception(type(error), error, _without_us(error)))
        return failed(id, error, syscall.name, text)


def _fault(call: Call, buffers: Sequence[UserBuffer], error: BaseException | None, before: int) -> MemoryFault | None:
    try:
        return faults.of_call(buffers, call.kernel.memory, error, before)
    except Exception:  # a bug of ours: the call is answered all the same
        extra = call.process.facts | {"syscall": call.name}
        log.exception("the kernel failed to find out which bytes were gone", extra=extra)
        return None


def _without_us(error: BaseException) -> Any:
    """The traceback from the handler's own frame on."""
    return error.__traceback__.tb_next if error.__traceback__ and error.__traceback__.tb_next else error.__traceback__


def failed(id: int, error: BaseException, name: str = "", text: str = "") -> bytes:
    """An error as the answer to request `id`."""
    return _encoder.encode(Failed(id, error_of(error, name, text)))


def done(id: int, value: Any, descriptors: int) -> bytes:
    """An answer to request `id`, which brings so many descriptors."""
    return _encoder.encode(Done(id, value, descriptors))


def encode(message: Any) -> bytes:
    """Any other message."""
    return _encoder.encode(message)
