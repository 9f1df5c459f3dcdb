"""What the demo's kernel runs: ordinary syscalls."""

from __future__ import annotations

import os
import time
from statistics import median
from typing import Any

from realmap.host import procfs
from realmap.kernel import Call, UserBuffer, syscall
from realmap.lab.demo.report import digest
from realmap.memory.cross_process import CrossProcessMapping
from realmap.memory.frames import SharedFrames
from realmap.memory.mapping import Mapping
from realmap.rights import k_r

#: How often whoever waits looks up, in seconds.
LOOK = 0.1
#: How often a way is timed; the median counts.
ROUNDS = 9
LOOKS = 5

_held: list[CrossProcessMapping] = []
_digested: list[int] = []


def _frames_of(mapping: Mapping) -> SharedFrames:
    assert isinstance(mapping.frames, SharedFrames)
    return mapping.frames


def _frame_numbers(pid: int, address: int, here: int) -> tuple[int | None, int | None]:
    """The numbers of the pages of RAM behind the two; Linux may move one between two looks, now and then."""
    for _ in range(LOOKS):
        found = procfs.frame_number(pid, address), procfs.frame_number(os.getpid(), here)
        if found[0] == found[1]:
            break
    return found


@syscall(blocking=True)
def demo_digest(call: Call, data: UserBuffer, pace: float) -> dict[str, Any]:
    """Digests a range in place; what it saw. The mirror is kept `pace` seconds, to be seen."""
    frames = _frames_of(data.mappings[0])
    before = frames.refcount
    with data.mirror(k_r) as mirror:
        seen = {
            "user_address": data.address,
            "kernel_address": mirror.address,
            "segments": len(frames.pieces(mirror.mapping.phys_offset + mirror.offset, len(mirror))),
            "digest": digest(mirror),
            "frames": [
                _frame_numbers(call.process.pid, data.address + at, mirror.address + at) for at in (0, len(data) - 1)
            ],
        }
        during = frames.refcount
        end = time.monotonic() + pace
        while call.process.alive and (left := end - time.monotonic()) > 0:  # nobody is kept who is to end
            time.sleep(min(left, LOOK))
    _digested.append(len(data))
    return seen | {"refcounts": (before, during, frames.refcount)}


@syscall
def demo_digested(call: Call) -> int:
    """How many ranges have been digested so far."""
    return len(_digested)


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


@syscall
def demo_held(call: Call) -> int | None:
    """The refcount of what is mirrored so; None: nothing yet."""
    return _frames_of(_held[0].mapping).refcount if _held else None


@syscall
def demo_read(call: Call) -> dict[str, Any]:
    """Digests the mirror that is kept, whose owner is dead by now, and drops it."""
    with _held.pop() as mirror:
        return {"digest": digest(mirror), "refcount": _frames_of(mirror.mapping).refcount}


SYSCALLS = (demo_digest, demo_digested, demo_race, demo_write, demo_hold, demo_held, demo_read)
