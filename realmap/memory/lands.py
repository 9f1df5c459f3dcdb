"""The two lands: fixed ranges of the address space that Linux never hands out by itself.

    0x0000_0000_0000  ┌──────────────────────────────┐
                      │  programs, heaps: 0x55.., 0x56..  (above both lands)
    0x2000_0000_0000  ├──────────────────────────────┤  UserLand, in every user process
                      │  mappings, by find_available_space
    0x2c00_0000_0000  │  - - - - - - - - - - - - - - │  heap: resize_heap grows it from here
    0x2e00_0000_0000  │  - - - - - - - - - - - - - - │  LentLand, in a process that serves: what others lend it
    0x3000_0000_0000  ├──────────────────────────────┤  KernelLand, in the kernel process
                      │  mirrors, one free page between neighbours
    0x3f00_0000_0000  │  - - - - - - - - - - - - - - │  mirrors of processes that are no users of a kernel
    0x4000_0000_0000  ├──────────────────────────────┤
                      │  Linux: from the top, below the stack
    0x7fff_ffff_f000  └──────────────────────────────┘

Linux searches from the top, and in [0x2000_0000_0000, 0x4000_0000_0000) it landed 0 times in
80 000 rounds (tools/bench/README.md). Nothing relies on that: every map is made with MAP_FIXED_NOREPLACE.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, SupportsIndex

from realmap.errors import InvalidAddress, VirtualMemoryExhaustion
from realmap.host import procfs
from realmap.host.translate import shortage
from realmap.pages import PAGE_SIZE, page_range


class Land(NamedTuple):
    """A half-open range of addresses, in bytes."""

    name: str
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length

    def holds(self, address: int, length: int = 1) -> bool:
        return self.start <= address and address + length <= self.end

    def part(self, start: SupportsIndex, length: SupportsIndex) -> Land:
        """A smaller land inside this one. InvalidAddress, InvalidSize: no whole pages, or not inside."""
        begin, size = page_range(start, length)
        if not self.holds(begin, size):
            raise InvalidAddress(
                begin, why=f"{size:#x} bytes there do not lie inside of {self.name} [{self.start:#x}, {self.end:#x})"
            )
        return Land(self.name, begin, size)


USER_LAND = Land("UserLand", 0x2000_0000_0000, 0x1000_0000_0000)
LENT_LAND = Land("LentLand", 0x2E00_0000_0000, 0x0200_0000_0000)
#: Where a process has mappings of its own: UserLand without what others lend it.
OWN_LAND = USER_LAND._replace(length=LENT_LAND.start - USER_LAND.start)
KERNEL_LAND = Land("KernelLand", 0x3000_0000_0000, 0x1000_0000_0000)
#: Where `ForeignProcess` mirrors: the upper sixteenth of KernelLand; a kernel in the same process does not know of it.
FOREIGN_LAND = KERNEL_LAND.part(KERNEL_LAND.end - KERNEL_LAND.length // 16, KERNEL_LAND.length // 16)
#: Where the heap of a process starts: in the upper quarter of its UserLand; LentLand is the upper half of that.
HEAP_SHARE = 4
#: Left unmapped between neighbouring mirrors, so that running off the end faults. Bytes.
GUARD = PAGE_SIZE


@functools.cache
def require_address_space() -> None:
    """VirtualMemoryExhaustion: this machine's address space is smaller than the 47 bits that the lands need.
    PhysicalMemoryExhaustion: no descriptor is left to look with.
    """
    try:
        bits = procfs.address_bits()
    except OSError as error:
        raise shortage(error, "cannot look at the address space") from None
    if bits < 47:
        raise VirtualMemoryExhaustion(
            KERNEL_LAND.end, why=f"the lands need an address space of 47 bits; this machine has {bits}"
        )
