"""What the kernel and a server tell each other by the socket of a seat: one datagram each, and nobody answers.

kernel ── Opened, Granted, Revoked, Gone, Refused ──▶ server     News
kernel ◀── Served, Worked, Gone ───────────────────── server     Told
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec


class Opened(msgspec.Struct, array_like=True, frozen=True, tag=1):
    """A caller has opened a session. Descriptors: the server's end of its socket, and of its ring."""

    session: int
    number: int
    pid: int
    uid: int


class Granted(msgspec.Struct, array_like=True, frozen=True, tag=2):
    """The frames of a caller's mapping, from piece `first` of `count` on. Descriptors: one a piece; read-only ones
    where the caller may not write.
    """

    session: int
    serial: int
    address: int
    length: int
    kind: int
    rights: int
    #: Which part of its segment each is: [offset, length], in bytes.
    pieces: list[tuple[int, int]]
    first: int
    count: int


class Revoked(msgspec.Struct, array_like=True, frozen=True, tag=3):
    """The caller has unmapped that mapping."""

    session: int
    serial: int


class Gone(msgspec.Struct, array_like=True, frozen=True, tag=4):
    """The caller of a session has ended it, or has died. From a server: it could not take it in."""

    session: int


class Refused(msgspec.Struct, array_like=True, frozen=True, tag=7):
    """A call of that session and number waits for a thread that waits for it, through other services (`why`: which)."""

    session: int
    id: int
    why: str


#: What a server hears.
News = Opened | Granted | Revoked | Gone | Refused


#: As they fit into a record.
Word: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]


class Served(msgspec.Struct, array_like=True, frozen=True, tag=5):
    """What a server tells the kernel of itself by that socket, where that has changed, a few times a second at most."""

    #: By name, since the seat began: calls, how many of them failed, and `Durations.counts`.
    names: dict[str, tuple[Count, Count, list[int]]]
    #: Calls at work or waiting: [session, id, name, since when (seconds, monotonic) or None while it waits].
    running: list[tuple[int, int, str, float | None]]
    #: Windows of lent pages: [the caller's number (0: its call has ended), its address, length, where that is mapped in
    #: the server, rights].
    lent: list[tuple[int, int, int, int, int]]
    #: Whole pages that are kept mapped for their next use (`lazy_unmap`): where, and how many bytes.
    kept: list[tuple[int, int]] = []
    #: What calls at work wait for: [session, id, whether it takes a thread, and of the call that is to be answered:
    #: session, id, since when (monotonic, ns)].
    waits: list[tuple[int, int, bool, int, int, Count]] = []


class Worked(msgspec.Struct, array_like=True, frozen=True, tag=6):
    """Calls that have ended, told while somebody traces (`seat.TRACED`)."""

    #: [the caller's number, id, name, when it came, when its handler began, when it ended (monotonic, ns), its error's
    #: code or 0].
    calls: list[tuple[Word, int, str, Count, Count, Count, Word]]


#: What the kernel hears of a server.
Told = Served | Worked | Gone
