"""What the demo's kernel runs: ordinary syscalls."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from queue import Empty, SimpleQueue
from statistics import median
from typing import Any

from realmap.host import procfs
from realmap.kernel import Call, UserBuffer, syscall
from realmap.lab.demo.report import digest
from realmap.memory.cross_process import CrossProcessMapping
from realmap.memory.frames import SharedFrames
from realmap.rights import k_r

#: How often whoever waits looks up, in seconds.
LOOK = 0.1
#: How often a way is timed; the median counts.
ROUNDS = 9

_events: SimpleQueue[dict[str, Any]] = SimpleQueue()
_held: list[CrossProcessMapping] = []


def _frames_of(data: UserBuffer) -> SharedFrames:
    frames = data.mappings[0].frames
    assert isinstance(frames, SharedFrames)
    return frames


@syscall(blocking=True)
def demo_digest(call: Call, number: int, data: UserBuffer, pace: float) -> None:
    """Digests a range in place, and reports what it saw. The mirror is kept `pace` seconds, to be seen."""
    frames = _frames_of(data)
    before = frames.refcount
    with data.mirror(k_r) as mirror:
        seen = {
            "check": number,
            "user_address": data.address,
            "kernel_address": mirror.address,
            "segments": len(frames.pieces(mirror.mapping.phys_offset + mirror.offset, len(mirror))),
            "digest": digest(mirror),
            "frames": [
                (procfs.frame_number(call.process.pid, data.address + at), procfs.frame_number(os.getpid(), address))
                for at, address in ((0, mirror.address), (len(data) - 1, mirror.address + len(data) - 1))
            ],
        }
        during = frames.refcount
        end = time.monotonic() + pace
        while call.process.alive and (left := end - time.monotonic()) > 0:  # nobody is kept who is to end
            time.sleep(min(left, LOOK))
    _events.put(seen | {"refcounts": (before, during, frames.refcount)})


@syscall(blocking=True)
def demo_race(call: Call, data: UserBuffer, length: int) -> dict[str, Any]:
    """Reaches the first `length` bytes as a mirror and as a copy, in turns, and digests them. Nanoseconds."""
    taken: dict[str, list[int]] = {"mirror": [], "copy": [], "mirror_digest": [], "copy_digest": []}
    digests = set()
    for _ in range(ROUNDS):
        for way in ("mirror", "copy"):
            began = time.perf_counter_ns()
            reached: Any = data.mirror(k_r, 0, length) if way == "mirror" else data.copy_in(length)
            there = time.perf_counter_ns()
            digests.add(digest(reached))
            digested = time.perf_counter_ns()
            if way == "mirror":
                reached.drop()
            del reached
            end = time.perf_counter_ns()
            taken[way].append(there - began + end - digested)  # to have them, and to give them back
            taken[f"{way}_digest"].append(end - began)
    return {way: int(median(times)) for way, times in taken.items()} | {"digests": sorted(digests)}


@syscall
def demo_write(call: Call, data: UserBuffer, text: bytes) -> None:
    with data.mirror() as mirror:
        mirror[:] = text


@syscall
def demo_hold(call: Call, data: UserBuffer) -> None:
    """Mirrors a buffer and keeps the mirror in use, over the end of this call and of its owner."""
    _held.append(data.mirror(k_r))
    _events.put({"held": call.process.pid, "refcount": _frames_of(data).refcount})


@syscall
def demo_read(call: Call) -> dict[str, Any]:
    """Digests the mirror that is kept, whose owner is dead by now, and drops it."""
    with _held.pop() as mirror:
        frames = mirror.mapping.frames
        assert isinstance(frames, SharedFrames)
        return {"digest": digest(mirror), "refcount": frames.refcount}


@syscall(blocking=True)
def demo_collect(call: Call, patience: float) -> dict[str, Any] | None:
    """The next report of a handler; None where nothing came within `patience` seconds."""
    with suppress(Empty):
        return _events.get(timeout=patience)
    return None


SYSCALLS = (demo_digest, demo_race, demo_write, demo_hold, demo_read, demo_collect)
