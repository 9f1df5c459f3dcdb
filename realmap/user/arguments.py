"""What a call takes along: arguments as they can travel, and how long it waits."""

from __future__ import annotations

from typing import Any

from realmap.user.buffer import Buffer
from realmap.wire import messages, plain
from realmap.wire.client import Client

#: A timeout of more seconds than these is told as that.
LONGEST = 1e9
#: What is sent as it is.
_SENT = plain.PLAIN | {Buffer}


def call_of(client: Client, name: str, args: Any, timeout: float | None, kwargs: dict[str, Any]) -> messages.Call:
    """A call as it is sent. TypeError: the name is no str, or something cannot travel. ValueError: no timeout."""
    if not isinstance(name, str):
        raise TypeError(f"the name of a syscall is a str, not {type(name).__name__}")
    name = str.__str__(name)  # of a StrEnum, say, its text alone
    if timeout is not None:
        if not timeout >= 0:
            raise ValueError(f"timeout must be a number of seconds, not below 0: {timeout!r}")
        timeout = float(timeout) if timeout < LONGEST else LONGEST
    names = None
    if kwargs:
        names = tuple(kwargs)
        args = (*args, *kwargs.values())
    for value in args:  # most can travel, and nothing is called for those
        if type(value) not in _SENT:
            plain.check(args, Buffer, f"an argument of {name!r}")
            break
    return messages.Call(client.next_id(), name, args, timeout, names)
