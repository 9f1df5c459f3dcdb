"""What is said between a user process and its kernel: typed structs, in MessagePack, checked by msgspec.

    user                                    kernel
      ── Hello(protocol, pid, start) ────────▶  once, first; its form never changes
      ◀─ Welcome | Refused ──────────────────
      ── Call | Map | Share | Attach | … ────▶  each with an id of the caller's choosing
      ◀─ Done(id, value) | Failed(id, error) ──   in any order; descriptors ride on it
      ◀─ Bye(error) ─────────────────────────  last: the kernel ends, or sends this client away

The arguments of a call stay bytes until its handler starts: the loop, which reads for everybody, does not decode them.
A buffer among them travels as (address, length); no bytes of it do.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import Annotated, Any, TypeAlias, TypeVar

import msgspec

from realmap import errors
from realmap._core import BROKEN, DEEPEST, FOREIGN, KEY_NO_TEXT, TOO_DEEP, TOO_LONG, TOO_MUCH
from realmap.errors import KernelError, SyscallFailed
from realmap.rights import MappingAccessRights, MemoryType

#: Raised with every change that an older side would misunderstand.
PROTOCOL = 13
VERSION = __version__ = "0.1.0"
#: A message may be this long, in bytes, both ways; larger things belong into a buffer.
MAX_MESSAGE = 1 << 20
#: The objects made of a message may take this much memory, in bytes, as they are estimated before.
MAX_OBJECTS = 4 * MAX_MESSAGE
#: What can be wrong with a message, as is seen before anything is made of it, and what would be right.
FLAWS = {
    BROKEN: "it is no MessagePack",
    TOO_DEEP: f"lists and dicts within one another, more than {DEEPEST} with the message itself: make it flatter",
    KEY_NO_TEXT: "a key of a dict is no text: make it one, or send a list of pairs",
    FOREIGN: "an extension of MessagePack (a time?) is no buffer: send it as text or a number",
    TOO_MUCH: f"as objects its values take more than {MAX_OBJECTS} bytes: put them into a buffer",
    TOO_LONG: f"a message carries at most {MAX_MESSAGE} bytes; put more into a buffer",
}
#: Mappings of up to so many bytes are recycled: their windows are parked when they are unmapped, for their next use.
RECYCLED = 1 << 20
#: Descriptors that one answer brings at most (Linux takes 253; an ordinary process may open 1024 in all).
MAX_DESCRIPTORS = 64
#: Text of errors is cut to this many characters.
MAX_TEXT = 64 << 10


class Hello(msgspec.Struct, tag="hello"):
    """The first message: who speaks, as that process sees itself. Encoded as a map, so that later versions can add."""

    protocol: int
    version: str
    pid: int
    start: int
    control: bool = False


class Error(msgspec.Struct, array_like=True):
    """An error of ours: its wire code, its facts in the order of its constructor, and its words."""

    code: int
    facts: list[Any]
    why: str


class Welcome(msgspec.Struct, tag="welcome"):
    """The kernel takes the process in: its number there, and the kernel's pid."""

    version: str
    process: int
    kernel: int
    #: How long to spin for an answer, in microseconds; above 0, a ring's descriptor comes along.
    spin: float = 0
    #: What its forked children show to be taken for that.
    secret: str = ""


class Refused(msgspec.Struct, tag="refused"):
    """The kernel does not; why."""

    protocol: int
    version: str
    error: Error


class _Request(msgspec.Struct, array_like=True, frozen=True, gc=False):  # none refers to anything that refers to it
    id: Annotated[int, msgspec.Meta(ge=0)]


class Call(_Request, tag=1, frozen=True):
    """A syscall by name. `timeout`: how many seconds its caller waits; None: for ever.

    `args`: a list, packed; of a call that was read by `read_call`, the list itself. `names`: of the last ones, where
    some are by keyword.
    """

    name: str
    args: msgspec.Raw
    timeout: float | None = None
    names: tuple[str, ...] | None = None


class Map(_Request, tag=2, frozen=True):
    """Memory of `length` bytes.

    Done: [address, length in whole pages, number of segments, bytes in huge pages, its serial], with the first
    descriptors.
    """

    length: int
    kind: int
    rights: int
    fragment: int | None
    name: str | None
    commit: bool
    huge: bool = False


class More(_Request, tag=3, frozen=True):
    """The descriptors of the mapping at `address` from segment `first` on. Done: None, with them."""

    address: int
    first: int


