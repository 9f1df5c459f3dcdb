"""Windows that are parked: where they are, and how many the kernel keeps."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from conftest import land_maps

from realmap import KernelHandle, Process


def parked() -> list[int]:
    """Where this process has parked windows."""
    return [entry.start for entry in land_maps(parked=True) if entry.perms == "---s"]


def stock(kernel: KernelHandle) -> tuple[int, int]:
    """Windows and bytes that the kernel keeps."""
    stats = kernel.stats()
    return stats["stock"], stats["stock_bytes"]


def park(me: Process, *lengths: int) -> list[int]:
    """Maps, writes and unmaps; where they were."""
    buffers = [me.map(length) for length in lengths]
    for buffer in buffers:
        buffer[:] = b"\x5a" * len(buffer)
    for buffer in buffers:
        buffer.unmap()
    return [buffer.address for buffer in buffers]


def inode(address: int) -> int:
    return next(entry.inode for entry in land_maps(parked=True) if entry.start == address)


@contextmanager
def segment_of(kernel: KernelHandle, address: int) -> Iterator[int]:
    """A descriptor of the segment that is mapped there, found as any process of this uid finds it."""
    wanted = inode(address)
    for name in os.listdir(f"/proc/{kernel.pid}/fd"):
        path = f"/proc/{kernel.pid}/fd/{name}"
        if os.path.exists(path) and os.stat(path).st_ino == wanted:
            fd = os.open(path, os.O_RDWR)
            yield fd
            os.close(fd)
            return
    raise AssertionError("the kernel has no such segment")
