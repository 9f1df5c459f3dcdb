"""The kernel's books as plain data: a few totals (`stats`), and everything (`books`). Taken on the kernel's thread."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import psutil

from realmap.kernel.handles import FOR_EVER, Shared
from realmap.memory.cross_process import CrossProcessMapping
from realmap.memory.frames import SharedFrames
from realmap.memory.kept import KeptCounts
from realmap.memory.mapping import Mapping

if TYPE_CHECKING:
    from realmap.kernel.server import Kernel

#: Of the form of `books`; observe/snapshot.py reads it.
FORM = 3


def stats(kernel: Kernel) -> dict[str, int]:
    """Totals: processes, mappings, live mirrors, segments and their bytes, calls so far, descriptors, threads."""
    kept = kernel.memory.kept.counts() if kernel.memory.kept is not None else KeptCounts(0, 0, 0, 0, 0)
    return {
        "processes": len(kernel.processes),
        "handles": len(kernel.handles),
        "estates": len(kernel.estates),
        "mappings": sum(len(process.memory) for process in kernel.processes),
        "mirrors": kernel.memory.live,
        "kept_windows": kept.windows,
        "kept_bytes": kept.bytes,
        "kept_hits": kept.hits,
        "kept_misses": kept.misses,
        "kept_evictions": kept.evictions,
        "segments": kernel.frames.segments,
        "bytes": kernel.frames.used,
        "calls": kernel.calls,
        "running": sum(process.calls for process in kernel.processes),
        "taking": sum(process.frames_share.running for process in kernel.processes),
        "descriptors": _descriptors(),
        "threads": kernel.workers.threads,
    }


def _descriptors() -> int:
    """How many descriptors this process has open; -1 where not even one is left to look."""
    try:
        return int(psutil.Process().num_fds())
    except OSError:
        return -1


def books(kernel: Kernel) -> dict[str, Any]:
    """Every process, mapping, segment (with its holders) and mirror, at one moment. Addresses and lengths in bytes."""
    frames: dict[int, SharedFrames] = {}

    def entry(mapping: Mapping) -> dict[str, Any]:
        found = mapping.frames
        if isinstance(found, SharedFrames):
            frames[found.serial] = found
        return {
            "address": mapping.address,
            "length": mapping.length,
            "type": mapping.type.name,
            "rights": int(mapping.rights),
            "phys_offset": mapping.phys_offset,
            "frames": found.serial if isinstance(found, SharedFrames) else None,
        }

    processes = [
        {
            "number": process.number,
            "pid": process.pid,
            "uid": process.uid,
            "calls": process.calls,
            "mappings": [entry(mapping) for mapping in process.memory],
        }
        for process in kernel.processes
    ]
    # Unmapped by its process while a call works on it: in no process's memory any more, but it holds on.
    pinned = {
        mapping: entry(mapping)["frames"]
        for running in kernel.dispatch.running
        for buffer in running.buffers
        for mapping, _, _ in buffer.parts()
        if mapping.released and isinstance(mapping.frames, SharedFrames)
    }
    estates = [serial for mapping in kernel.estates.mappings() if (serial := entry(mapping)["frames"]) is not None]
    mirrors = [
        mirror_entry(mirror, frames) for mirror in kernel.memory.mirrors() if isinstance(mirror, CrossProcessMapping)
    ]
    return {
        "form": FORM,
        "pid": os.getpid(),
        "path": kernel.path,
        "alone": kernel.is_alone,
        "time": time.time(),
        "kernel_land": [kernel.memory.start, kernel.memory.length],
        "stakes": kernel.memory.stakes,
        "stats": stats(kernel),
        "processes": processes,
        "pinned": [*pinned.values(), *estates],
        "outbox": [inode for connection in kernel.clients.all() for inode in connection.waiting_inodes()],
        "handles": [
            {
                "name": shared.label,
                "frames": shared.frames.serial,
                "start": shared.start,
                "length": shared.length,
                "rights": int(shared.rights),
                "maker": shared.maker.number if shared.maker is not None else None,
                "keep": min(shared.keep, FOR_EVER),
                "uses": shared.uses,
                "seconds": None if shared.until is None else shared.until - time.monotonic(),
            }
            for shared in _entered(kernel.handles, frames)
        ],
        "mirrors": mirrors,
        "kept": [
            {
                "base": window.base,
                "span": window.span,
                "rights": window.prot,
                "part": {"frames": window.serial, "offset": window.start, "length": window.span},
            }
            for window in (kernel.memory.kept.windows() if kernel.memory.kept else [])
            if window.serial in frames
        ],
        "frames": [
            {
                "serial": found.serial,
                "length": found.length,
                "refcount": found.refcount,
                "holders": found.holders(),
                "segments": [
                    {
                        "inode": part.inode,
                        "device": part.device,
                        "length": part.length,
                        "huge": part.huge,
                        "name": part.name,
                    }
                    for part in list(found.segments)
                ],
            }
            for found in frames.values()
        ],
    }


def _entered(handles: Iterable[Shared], frames: dict[int, SharedFrames]) -> Iterator[Shared]:
    """The handles; their frames are added to `frames`."""
    for shared in handles:
        frames[shared.frames.serial] = shared.frames
        yield shared


def mirror_entry(mirror: CrossProcessMapping, frames: dict[int, SharedFrames]) -> dict[str, Any]:
    """A mirror with the parts of frames that its pages show, in order; the frames are added to `frames`."""
    # A kept window may be larger than what was asked for: what counts is what its pages show.
    left, offset, parts = mirror._span, mirror.offset - (mirror.address - mirror._base), []
    for mapping in mirror.mappings:
        assert isinstance(mapping.frames, SharedFrames)
        frames[mapping.frames.serial] = mapping.frames
        size = left if len(mirror.mappings) == 1 else min(left, mapping.length - offset)
        parts.append({"frames": mapping.frames.serial, "offset": mapping.phys_offset + offset, "length": size})
        left, offset = left - size, 0
    return {
        "address": mirror.address,
        "length": len(mirror),
        "base": mirror._base,
        "span": mirror._span,
        "zeros": mirror._zeros,
        "rights": int(mirror.rights),
        "parts": parts,
    }
