"""Memory of a process between canary pages, and what is in it as plain bytes: for random ranges against a model."""

from __future__ import annotations

import random

from realmap import PAGE_SIZE
from realmap.memory import USER_LAND, FrameAllocator, ProcessMemory
from realmap.memory.frames import SharedFrames
from realmap.rights import MemoryType, u_rw

AT = USER_LAND.start


def between_canaries(
    rng: random.Random, pages: int, fragment: int, split: int
) -> tuple[ProcessMemory, SharedFrames, bytearray]:
    """`pages` at AT, in one mapping or, split there, in two, of segments of `fragment` pages; its frames, which have a
    page more before and behind, and the bytes of all of these.
    """
    size = pages * PAGE_SIZE
    allocator = FrameAllocator()
    memory = ProcessMemory(allocator=allocator)
    frames = allocator.allocate(size + 2 * PAGE_SIZE, fragment * PAGE_SIZE)
    model = bytearray(rng.randbytes(size + 2 * PAGE_SIZE))
    frames.write(0, memoryview(model), 0)
    for first, last in ((0, split), (split, pages)):
        if first < last:
            at, length = (1 + first) * PAGE_SIZE, (last - first) * PAGE_SIZE
            memory.map_partial_shared_mapping(frames, AT + first * PAGE_SIZE, at, length, MemoryType.HEAP, u_rw)
    return memory, frames, model
