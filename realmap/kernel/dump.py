"""The books as plain data: a few totals (`stats`), and everything (`dump`).

Nobody is served meanwhile, so what can be done elsewhere is left to the reader (observe/snapshot.py): what there may
be thousands of is told in rows, the fields of the structures of wire/records.py in their order.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

import msgspec
import psutil

from realmap.kernel.books import Books
from realmap.kernel.handles import FOR_EVER, Shared
from realmap.kernel.syscalls import Running, encode
from realmap.memory.cross_process import CrossProcessMapping
from realmap.memory.frames import SharedFrames
from realmap.memory.kept import KeptCounts
from realmap.memory.mapping import Mapping
from realmap.wire.records import FORM

Row = tuple[Any, ...]


class Around(NamedTuple):
    """What is told along with the books, and is not in them."""

    path: str
    #: Whether the process is the kernel's: it serves on the main thread.
    alone: bool
    #: Connections that ask and look, without being a process: a descriptor each.
    controls: int
    threads: int
    #: Calls of blocking handlers that have not ended.
    running: Collection[Running]
    #: (device, inode) of what waits in a socket, on its way to a process.
    outbox: list[tuple[int, int]]


def stats(books: Books, around: Around) -> dict[str, int]:
    """Totals. What there is: processes, mappings, live mirrors, segments and their bytes, descriptors, threads.

    What was done so far: calls (and how many of them failed), mirrors made and copies, each with bytes.
    """
    memory, syscalls = books.memory, books.syscalls.values()
    peers = books.peers.totals()
    kept = memory.kept.counts() if memory.kept is not None else KeptCounts(0, 0, 0, 0, 0)
    return {
        "processes": len(books.processes),
        "handles": len(books.handles),
        "estates": len(books.inheritance),
        "mappings": sum(len(process.memory) for process in books.processes),
        "mirrors": memory.live,
        "kept_windows": kept.windows,
        "kept_bytes": kept.bytes,
        "kept_hits": kept.hits,
        "kept_misses": kept.misses,
        "kept_evictions": kept.evictions,
        "segments": books.frames.segments,
        "bytes": books.frames.used,
        "calls": sum(syscall.calls for syscall in syscalls),
        "failed": sum(syscall.failed for syscall in syscalls),
        "running": sum(process.calls for process in books.processes),
        "taking": sum(process.coming > 0 for process in books.processes),
        "mirrored": memory._made,
        "mirrored_bytes": memory._made_bytes,
        "copied_in": memory.copies_in,
        "copied_in_bytes": memory.bytes_in,
        "copied_out": memory.copies_out,
        "copied_out_bytes": memory.bytes_out,
        "controls": around.controls,
        "descriptors": _descriptors(),
        "threads": around.threads,
        **{name: peers[name] for name in ("connections", "half_sent", "unread", "undecoded", "orphans")},
    }


def limits(books: Books) -> dict[str, float | None]:
    """What is allowed, as `Limits` and `boot` name it; bytes and numbers, None for no limit."""
    found = books.limits
    return {
        **{name: getattr(found, name) for name in found.__slots__},
        "segments": found.segments_or_default,
        "memory_limit": books.frames.limit,
        "process_limit": books.process_limit,
        "kernel_land": books.memory.length,
        "lazy_unmap": books.memory._budget,
    }


def _descriptors() -> int:
    """How many descriptors this process has open; -1 where not even one is left to look."""
    try:
        # Since Linux 6.2 that is its size; before, it is 0, and they are counted.
        return os.stat("/proc/self/fd").st_size or int(psutil.Process().num_fds())
    except OSError:
        return -1


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """So many new objects would have the collector look through everything, several times, while nobody is served."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def dump(books: Books, around: Around) -> msgspec.Raw:
    """Every process, mapping, segment (with its holders) and mirror, at one moment, as it is sent.

    Addresses and lengths in bytes.
    """
    with _without_collections():
        return msgspec.Raw(encode(_dump(books, around)))


