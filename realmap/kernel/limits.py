"""What a kernel lets one process, and all of them together, have at a time."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass, field

from realmap.errors import LimitReached
from realmap.pages import usize


@dataclass(kw_only=True, slots=True)
class Limits:
    """How much of the kernel each process may take; what goes beyond is an error to the one who asked.

    `processes`: connected at a time (LimitReached). For each connection: `mappings` (VirtualMemoryExhaustion),
    `segments` (one descriptor of the kernel each; by default half of what it may open; PhysicalMemoryExhaustion).
    `stock`: bytes of small mappings that it has unmapped and that are kept for its next ones (0: none); they are given
    up, before anybody is refused anything.
    For each call: `buffers`, and mappings that they lie in (LimitReached).

    For each pid, over all its connections: `connections`, `handles`, `seats` (what it serves), `sessions` with services
    and `grants` (buffers that it has lent to each of those), `calls` of blocking handlers that have not ended,
    and bytes of these (`undecoded`); beyond, LimitReached. `running` of these calls run on worker threads at a time
    (by default twice as many as there are CPUs, 4 at least); the others wait their turn. Bytes of messages whose last
    part has not come (`half_sent`), and of answers that it has not read (`unread`): beyond, that connection is ended,
    and told why.

    For each uid: `orphans`, handles that outlive their makers, and `inheritances`, ended processes whose forked
    children may still come for what they had: what would go beyond ends with its process.

    `reserve`: descriptors of the kernel's that neither processes nor segments get, so that commands always work
    (LimitReached, PhysicalMemoryExhaustion).

    `seconds`: how long a handler may take, before its caller gets a SyscallTimeout in its place (None: for ever; the
    handler itself goes on). `given_up`: handlers at work that nobody waits for any more, or that have lost the loop; of
    each pid, and of the ended processes of a uid together (LimitReached). Bytes of frames are `memory_limit` and
    `process_limit` of `boot`; bytes of a message are bounded at 1 MiB.

    InvalidSize: a negative number. ValueError: none at all, or no time. TypeError: no integer.
    """

    processes: int = 4096
    mappings: int = 65_536
    segments: int | None = None
    calls: int = 1024
    handles: int = 4096
    running: int = field(default_factory=lambda: max(4, 2 * (os.cpu_count() or 1)))
    seconds: float | None = None
    given_up: int = 64
    connections: int = 256
    half_sent: int = 8 << 20
    unread: int = 32 << 20
    undecoded: int = 16 << 20
    buffers: int = 1024
    orphans: int = 4096
    inheritances: int = 256
    reserve: int = 32
    stock: int = 2 << 20
    seats: int = 64
    sessions: int = 256
    grants: int = 4096

    def __post_init__(self) -> None:
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"seconds must be above 0, or None for no limit: {self.seconds!r}")
        for name in self.__slots__:
            number = getattr(self, name)
            if name != "seconds" and (name != "segments" or number is not None):
                found = usize(number, name)
                if not found and name != "stock":
                    raise ValueError(f"a limit of no {name} lets nobody in; leave it out for the default")
                setattr(self, name, found)


def segments_of(limits: Limits) -> int:
    """Its `segments`; by default half of how many descriptors this process may open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2 if limits.segments is None else limits.segments


def first_reserved(limits: Limits) -> int:
    """The lowest descriptor of the reserve, which is an eighth at most of what this process may open."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return most - min(limits.reserve, most // 8)


def require_unreserved(limits: Limits, *descriptors: int) -> None:
    """LimitReached: one of them, just opened, is of the reserve."""
    first = first_reserved(limits)
    if max(descriptors) >= first:
        why = f"the kernel has {first} descriptors in use, and keeps the others for commands (reserve)"
        raise LimitReached("descriptors", first, why=f"{why}: unmap or close some, or raise ulimit -n")