class Move(_Request, tag=4, frozen=True):
    """The mapping at `address` cannot be there: [start, end) is taken. Done: its new address."""

    address: int
    start: int
    end: int


class Unmap(_Request, tag=5, frozen=True):
    """The mapping is gone from the user's side. Done: None; with id 0 there is no answer.

    `place`: where its window is parked, which is still there, without rights. What becomes of it is said beside the
    ring (`_core/stock.c`).
    """

    address: int
    length: int
    place: int = -1


class Query(_Request, tag=6, frozen=True):
    """What is at `address`? Done: a `MemoryInfo`."""

    address: int


class Ask(_Request, tag=7, frozen=True):
    """One of the kernel's own services by name (stats, books, trace-start, …), and what about. Done: its answer."""

    what: str
    about: int | bytes = 0


class Share(_Request, tag=8, frozen=True):
    """A handle for `length` bytes at `address`, good for `uses` and `seconds`, or without such an end (None).

    `keep`: how many seconds it outlives its maker (infinity: for ever). `name`: it can be attached by that as well as
    by a token, and by everybody who is let in. `more`: one more use of the one that was made alike, with
    this, if it is not spent yet. Done: its token, or its name.
    """

    address: int
    length: int
    rights: int
    uses: int | None
    seconds: float | None
    keep: float
    name: str | None = None
    more: bool = False


class Attach(_Request, tag=9, frozen=True):
    """A mapping of what the handle `token` stands for: the pages of [offset, offset + length); None: to its end, all.

    Done: [address, length in whole pages, number of segments, bytes in huge pages, its serial, where the first byte
    asked for is in it, how many were asked for, rights, [[offset in its segment, length] of each segment], whether it
    may be parked and attached so again], with the first descriptors.
    """

    token: str
    offset: int
    length: int | None
    rights: int | None


class Revoke(_Request, tag=10, frozen=True):
    """Ends the handle `token`. Done: None; with id 0 there is no answer."""

    token: str


class Adopt(_Request, tag=11, frozen=True):
    """A forked child, new here, inherited these (address, length, serial) from the process of this secret.

    `more`: others follow. Done: which of them that has still.
    """

    secret: str
    places: list[tuple[int, int, int]]
    more: bool = False


class Forked(_Request, tag=12, frozen=True):
    """This process is about to fork, and has unmapped what was parked. No answer is sent.

    `inherits`: it has something mapped, which the child has as well.
    """

    inherits: bool = True


class Leave(_Request, tag=13, frozen=True):
    """This process ends in good order: the names that it gave stay without it. Done: None."""


class Publish(_Request, tag=14, frozen=True):
    """`memory`, and a name for all of it, as by `Share`: both or none. `keep`: as there. Done: as `Map`."""

    memory: Map
    name: str
    keep: float


class NestedCall(Call, tag=15, frozen=True):
    """A call that a handler of a service makes: `seats`, in order, of the services that wait for it."""

    seats: tuple[int, ...] = ()


class Serve(_Request, tag=16, frozen=True):
    """This process serves calls of these names, so many at a time, and lets so many wait; it holds so many descriptors
    at most of what one caller lends. See `Opened`.

    Done: the number of its seat. Descriptors: the seat's socket, its page.
    """

    names: list[str]
    threads: int
    queue: int
    descriptors: int = 256


class Open(_Request, tag=17, frozen=True):
    """A session with a server of `name`, but none of these seats.

    Done: [session, seat, the server's pid, microseconds to spin, all that it serves]. Descriptors: its socket,
    its ring, the seat's page, which may only be read.
    """

    name: str
    but: list[int] = []


class Close(_Request, tag=18, frozen=True):
    """The caller ends a session. No answer."""

    session: int


class Lend(_Request, tag=19, frozen=True):
    """The server of a session may map the frames of the mapping at `address`, for as long as that is there.

    Done: None, once the server can know of it (`Granted`).
    """

    session: int
    address: int


Request = (
    Call
    | Map
    | More
    | Move
    | Unmap
    | Query
    | Ask
    | Share
    | Attach
    | Revoke
    | Adopt
    | Forked
    | Leave
    | Publish
    | Serve
    | Open
    | Close
    | Lend
)
#: How a name is written where a token may be.
NAMED = "name:"


#: The tag of an answer that is no error: the second byte of its message.
DONE = 1


class Done(msgspec.Struct, array_like=True, tag=DONE, gc=False):
    """The answer, and how many descriptors belong to it."""

    id: int
    value: Any
    descriptors: int = 0


