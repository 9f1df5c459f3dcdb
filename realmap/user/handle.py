"""`Handle`: what stands for shared memory while it travels: through a pickle, a message, an environment variable."""

from __future__ import annotations

import math
import re
from operator import index
from typing import TYPE_CHECKING, Any, SupportsIndex

import msgspec

from realmap.errors import InvalidHandle
from realmap.rights import MappingAccessRights, rights_of
from realmap.wire import messages

if TYPE_CHECKING:
    from realmap.user.buffer import Buffer
    from realmap.user.process import Process

_FORM = re.compile(r"realmap:([0-9a-f]{32}):(\d{1,20}):(\d|1[0-5])@(.+)", re.DOTALL)


class Handle(msgspec.Struct, frozen=True):
    """Names `length` bytes of memory that a process of the kernel at `path` shared. Made by `Process.share`.

    It cannot be guessed: who has it may attach (with `rights` at most), in any process of that kernel. It can be
    printed (`str`), read again (`Handle.parse`), and pickled; the memory lives as long as the handle does.

    >>> import realmap
    >>> with realmap.boot() as kernel, kernel.connect() as me, kernel.connect() as other:
    ...     buffer = me.map(100)
    ...     buffer[:5] = b"hello"
    ...     text = str(me.share(buffer, realmap.u_r))
    ...     other.attach(text, offset=1, length=3)[:]
    b'ell'
    """

    path: str
    token: str
    length: int
    rights: MappingAccessRights

    def __str__(self) -> str:
        return f"realmap:{self.token}:{self.length}:{int(self.rights)}@{self.path}"

    def __repr__(self) -> str:
        return f"<Handle {self.token[:8]}…, {self.length} bytes, {self.rights}, of the kernel at {self.path!r}>"

    @classmethod
    def parse(cls, text: str) -> Handle:
        """The handle that `str` was made of. InvalidHandle: it is none. TypeError: no text."""
        if not isinstance(text, str):
            raise TypeError(f"a handle is read from text, not from {type(text).__name__}")
        found = _FORM.fullmatch(text.strip())
        if found is None:
            raise InvalidHandle(text[:80], why="this is no handle: they read realmap:TOKEN:LENGTH:RIGHTS@PATH")
        token, length, rights, path = found.groups()
        return cls(path, token, int(length), rights_of(int(rights)))


def as_handle(value: Handle | str) -> Handle:
    """A handle, or the one that a text is of. InvalidHandle: a text of none. TypeError: neither."""
    if isinstance(value, str):
        return Handle.parse(value)
    if not isinstance(value, Handle):
        raise TypeError(f"a Handle, or its text, is wanted, not {value!r}")
    return value


def new_handle(
    process: Process,
    buffer: Buffer,
    allowed: MappingAccessRights,
    uses: SupportsIndex | None,
    seconds: float | None,
    keep: bool | float,
    *,
    more: bool = False,
) -> Handle:
    """As `Process.share`. `more`: where one was made alike before, that one, with a use more."""
    client = process._own_client
    request = messages.Share(
        client.next_id(),
        buffer.address,
        len(buffer),
        int(allowed),
        None if uses is None else index(uses),
        None if seconds is None else float(seconds),
        (math.inf if keep else 0.0) if isinstance(keep, bool) else float(keep),
        None,
        more,
    )

    def revoke_late(token: Any) -> bytes:
        return client.encode(messages.Revoke(0, token))

    late = None if more else revoke_late  # of one that others have as well, a use is lost
    token, answer = client.request(request, name="share", late=late)
    try:
        handle = Handle(process.path, token, len(buffer), allowed)
        answer.take()
    except BaseException:  # a signal handler's: nobody will ever have it
        if not more:
            process._own_client.notice(messages.Revoke(0, token))
        raise
    return handle
