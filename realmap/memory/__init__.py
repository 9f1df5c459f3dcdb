"""The seed: frames, mappings and mirrors. Usable in one process, with no kernel running.

How one access goes through the structures, for `memory.mirror_mapping(0x2000_0000_1003, 5, kernel=kernel)`:

    address 0x2000_0000_1003
      → ProcessMemory     the mapping it falls in, and those that follow without a gap
      → Mapping           offset 0x1003 in it; its own phys_offset added
      → SharedFrames      the segments that hold those pages: (descriptor, offset, length)
      → KernelMemory      an address in KernelLand where whole pages fit, reserved
      → Window (C)        mmap(address, MAP_FIXED_NOREPLACE), all pieces or none
      → CrossProcessMapping   address + 3, 5 bytes, one more reference to the frames

and its end, always in this order:

    view (memoryview, numpy) released → mirror unmapped → mapping released → segments closed, at refcount 0

Invariants: a `Mapping` is valid for as long as it exists · ranges in a land never overlap ·
`frames.refcount` is the number of mappings, parked windows, mirrors and handles of it, no more and no less ·
what the books say is mapped is what /proc/PID/maps says, by inode and offset.

Of a process that is no user of any kernel the mapping is found in Linux, and made when it is mirrored: foreign.py.

Locks, signal handlers and destructors: the rule for all of realmap is in realmap/host/signals.py.
"""

from realmap.memory.bookkeeping import Bookkeeping
from realmap.memory.cross_process import CrossProcessMapping
from realmap.memory.foreign import ForeignMapping, ForeignProcess
from realmap.memory.frames import FrameAllocator, OwnedFrames, SharedFrames
from realmap.memory.kernel_memory import AddressState, KernelMemory
from realmap.memory.lands import KERNEL_LAND, LENT_LAND, USER_LAND, Land
from realmap.memory.lending import LentLand, LentMapping
from realmap.memory.mapping import Mapping
from realmap.memory.process_memory import ProcessMemory
from realmap.memory.userspace_ptr import UserspacePtr
from realmap.rights import MappingAccessRights, MemoryState, MemoryType

__all__ = [
    "KERNEL_LAND",
    "LENT_LAND",
    "USER_LAND",
    "AddressState",
    "Bookkeeping",
    "CrossProcessMapping",
    "ForeignMapping",
    "ForeignProcess",
    "FrameAllocator",
    "KernelMemory",
    "Land",
    "LentLand",
    "LentMapping",
    "Mapping",
    "MappingAccessRights",
    "MemoryState",
    "MemoryType",
    "OwnedFrames",
    "ProcessMemory",
    "SharedFrames",
    "UserspacePtr",
]
