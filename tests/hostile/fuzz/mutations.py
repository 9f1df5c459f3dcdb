"""Mutated messages: what real clients say, changed in structure, in bytes, or in how it is cut into datagrams.

    real request ─▶ tree of MessagePack ─▶ changed tree ─▶ bytes ─▶ changed bytes ─▶ datagrams ─▶ changed datagrams

What comes out depends on the seed alone: not on what the kernel answers, and not on who says it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
from msgspec.msgpack import Ext

from realmap._core import look_over
from realmap.memory.lands import KERNEL_LAND, USER_LAND
from realmap.pages import PAGE_SIZE
from realmap.rights import MemoryType
from realmap.wire import channel, messages
from realmap.wire.messages import (
    Ask,
    Call,
    Close,
    Hello,
    Lend,
    Map,
    More,
    Move,
    Open,
    Publish,
    Query,
    Serve,
    Unmap,
    buffer_ext,
)
from realmap.wire.news import Gone, Served, Worked

#: What a hostile client maps for itself before it says anything else, in bytes; at the start of its UserLand.
OWN = 16 * PAGE_SIZE
#: In place of the pid and the start time of who sends it (see `signed`).
PID, START = 0x7EAD_BEEF, 0x7EAD_BEEF_7EAD_BEEF

_INTEGERS = [
    *(0, 1, -1, 2, 31, 32, 127, 128, 255, 256, -128, -129),
    *(PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, OWN, OWN + 1, 2 << 20),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, -(2**31), -(2**63)),
]
_ADDRESSES = [
    *(0, 1, PAGE_SIZE, USER_LAND.start - 1, USER_LAND.start, USER_LAND.start + 1, USER_LAND.start + OWN - 1),
    *(USER_LAND.start + OWN, USER_LAND.start + (1 << 40), USER_LAND.end - 1, USER_LAND.end),
    *(KERNEL_LAND.start, KERNEL_LAND.start + PAGE_SIZE, KERNEL_LAND.end - 1, KERNEL_LAND.end),
    *(0x5555_5555_4000, 0x7FFF_FFFF_E000, 2**47, 2**63, 2**64 - PAGE_SIZE, 2**64 - 1),
]
_LENGTHS = [
    *(0, 1, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, OWN - 1, OWN, OWN + 1, 2**31, 2**32, 2**47, 2**63),
    *(2**64 - 1, 2**64 - PAGE_SIZE, 2**64 - USER_LAND.start, 2**64 - USER_LAND.start - 1),
]
_TEXTS = ["", "x", "nop", "sha256", "__class__", "\0", "fuzz/../x", "..", "\u2028", "\U0010ffff", "y" * 255, "z" * 5000]
#: First bytes of things that are longer than what follows, and maps whose keys are a list, a map, and not a number.
_LIES = [
    *(b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\x7f\xff\xff\xff", b"\xc9\xff"),
    *(b"\x81\x90\x01", b"\x81\x80\x01", b"\x81\x91\x80\x01", b"\x81\xcb\x7f\xf8\0\0\0\0\0\0\x01"),
]


class Shot(NamedTuple):
    """One message, or what is sent in place of one."""

    kind: str
    datagrams: list[bytes]
    #: So many descriptors ride on it that nobody asked for.
    descriptors: int = 0
    #: Sent instead of Hello, on a connection of its own.
    fresh: bool = False


def name_of(seed: object) -> str:
    """How the names begin that the hostile clients of a seed ask for."""
    return f"fuzz-{str(seed).split('/')[0]}-"


def signed(data: bytes, pid: int, start: int) -> bytes:
    """`data` with the pid and the start time of its sender, where it has a place for them."""
    mine = b"\xce" + pid.to_bytes(4, "big")
    since = b"\xcf" + start.to_bytes(8, "big")
    return data.replace(b"\xcf" + START.to_bytes(8, "big"), since).replace(b"\xce" + PID.to_bytes(4, "big"), mine)


def hello() -> bytes:
    """How a client introduces itself, to be `signed`."""
    return msgspec.msgpack.encode(Hello(messages.PROTOCOL, "fuzz", PID, START))


def own_memory() -> bytes:
    """The request for the memory that the others refer to."""
    kind, read_and_write = int(MemoryType.HEAP), 11
    return msgspec.msgpack.encode(Map(1, OWN, kind, read_and_write, None, None, True))


_decoder = msgspec.msgpack.Decoder(messages.Request)


def is_request(message: bytes) -> bool:
    """Whether the kernel, by its own rules, goes on listening to who sent this."""
    if isinstance(look_over(message), int):
        return False
    try:
        _decoder.decode(message)
    except (msgspec.MsgspecError, ValueError, RecursionError, TypeError):
        return False
    return True


class Mutator:
    """Makes shots out of a seed."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)
        #: Names that it asks for: those of other runs are others.
        self._names = [f"{name_of(seed)}{number}" for number in range(4)]
        self._encoder = msgspec.msgpack.Encoder()

    # ---- values -----------------------------------------------------------------------------

    def _usually(self, usual: Any, odd: list[Any], share: float = 0.25) -> Any:
        return self.random.choice(odd) if self.random.random() < share else usual

    def _address(self) -> int:
        inside = USER_LAND.start + self.random.randrange(OWN)
        return int(self._usually(self._usually(USER_LAND.start, [inside]), _ADDRESSES))

    def buffer(self) -> Ext:
        """One of its own, or of somebody else's, or of nobody's."""
        length = self._usually(self.random.randrange(1, OWN // 2), _LENGTHS)
        return buffer_ext(self._address(), length)

    def value(self, depth: int = 0) -> Any:
        """Anything that MessagePack can say."""
        kind = self.random.randrange(12)
        if kind < 4:
            return self.random.choice(_INTEGERS)
        if kind == 4:
            return self.random.choice(_TEXTS)
        if kind == 5:
            return self.random.randbytes(self.random.choice((0, 1, 16, 300)))
        if kind == 6:
            return self.buffer()
        if kind == 7:  # no buffer: another code, another length, or a time (-1)
            return Ext(
                self.random.choice((-128, -1, 0, 1, 2, 127)),
                self.random.randbytes(self.random.choice((0, 4, 12, 15, 16, 17))),
            )
        if kind == 8 and depth < 3:
            return [self.value(depth + 1) for _ in range(self.random.randrange(4))]
        if kind == 9 and depth < 3:
            return {self.random.choice(_TEXTS): self.value(depth + 1) for _ in range(self.random.randrange(3))}
        if kind == 10:
            return self.random.choice((0.0, -1.5, 1e308, float("inf"), float("nan")))
        return self.random.choice((None, True, False))

    # ---- real requests ----------------------------------------------------------------------

    def request(self) -> messages.Request:
        """A request as real clients make them, of values that they may have."""
        pick = self.random.random()
        number = self.random.randrange(0, 1000)
        address = self._address()
        if pick < 0.4:
            return self._call(number)
        if pick < 0.5:
            return self._of_services(number, address)
        if pick < 0.62:
            memory = Map(
                number,
                self._usually(self.random.randrange(1, 4 * PAGE_SIZE), [*_LENGTHS, *_INTEGERS, 1 << 20], 0.3),
                self._usually(int(MemoryType.HEAP), list(range(20)), 0.2),
                self._usually(11, list(range(16)), 0.2),
                self._usually(None, [PAGE_SIZE, *_INTEGERS], 0.2),
                self._usually(None, [*self._names, *self._names, *_TEXTS], 0.1),
                self.random.random() < 0.8,
                self.random.random() < 0.02,
            )
            name, keep = self.random.choice([*self._names, *_TEXTS]), self._usually(0.0, [-1.0, float("nan")], 0.3)
            return memory if self.random.random() < 0.8 else Publish(number, memory, name, keep)
        if pick < 0.7:
            return More(number, address, self._usually(0, _INTEGERS))
        if pick < 0.77:
            end = min(address + OWN, 2**64 - 1)
            return Move(number, address, self._usually(address, _ADDRESSES), self._usually(end, _ADDRESSES))
        if pick < 0.85:
            return Unmap(number, address, self._usually(PAGE_SIZE, [OWN, *_LENGTHS]))
        if pick < 0.96:
            return Query(number, address)
        return Ask(number, self._usually("stats", ["books", "", "stop", *_TEXTS]))

    def _of_services(self, number: int, address: int) -> messages.Request:
        names = [*self._names, *self._names, *_TEXTS]
        session = self._usually(self.random.randrange(1, 200), _INTEGERS)
        pick = self.random.random()
        if pick < 0.2:
            count = self._usually(self.random.randrange(1, 3), [0, 5, 2000], 0.1)
            threads, queue = (self._usually(usual, _INTEGERS, 0.2) for usual in (2, 16))
            return Serve(number, [self.random.choice(names) for _ in range(count)], threads, queue)
        if pick < 0.6:
            return Open(number, self.random.choice(names), self._usually([], [[1, 2, 3], [-1], [0] * 500]))
        return Close(number, session) if pick < 0.7 else Lend(number, session, address)

    def told(self) -> bytes:
        """What a server tells the kernel of itself, or nearly so."""
        session = self.random.randrange(1, 200)
        names = {self.random.choice(self._names): (3, 1, [10**9, 20, 2]) for _ in range(self.random.randrange(3))}
        running = [(session, 5, "name", self._usually(7.0, [None, float("nan"), -1.0]))]
        worked = [(session, 5, "name", 1, 2, 3, self._usually(0, _INTEGERS))]
        lent = [(1, self._address(), PAGE_SIZE, self._address(), 3)]
        made = [Served(names, running, lent), Worked(worked), Gone(session)]
        data = self._encoder.encode(self.random.choice(made))
        pick = self.random.random()
        if pick < 0.4:
            return self._encoder.encode(self.change_tree(self._tree(data)))
        return self.change_bytes(data) if pick < 0.5 else data

    @staticmethod
    def _tree(data: bytes) -> Any:
        """What it is made of. Times (extension -1) that are none stay as they came."""
        try:
            return msgspec.msgpack.decode(data)
        except msgspec.ValidationError:
            return [1, 1, "echo", [data]]

    def _call(self, number: int) -> Call:
        name = self.random.choice(("nop", "echo", "sha256", "copy_in", "copy_out", "mirror", "doze"))
        args: list[Any] = []
        if name == "echo":
            args = [self.value() for _ in range(self.random.randrange(5))]
        elif name == "copy_out":
            args = [self.buffer(), b"content"]
        elif name == "doze":
            args = [self.buffer() for _ in range(self.random.randrange(3))]
        elif name != "nop":
            args = [self.buffer()]
        if name != "echo" and self.random.random() < 0.2:
            args.append(self.value())
        timeout = self._usually(None, [0.0, 0.5, -1.0, 1e308, float("nan")], 0.1)
        return Call(number, name, msgspec.Raw(self._encoder.encode(args)), timeout)

    # ---- changes ----------------------------------------------------------------------------

    def change_tree(self, tree: Any) -> Any:
        """Replaces, deletes, doubles, swaps or nests a field somewhere in it, in place."""
        places = [tree] if isinstance(tree, list) else []
        for found in places:  # grows as it goes
            places.extend(inner for inner in found if isinstance(inner, list))
        place = self.random.choice(places) if places else [tree]
        if not place:
            place.append(self.value())
            return tree
        at, how = self.random.randrange(len(place)), self.random.randrange(8)
        if how < 3:
            place[at] = self.value()
        elif how == 3:
            del place[at]
        elif how == 4:
            place.insert(at, place[self.random.randrange(len(place))])
        elif how == 5:
            other = self.random.randrange(len(place))
            place[at], place[other] = place[other], place[at]
        elif how == 6:
            place[at] = [place[at]]
        else:
            place.append(self.value())
        return tree

    def change_bytes(self, data: bytes) -> bytes:
        """Flips bits, cuts, splices, inserts, or lies about a length."""
        at, how = self.random.randrange(len(data) + 1), self.random.randrange(7)
        if how < 3:
            changed = bytearray(data or b"\0")
            for _ in range(self.random.randrange(1, 4)):
                changed[self.random.randrange(len(changed))] ^= 1 << self.random.randrange(8)
            return bytes(changed)
        if how == 3:
            return data[:at]
        if how == 4:
            other = self._encoder.encode(self.request())
            return data[:at] + other[self.random.randrange(len(other)) :]
        if how == 5:
            return data[:at] + self.random.randbytes(self.random.randrange(1, 9)) + data[at:]
        return data[:at] + self.random.choice([*_LIES, b"\x91" * self.random.choice((5, 500, 50_000))]) + data[at:]

    def message(self, fatal: float = 0.1) -> bytes:
        """A message: a real one, or one whose tree or bytes were changed.

        What is no request any more ends its connection, and the next one costs as much as twenty requests: such
        a message is kept with probability `fatal`, else another one is made.
        """
        while True:
            data = self._message()
            if is_request(data) or self.random.random() < fatal:
                return data

    def _message(self) -> bytes:
        data = self._encoder.encode(self.request())
        pick = self.random.random()
        if pick < 0.75:
            tree = self._tree(data)
            # Most changes of what a request is made of make it none: so mostly its arguments.
            inside = tree[3] if tree[0] == 1 and self.random.random() < 0.7 else tree
            for _ in range(self.random.choice((1, 1, 2, 4))):
                self.change_tree(inside)
            data = self._encoder.encode(tree)
        elif pick < 0.85:
            data = self.change_bytes(data)
        return data

    # ---- shots ------------------------------------------------------------------------------

    def shot(self) -> Shot:
        """The next one."""
        pick = self.random.random()
        riders = self.random.choice((1, 2, 64, 253)) if self.random.random() < 0.02 else 0
        if pick < 0.015:
            return Shot("instead of hello", self._instead_of_hello(), riders, fresh=True)
        if pick < 0.02:
            return Shot("told", [self.told()[: channel.CHUNK]])
        if pick < 0.03:
            size = self.random.choice((1, 4, 30, 2000, 60_000))
            return Shot("random", [b"\0" + self.random.randbytes(self.random.randrange(1, size + 1))], riders)
        if pick < 0.07:
            return Shot("parts", self.parts(), riders)
        if pick < 0.075:
            return Shot("deep", [b"\0" + self._deep()], riders)
        return Shot("message", channel.datagrams(self.message()[: messages.MAX_MESSAGE]), riders)

    def _instead_of_hello(self) -> list[bytes]:
        how = self.random.randrange(5)
        if how == 0:
            return [self.random.randbytes(self.random.randrange(0, 200))]
        if how == 1:
            return self.parts()
        if how == 2:
            return [b"\0" + self.change_bytes(hello())]
        if how == 3:
            return [b"\0" + self.message()[: channel.CHUNK]]
        tree = msgspec.msgpack.decode(hello())
        field = self.random.choice(list(tree))
        if self.random.random() < 0.3:
            del tree[field]
        else:
            tree[field] = self.value()
        return [b"\0" + self._encoder.encode(tree)]

    def _deep(self) -> bytes:
        """A call whose argument is lists or maps within one another, up to far beyond what can be read."""
        inside = self.random.choice((b"\x91", b"\x81\xa1x"))
        return b"\x94\x01\x05\xa4echo\x91" + inside * self.random.choice((5, 200, 700, 5000, 20_000)) + b"\xc0"

    def parts(self) -> list[bytes]:
        """A message in parts that are right, never end, are out of turn, or are none."""
        cut = self._cut(self.message()[:4000].ljust(2, b"\0"))  # two parts at least
        ways: list[Callable[[], list[bytes]]] = [
            lambda: cut,
            lambda: cut,
            lambda: [*cut[:-1], b"\0" + self.message()[: channel.CHUNK], channel.BELL, cut[-1]],
            lambda: cut[:-1],
            lambda: cut[:-1] * self.random.randrange(1, 5),
            lambda: [*cut[:1], *[bytes([channel.MIDDLE]) + bytes(channel.CHUNK)] * self.random.randrange(1, 8)],
            lambda: cut[1:],
            lambda: [bytes([self.random.randrange(4, 256)]) + cut[0]],
            lambda: [self.random.choice((b"", b"\0", b"\1", b"\2", b"\3", b"\4", b"\4\4"))],
            lambda: [b"\0" + bytes(channel.CHUNK + self.random.randrange(3))],
        ]
        if self.random.random() < 0.002:
            return [
                b"\1x",
                *[bytes([channel.MIDDLE]) + bytes(channel.CHUNK)] * (messages.MAX_MESSAGE // channel.CHUNK + 1),
            ]
        return self.random.choice(ways)()

    def _cut(self, data: bytes) -> list[bytes]:
        count = self.random.choice((2, 3, 9))
        step = max(1, -(-len(data) // count))
        chunks = [data[at : at + step] for at in range(0, len(data), step)]
        flags = [channel.FIRST, *[channel.MIDDLE] * (len(chunks) - 2), channel.LAST]
        return [bytes([flag]) + chunk for flag, chunk in zip(flags, chunks, strict=True)]
