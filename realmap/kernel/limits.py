"""What a kernel lets one process, and all of them together, have at a time."""

from __future__ import annotations

import os
import resource
from typing import SupportsIndex

from realmap.pages import usize


class Limits:
    """How much of the kernel each process may take; what goes beyond is an error to the one who asked.

    `processes`: connected at a time, `handles`: in all (LimitReached). For each process: `mappings`
    (VirtualMemoryExhaustion), `segments` (one descriptor of the kernel each; by default half of what it may
    open; PhysicalMemoryExhaustion), `calls` that have not ended (LimitReached), of which `running` run on
    worker threads at a time (by default twice as many as there are CPUs, 4 at least; the others wait their
    turn). `seconds`: how long a handler may take, before its caller gets a SyscallTimeout in its place (None: for
    ever; the handler itself goes on). `given_up`: handlers at work that nobody waits for any more, or that have lost
    the loop; of each pid, and of the ended processes of a uid together (LimitReached). Bytes of frames are
    `memory_limit` and `process_limit` of `boot`; bytes of a message are bounded at 16 MiB.

    InvalidSize: a negative number. ValueError: none at all, or no time. TypeError: no integer.
    """

    __slots__ = ("calls", "given_up", "handles", "mappings", "processes", "running", "seconds", "segments")

    def __init__(
        self,
        *,
        processes: SupportsIndex = 4096,
        mappings: SupportsIndex = 65_536,
        segments: SupportsIndex | None = None,
        calls: SupportsIndex = 1024,
        handles: SupportsIndex = 65_536,
        running: SupportsIndex | None = None,
        seconds: float | None = None,
        given_up: SupportsIndex = 64,
    ) -> None:
        self.processes = _some(processes, "processes")
        self.mappings = _some(mappings, "mappings")
        self.segments = None if segments is None else _some(segments, "segments")
        self.calls = _some(calls, "calls")
        self.handles = _some(handles, "handles")
        self.running = max(4, 2 * (os.cpu_count() or 1)) if running is None else _some(running, "running")
        self.given_up = _some(given_up, "given_up")
        if seconds is not None and not seconds > 0:
            raise ValueError(f"seconds must be above 0, or None for no limit: {seconds!r}")
        self.seconds = seconds

    @property
    def segments_or_default(self) -> int:
        """`segments`; by default half of how many descriptors this process may open."""
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2 if self.segments is None else self.segments

    def __repr__(self) -> str:
        return f"Limits({', '.join(f'{name}={getattr(self, name)!r}' for name in self.__slots__)})"


def _some(number: SupportsIndex, what: str) -> int:
    found = usize(number, what)
    if not found:
        raise ValueError(f"a limit of no {what} lets nobody in; leave it out for the default")
    return found
