"""What a pool's worker does: it is the only one that imports shared memory. See test_shared_memory.py."""

from __future__ import annotations


def make(number: int) -> str:
    """A block, and a number in it; its name."""
    from realmap.shared_memory import SharedMemory

    block = SharedMemory(create=True, size=10)
    block.buf[0] = number
    block.close()
    return block.name
