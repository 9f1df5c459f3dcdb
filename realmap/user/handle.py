"""`Handle`: what stands for shared memory while it travels: through a pickle, a message, an environment variable."""

from __future__ import annotations

import re

import msgspec

from realmap.errors import InvalidHandle
from realmap.rights import MappingAccessRights, rights_of

_FORM = re.compile(r"realmap:([0-9a-f]{32}):(\d+):(\d+)@(.+)", re.DOTALL)


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
