"""What a kernel tells of itself, in rows: the events while somebody listens, and its books at one moment.

An event is a record of 64 bytes for a thing that happens:

    time (monotonic, ns) | kind | flags | process (its number) | six facts, named below

They wait in a ring of bounded size (`_core.Events`) until the listener takes them; what does not fit is counted,
and a GAP stands in its place. The records of mirrors are the C core's (`enum kind`), the others those of the kernel's
tracer. A thread is Python's number of it (`threading.get_ident`).

Of the books, what there may be thousands of travels as the fields of its structure below in their order, with numbers
for words. Addresses and lengths in bytes.
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

import msgspec

from realmap.wire.messages import NAMED

RECORD = struct.Struct("=qHHI6Q")
#: How many records may wait, by default; and the bounds of what can be asked for.
CAPACITY = 1_000_000
LEAST, MOST = 16, 1 << 24


class Kind(enum.IntEnum):
    """What happened, with its facts."""

    #: So many records are missing here: count.
    GAP = 0
    #: A mirror is there: address, length, address in its process (0: unknown), serial of its frames (0: several),
    #: offset in them, thread. Its process field: how many mirrors live now.
    MIRROR = 1
    #: It is gone: the same, but for the address in its process.
    DROP = 2
    #: A kept window was unmapped: base, span, 0, serial, offset, thread.
    EVICT = 3
    #: A request has arrived: name, id, how many buffers, address and length of the first, request or thread.
    CALL = 4
    #: It was answered: name (0), id, error code (0: none), bytes of the answer.
    ANSWER = 5
    #: The kernel's thread is done with a service (it may be answered later): name, id.
    DONE = 6
    #: A blocking handler begins on a worker, or another one has lost the loop: name, id, the thread that has the loop
    #: from now on (0: the same), 0, 0, thread.
    BEGIN = 7
    #: It has ended: name, id, error code, 0, 0, thread.
    END = 8
    #: A copy has ended: address in the process, length, when it began (monotonic, ns), 0, 0, thread.
    COPY = 9
    #: A mapping came: address, length, serial (0: private), phys_offset, type << 8 | rights, bytes mapped now.
    MAP = 10
    #: A mapping went: the same. The process's mappings are counted in the upper half of the fifth.
    UNMAP = 11
    #: A process was taken in: pid, uid.
    CONNECT = 12
    #: Its connection has ended: pid.
    DEATH = 13
    #: What it held was given back: pid, mappings, their bytes.
    REAP = 14
    #: A service has answered a call of this process: name, id, when it came, when its handler began, when it ended
    #: (monotonic, ns), the server's number << 32 | error code (0: none). Told a moment later.
    SERVED = 15


#: Flags of MIRROR, DROP (their lowest two bits are the rights): it took, or left, a kept window; bytes were gone.
WAS_KEPT, FAULTED = 4, 8
#: Of CALL: its handler runs on a worker; it is a service of the kernel itself.
BLOCKING, SERVICE = 1, 2
#: Of COPY: out to the process, not in; it failed.
OUT, FAILED = 1, 2
#: Of UNMAP: by the reaping of its process. Of DEATH: the process itself died; else it only left.
REAPED, DIED = 1, 1
#: Of any: it was so when the listener came.
ALREADY = 1 << 15


class Event(NamedTuple):
    """One record, as its fields are read."""

    time: int
    kind: int
    flags: int
    process: int
    a: int
    b: int
    c: int
    d: int
    e: int
    f: int


# ---- the books ----------------------------------------------------------------------------

#: Raised with every change of what follows.
FORM = 10


class SegmentInfo(msgspec.Struct, frozen=True):
    """One POSIX segment: `device` and `inode` are what /proc/PID/maps shows of it."""

    inode: int
    device: int
    length: int
    #: Bytes that huge pages back.
    huge: int
    name: str | None


class FramesInfo(msgspec.Struct, frozen=True):
    """Frames: their segments in order, the refcount, and every holder of a reference by name."""

    serial: int
    length: int
    refcount: int
    holders: list[str]
    segments: list[SegmentInfo]

    def pieces(self, offset: int, length: int) -> list[tuple[int, int, int]]:
        """Where [offset, offset + length) of the frames lies: (inode, offset in it, length) each."""
        found = []
        start = 0
        for segment in self.segments:
            low, high = max(offset, start), min(offset + length, start + segment.length)
            if low < high:
                found.append((segment.inode, low - start, high - low))
            start += segment.length
        return found


class MappingInfo(msgspec.Struct, frozen=True):
    """A mapping of a process; `frames` is the serial of its shared frames, None where it has none."""

    address: int
    length: int
    type: str
    rights: int
    phys_offset: int
    frames: int | None


class ParkedInfo(msgspec.Struct, frozen=True):
    """A window of a small mapping that its process has unmapped: still there, without rights, for its next use.

    `inode`, `offset`: what /proc/PID/maps shows of it. `frames`: their serial; None where they are not kept, and the
    process unmaps it as soon as it looks.
    """

    address: int
    length: int
    inode: int
    offset: int
    frames: int | None


class ProcessInfo(msgspec.Struct, frozen=True):
    """A user process, its calls that are running, its mappings in order of address, and what it has parked.

    `bytes`: of the frames that it made and that live, whoever holds them, without those of `stock`; `limit`: how many
    it may have, None for any number.
    """

    number: int
    pid: int
    uid: int
    calls: int
    bytes: int
    limit: int | None
    mappings: list[MappingInfo]
    stock: list[ParkedInfo]


class PartInfo(msgspec.Struct, frozen=True):
    """A range of frames."""

    frames: int
    offset: int
    length: int


class MirrorInfo(msgspec.Struct, frozen=True):
    """A live mirror.

    What it shows (`address`, `length`), the whole pages that are mapped (`base`, `span`), and of what. `zeros`: from
    there on zero pages are mapped, since a segment was truncated under it; 0 where there are none.
    """

    address: int
    length: int
    base: int
    span: int
    zeros: int
    rights: int
    parts: list[PartInfo]


class KeptInfo(msgspec.Struct, frozen=True):
    """A window that is kept mapped for its next use: whole pages at `base`, and the frames they show. No reference."""

    base: int
    span: int
    rights: int
    part: PartInfo


class HandleInfo(msgspec.Struct, frozen=True):
    """A handle: the beginning of its token (not all of it: that would let one attach), and what it stands for.

    `maker`: the number of the process whose end is its end, `keep` seconds later; None: it has ended. `uses`,
    `seconds`: how much is left. `uid`: its maker's.
    """

    name: str
    frames: int
    start: int
    length: int
    rights: int
    maker: int | None
    keep: float
    uses: int | None
    seconds: float | None
    uid: int

    @property
    def is_named(self) -> bool:
        """Whether it has a name: it ends when that is unlinked."""
        return self.name.startswith(NAMED)


class LimitsInfo(msgspec.Struct, frozen=True):
    """What the kernel allows, as `Limits` and `boot` name it: numbers, seconds and bytes; None is no limit."""

    processes: int
    mappings: int
    segments: int
    calls: int
    handles: int
    running: int
    seconds: float | None
    memory_limit: int | None
    process_limit: int | None
    kernel_land: int
    lazy_unmap: int
    connections: int = 0
    half_sent: int = 0
    unread: int = 0
    undecoded: int = 0
    buffers: int = 0
    given_up: int = 0
    orphans: int = 0
    inheritances: int = 0
    reserve: int = 0
    stock: int = 0
    seats: int = 0
    sessions: int = 0
    grants: int = 0


class CallInfo(msgspec.Struct, frozen=True):
    """A syscall: how often it was called so far, and how many of these calls ended in an error.

    `servers`: how many services of processes answer it by now; None: the kernel does. What servers say of themselves is
    a moment old; of the last 256 names whose servers have ended it is kept what those did.

    How long its handler took, in seconds: what half of the calls (`p50`) and 99 of 100 (`p99`) did not exceed, right to
    6 %, and the longest; None where it has not returned yet.
    """

    name: str
    blocking: bool
    count: int
    failed: int
    p50: float | None
    p99: float | None
    longest: float | None
    servers: int | None = None


class RunningInfo(msgspec.Struct, frozen=True):
    """A call of a process (its number) whose handler has a thread of its own, or waits for one.

    `seconds` since it began, None while it waits. `given_up`: nobody waits for it any more, or it lost the loop.
    `server`: the number of the process that answers it; None: the kernel does.
    """

    process: int
    syscall: str
    seconds: float | None
    given_up: bool = False
    server: int | None = None


class SeatInfo(msgspec.Struct, frozen=True):
    """A service of a process (its number): what it is called by, how many calls it takes at a time, and may wait.

    `closing`: it takes no new sessions. `busy`, `waiting`: calls at work, and that wait, as it said last.
    """

    number: int
    process: int
    names: list[str]
    threads: int
    queue: int
    closing: bool
    busy: int
    waiting: int


class SessionInfo(msgspec.Struct, frozen=True):
    """A process (its number) that calls a seat."""

    number: int
    seat: int
    process: int


class GrantInfo(msgspec.Struct, frozen=True):
    """The server of a session may map these frames: the caller's mapping at `address`."""

    session: int
    frames: int
    offset: int
    address: int
    length: int
    rights: int


class LentInfo(msgspec.Struct, frozen=True):
    """A window of lent pages, as the server of a seat said last: `length` bytes at `at` there.

    `process`, `address`: whose they are (its number), and where it has them; None and 0 where the call that had them
    has ended. `kept`: it is no call's, but kept for its next use (`lazy_unmap`).
    """

    seat: int
    process: int | None
    address: int
    length: int
    at: int
    rights: int
    kept: bool = False
