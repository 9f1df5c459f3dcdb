"""How a handler is run for a caller, and what it is told of that: `Call`."""

from __future__ import annotations

import errno
import time
import traceback
from collections.abc import Sequence
from typing import Any

import msgspec

from realmap._core import faults as host_faults
from realmap._core import write_done
from realmap.errors import KernelError, MemoryFault, WrongArguments
from realmap.serving import faults
from realmap.serving.caller import Caller, RunningKernel
from realmap.serving.logs import log
from realmap.serving.registry import Syscall
from realmap.serving.user_buffer import UserBuffer, require_gone, shown
from realmap.wire import plain
from realmap.wire.messages import DONE, Done, Failed, arguments, arguments_of, by_position, error_of
from realmap.wire.messages import Call as Request
from realmap.wire.plain import PLAIN


class Call(msgspec.Struct, eq=False):  # a Struct because it is made in C: one for every call
    """Who is calling: the first argument of every handler.

    `process` is the caller (`.pid`, `.memory`), `name` the syscall, `kernel` the `Kernel` that runs it. `deadline`:
    until when the caller waits, or the kernel (`Limits.seconds`) lets it; seconds of time.monotonic(), or None.
    """

    process: Caller
    name: str
    kernel: RunningKernel
    deadline: float | None = None

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for the answer: the caller has died or closed its connection, the deadline has passed,
        or the kernel ends. For handlers that can stop early."""
        late = self.deadline is not None and time.monotonic() >= self.deadline
        return late or not self.process.alive or self.kernel.ending


#: What `check` of `plain` has let through and MessagePack does not know: one of numpy's numbers.
_encoder = msgspec.msgpack.Encoder(enc_hook=lambda value: value.item())
_failure = msgspec.msgpack.Decoder(Failed)


def run(syscall: Syscall, call: Call, request: Request, buffers: Sequence[UserBuffer]) -> bytes:
    """Decodes the arguments, and runs the handler; its answer, or its error, as a message. Never raises.

    MemoryFault where bytes of `buffers` were gone when it touched them, whatever it made of them.
    """
    id, names = request.id, request.names
    packed: Any = request.args
    try:
        if type(packed) is list:  # plain ones, which have been read with their call
            args = packed
        else:
            args = arguments_of(packed, buffers) if buffers else arguments(packed)
        # By hand for up to two, which most have: a map costs twice as much.
        count = len(args)
        if count == 1:
            kinds: tuple[type, ...] = (type(args[0]),)
        elif count == 2:
            kinds = type(args[0]), type(args[1])
        else:
            kinds = tuple(map(type, args)) if count else ()
        if names is not None or kinds not in syscall.known:
            args, kwargs = by_position(args, names)
            syscall.signature.check(args, kwargs)
    except WrongArguments as error:
        return failed(id, error)
    except Exception as error:  # they are no list, or there is no memory for them
        why = f"the arguments of {syscall.name!r} cannot be decoded: {error or type(error).__name__}"
        return failed(id, KernelError(why=why))
    before = host_faults()
    try:
        value = syscall.function(call, *args) if names is None else syscall.function(call, *args, **kwargs)
        answer = write_done(id, value)
        if answer is None:  # it is less plain, or long
            if type(value) not in PLAIN:
                plain.check((value,), None, f"the answer of {syscall.name!r}")
            answer = _encoder.encode((DONE, id, value, 0))  # a Done: a tuple costs less than a Struct
        if shown:
            require_gone(buffers, syscall.function)
        if host_faults() != before:
            fault = _fault(call, buffers, None, before)
            if fault is not None:
                return failed(id, fault)
        return answer
    except BaseException as error:  # SystemExit too: a handler ends its call and nothing else
        for buffer in buffers if shown else ():
            shown.pop(buffer, None)
        try:
            return _failed(syscall.name, call, id, buffers, error, before)
        except BaseException as odd:  # no memory for its words, say: the thread must go on
            return failed(id, odd)


def _failed(name: str, call: Call, id: int, buffers: Sequence[UserBuffer], error: BaseException, before: int) -> bytes:
    if host_faults() != before or (isinstance(error, OSError) and error.errno == errno.EFAULT):
        fault = _fault(call, buffers, error, before)
        if fault is not None:
            return failed(id, fault)
    if isinstance(error, KernelError):
        return failed(id, error)
    # From the handler's own frame on; without any where it had returned.
    frames = error.__traceback__.tb_next if error.__traceback__ else None
    returned = frames is not None and frames.tb_frame.f_code in (plain.check.__code__, require_gone.__code__)
    text = "".join(traceback.format_exception(type(error), error, frames)) if frames and not returned else ""
    return failed(id, error, name, text)


def _fault(call: Call, buffers: Sequence[UserBuffer], error: BaseException | None, before: int) -> MemoryFault | None:
    try:
        return faults.of_call(buffers, call.kernel.memory, error, before)
    except Exception:  # a bug of ours: the call is answered all the same
        extra = call.process.facts | {"syscall": call.name}
        log.exception("realmap failed to find out which bytes were gone", extra=extra)
        return None


def failed(id: int, error: BaseException, name: str = "", text: str = "") -> bytes:
    """An error as the answer to request `id`."""
    return _encoder.encode(Failed(id, error_of(error, name, text)))


def has_failed(answer: bytes | BaseException) -> bool:
    return isinstance(answer, BaseException) or answer[1] != DONE


def code_of(answer: bytes) -> int:
    """The code of the error that an answer is; 0: it is none."""
    return 0 if answer[1] == DONE else _failure.decode(answer).error.code


def done(id: int, value: Any, descriptors: int) -> bytes:
    """An answer to request `id`, which brings so many descriptors."""
    return _encoder.encode(Done(id, value, descriptors))


def encode(message: Any) -> bytes:
    """A message that is no answer to a call."""
    return _encoder.encode(message)