class Failed(msgspec.Struct, array_like=True, tag=2):
    """An error in place of the answer."""

    id: int
    error: Error


class Bye(msgspec.Struct, array_like=True, tag=3):
    """The last message: why the connection ends."""

    error: Error


class Carrier(msgspec.Struct, array_like=True, tag=4):
    """Brings the descriptors of an answer that comes by the ring, right after it."""

    id: int


Reply = Done | Failed | Bye | Carrier


class MemoryInfo(msgspec.Struct, frozen=True):
    """What `Process.query` answers: the mapping, or the hole (type UNMAPPED), that an address lies in. Bytes."""

    address: int
    length: int
    type: MemoryType
    rights: int
    phys_offset: int
    refcount: int


#: Of a buffer: (address, length), in bytes.
Place: TypeAlias = tuple[int, int]
BUFFER_EXT = 1
_BUFFER = struct.Struct("=QQ")
_TYPES = {errors.InvalidMemState.code, errors.WrongMappingFramesForType.code}
Buffer = TypeVar("Buffer")


def buffer_ext(address: int, length: int) -> msgspec.msgpack.Ext:
    """A buffer among the arguments of a call."""
    return msgspec.msgpack.Ext(BUFFER_EXT, _BUFFER.pack(address, length))


def by_position(args: list[Any], names: tuple[str, ...] | None) -> tuple[list[Any], dict[str, Any]]:
    """Those by position, and those by keyword. ValueError: there are more names than arguments, or one twice."""
    if names is None:
        return args, {}
    first = len(args) - len(names)
    if first < 0 or len(set(names)) < len(names):
        raise ValueError(f"{len(args)} arguments, of which these are by name: {names}")
    return args[:first], dict(zip(names, args[first:], strict=True))


#: The arguments of a call that has no buffers. MsgspecError: they are no list.
arguments = msgspec.msgpack.Decoder(list[Any]).decode


def arguments_of(args: msgspec.Raw, buffers: Sequence[Buffer]) -> list[Any]:
    """Those of one that has: `buffers`, as they were found when it was looked over, in their order."""
    if len(buffers) == 1:  # the common case: no code of Python is run for it
        found = msgspec.msgpack.decode(args, ext_hook={BUFFER_EXT: buffers[0]}.get)
    else:
        each = iter(buffers)
        found = msgspec.msgpack.decode(args, ext_hook=lambda code, data: next(each))
    if not isinstance(found, list):
        raise msgspec.ValidationError("it is no list")
    return found


def error_of(error: BaseException, name: str = "", traceback: str = "") -> Error:
    """An exception as it travels: one of ours as itself, any other as `SyscallFailed` of the syscall `name`."""
    if not isinstance(error, KernelError):
        try:
            text = str(error)
        except Exception as inner:
            text = f"its text cannot be had: {type(inner).__name__}"
        error = SyscallFailed(name, type(error).__name__, text[:MAX_TEXT], traceback[-MAX_TEXT:], os.getpid())
    return Error(error.code, [_plain(fact) for fact in error.facts().values()], _plain_text(str(error.why)[:MAX_TEXT]))


def _plain(fact: Any) -> Any:
    """A fact as MessagePack can carry it: integers of at most 64 bits, text without lone surrogates."""
    if fact is None or isinstance(fact, bool | float):
        return fact
    if isinstance(fact, int) and -(1 << 63) <= fact < 1 << 64:
        return int(fact)
    return _plain_text(str(fact))


def _plain_text(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


#: What comes of a peer's bytes that are no message of ours: text that is no UTF-8, too deep, a key that cannot be
#: hashed, facts that are not those of an error.
UNREADABLE = (msgspec.MsgspecError, ValueError, TypeError, RecursionError)


def exception_of(error: Error) -> KernelError:
    """The exception again, on the other side. UNREADABLE: it has other facts."""
    kind = errors.BY_CODE.get(error.code, KernelError)
    facts = error.facts[: len(kind.fields)]
    if error.code in _TYPES and facts and "type" in kind.fields:
        index = kind.fields.index("type")
        facts[index] = MemoryType(facts[index]) if isinstance(facts[index], int) else facts[index]
    elif kind.fields[:2] == ("asked", "allowed"):
        facts[:2] = [MappingAccessRights(fact) if isinstance(fact, int) else fact for fact in facts[:2]]
    return kind(*facts, why=error.why)
