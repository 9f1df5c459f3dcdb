"""Handlers of the kernel that is attacked. Imported by name in its process.

What they do with a buffer is bounded: a hostile client may pass all that it has, as often as it likes. Some check what
they are passed, as a careful handler does; the others raise whatever comes of it: a traceback, which takes its time.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Any

from realmap import Call, InvalidHandle, UserBuffer, k_r, k_rw, syscall

#: Of a longer buffer only so many bytes are digested.
DIGESTED = 64 << 10


@syscall
def nop(call: Call, *_: Any) -> None:
    """Nothing."""


@syscall
def echo(call: Call, *args: Any) -> list[Any]:
    """The plain arguments again."""
    return [[arg.address, len(arg)] if isinstance(arg, UserBuffer) else arg for arg in args]


def digest(data: Any) -> str:
    """Of its first bytes, in place."""
    if not isinstance(data, UserBuffer):
        raise InvalidHandle(None, why="no buffer")
    with data.mirror(k_r) as mirror:
        with memoryview(mirror) as view, view[:DIGESTED] as part:
            return hashlib.sha256(part).hexdigest()


@syscall
def sha256(call: Call, data: UserBuffer, *_: Any) -> str:
    """Digests in place."""
    return digest(data)


@syscall
def copy_in(call: Call, data: UserBuffer, length: int | None = None, offset: int = 0) -> int:
    """Copies a part of it in, with whatever arguments."""
    return len(data.copy_in(length, offset))


@syscall
def copy_out(call: Call, data: UserBuffer, content: bytes, offset: int = 0) -> None:
    """Writes into it, with whatever arguments."""
    data.copy_out(content, offset)


@syscall
def mirror(call: Call, data: UserBuffer, offset: int = 0, length: int | None = None) -> int:
    """Mirrors a part of it and writes there, with whatever arguments."""
    with data.mirror(k_rw, offset, length) as found:
        found[0] = 1
        found[len(found) - 1] = 2
        return len(found)


@syscall(blocking=True)
def doze(call: Call, *buffers: UserBuffer) -> list[str]:
    """Waits a moment on a thread of its own before it digests: its client may be gone by then."""
    time.sleep(0.001)
    return [digest(data) for data in buffers[:4]]


ALL: list[Callable[..., Any]] = [nop, echo, sha256, copy_in, copy_out, mirror, doze]