def _dump(books: Books, around: Around) -> dict[str, Any]:
    frames: dict[int, SharedFrames] = {}

    def entry(mapping: Mapping) -> Row:
        found = mapping.frames
        serial = None
        if type(found) is SharedFrames:
            serial = found.serial
            frames[serial] = found
        return mapping.address, mapping.length, mapping.type, mapping.rights, mapping.phys_offset, serial

    processes = [
        (
            process.number,
            process.pid,
            process.uid,
            process.calls,
            process.memory.allocator.used,
            process.memory.allocator.limit,
            list(map(entry, process.memory)),
        )
        for process in books.processes
    ]
    # Unmapped by its process while a call works on it: in no process's memory any more, but it holds on.
    pinned = {
        mapping: entry(mapping)[-1]
        for running in around.running
        for buffer in running.buffers
        for mapping, _, _ in buffer.parts()
        if mapping.released and isinstance(mapping.frames, SharedFrames)
    }
    inherited = [serial for mapping in books.inheritance.mappings() if (serial := entry(mapping)[-1]) is not None]
    mirrors = [
        _mirror_row(mirror, frames) for mirror in books.memory.mirrors() if isinstance(mirror, CrossProcessMapping)
    ]
    handles = [_handle_row(shared) for shared in _entered(books.handles, frames)]
    return {
        "form": FORM,
        "pid": os.getpid(),
        "path": around.path,
        "alone": around.alone,
        "time": time.time(),
        "kernel_land": [books.memory.start, books.memory.length],
        "stakes": books.memory.stakes,
        "limits": limits(books),
        "stats": stats(books, around),
        "calls": [(each.name, each.blocking, each.calls, each.failed) for each in books.syscalls.values()],
        "running": [
            (each.process.number, each.name, None if each.began is None else time.monotonic() - each.began)
            for each in around.running
        ],
        "processes": processes,
        "pinned": [*pinned.values(), *inherited],
        "outbox": around.outbox,
        "handles": handles,
        "mirrors": mirrors,
        "kept": [
            (window.base, window.span, window.prot, (window.serial, window.start, window.span))
            for window in (books.memory.kept.windows() if books.memory.kept else [])
            if window.serial in frames
        ],
        "frames": list(map(_frames_row, frames.values())),
    }


def _frames_row(frames: SharedFrames) -> Row:
    holders = frames.who_holds()
    return frames.serial, frames.length, len(holders), holders, [segment.facts for segment in frames.segments]


def _handle_row(shared: Shared) -> Row:
    maker = shared.maker.number if shared.maker is not None else None
    seconds = None if shared.until is None else shared.until - time.monotonic()
    keep = min(shared.keep, FOR_EVER)
    rights = int(shared.rights)
    what = shared.label, shared.frames.serial, shared.start, shared.length, rights
    return *what, maker, keep, shared.uses, seconds, shared.uid


def _entered(handles: Iterable[Shared], frames: dict[int, SharedFrames]) -> Iterator[Shared]:
    """The handles; their frames are added to `frames`."""
    for shared in handles:
        frames[shared.frames.serial] = shared.frames
        yield shared


def _mirror_row(mirror: CrossProcessMapping, frames: dict[int, SharedFrames]) -> Row:
    """A mirror with the parts of frames that its pages show, in order; the frames are added to `frames`."""
    # A kept window may be larger than what was asked for: what counts is what its pages show.
    left, offset, parts = mirror._span, mirror.offset - (mirror.address - mirror._base), []
    for mapping in mirror.mappings:
        assert isinstance(mapping.frames, SharedFrames)
        frames[mapping.frames.serial] = mapping.frames
        size = left if len(mirror.mappings) == 1 else min(left, mapping.length - offset)
        parts.append((mapping.frames.serial, mapping.phys_offset + offset, size))
        left, offset = left - size, 0
    return mirror.address, len(mirror), mirror._base, mirror._span, mirror._zeros, int(mirror.rights), parts
