"""What a kernel tells of while somebody listens: a record of 64 bytes for each thing that happens.

    time (monotonic, ns) | kind | flags | process (its number) | six facts, named below

They wait in a ring of bounded size (`_core.Events`) until the listener takes them; what does not fit is counted,
and a GAP stands in its place. The records of mirrors are the C core's (`enum kind`), the others `tracer`'s.
Addresses and lengths in bytes; a thread is Python's number of it (`threading.get_ident`).
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

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
    #: A blocking handler begins on a worker: name, id, 0, 0, 0, thread.
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
    """One record."""

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
