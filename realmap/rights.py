"""Access rights, the 22 memory types, and their states."""

from __future__ import annotations

import enum
import mmap
from typing import Any

from realmap.errors import InvalidRights


class MappingAccessRights(enum.IntFlag, boundary=enum.KEEP):
    """What may be done with a range of memory, and whether a user process may do it.

    >>> print(MappingAccessRights.READABLE | MappingAccessRights.USER_ACCESSIBLE)
    u_r
    """

    READABLE = 1
    WRITABLE = 2
    EXECUTABLE = 4
    USER_ACCESSIBLE = 8

    def __str__(self) -> str:
        return f"{'u' if self & 8 else 'k'}_{letters(self).replace('-', '') or 'none'}"


k_r = MappingAccessRights.READABLE
k_w = MappingAccessRights.WRITABLE
k_rw = k_r | k_w
k_rx = k_r | MappingAccessRights.EXECUTABLE
_user = MappingAccessRights.USER_ACCESSIBLE
u_r, u_w, u_rw, u_rx = _user | k_r, _user | k_w, _user | k_rw, _user | k_rx

#: Every combination of the four bits, as the one object of its value: a lookup instead of a constructor.
_COMBINATIONS = {value: MappingAccessRights(value) for value in range(16)}
#: PROT_READ, PROT_WRITE and PROT_EXEC happen to be READABLE, WRITABLE and EXECUTABLE on Linux.
PROT_MASK = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC


def rights_of(value: Any) -> MappingAccessRights:
    """`value` as rights. InvalidRights: no combination of the four bits. TypeError: no integer."""
    if type(value) is MappingAccessRights and 0 <= value < 16:
        return value
    if not isinstance(value, int):
        raise TypeError(f"rights must be MappingAccessRights (such as realmap.u_rw), not {type(value).__name__}")
    known = _COMBINATIONS.get(int(value))
    if known is None:
        raise InvalidRights(
            int(value),
            why="no combination of READABLE 1, WRITABLE 2, EXECUTABLE 4 and USER_ACCESSIBLE 8; try realmap.u_rw",
        )
    return known


def allows(rights: int, bits: int) -> bool:
    """Whether `rights` have all of `bits`: by plain integers, as the operators of an enum cost a microsecond each."""
    return int(bits) & ~int(rights) == 0


def prot_of(rights: int) -> int:
    """The PROT_ bits of mmap(2) for `rights`."""
    return int(rights) & PROT_MASK


def letters(rights: int) -> str:
    """As /proc/PID/maps writes them: "rw-"."""
    return "".join(letter if rights & bit else "-" for bit, letter in ((1, "r"), (2, "w"), (4, "x")))


def user_rights(perms: str) -> MappingAccessRights:
    """What a process may do where /proc/PID/maps has these letters."""
    return rights_of(8 | sum(bit for letter, bit in zip(perms, (1, 2, 4), strict=False) if letter != "-"))


class MemoryType(enum.IntEnum):
    """What a mapping is for. The type decides which frames it has: see `is_counted` and `has_frames`."""

    UNMAPPED = 0
    IO = 1
    NORMAL = 2
    CODE_STATIC = 3
    CODE_MUTABLE = 4
    HEAP = 5
    SHARED_MEMORY = 6
    ALIAS = 7
    MODULE_CODE_STATIC = 8
    MODULE_CODE_MUTABLE = 9
    IPC = 10
    STACK = 11
    THREAD_LOCAL = 12
    TRANSFER_MEMORY_ISOLATED = 13
    TRANSFER_MEMORY = 14
    PROCESS_MEMORY = 15
    RESERVED = 16
    NON_SECURE_IPC = 17
    NON_DEVICE_IPC = 18
    KERNEL_STACK = 19
    CODE_READ_ONLY = 20
    CODE_WRITABLE = 21

    @property
    def has_frames(self) -> bool:
        """Whether a mapping of this type has frames at all."""
        return self not in _WITHOUT_FRAMES

    @property
    def is_counted(self) -> bool:
        """Whether its frames are reference counted (Shared), and can so be mirrored."""
        return self not in _NOT_COUNTED

    @property
    def state(self) -> MemoryState:
        """The type and what follows from it, as one word that `check_range` can mask."""
        return MemoryState(self | (MemoryState.REFERENCE_COUNTED if self.is_counted else 0))

    def __str__(self) -> str:
        return self.name


_TYPES: dict[int, MemoryType] = {int(kind): kind for kind in MemoryType}
_WITHOUT_FRAMES = frozenset({MemoryType.UNMAPPED, MemoryType.RESERVED, MemoryType.KERNEL_STACK})
_NOT_COUNTED = _WITHOUT_FRAMES | {MemoryType.IO, MemoryType.NORMAL}


class MemoryState(enum.IntFlag, boundary=enum.KEEP):
    """A memory type in the low 8 bits, and above them what follows from it."""

    TYPE_MASK = 0xFF
    REFERENCE_COUNTED = 1 << 22

    @property
    def type(self) -> MemoryType:
        """The memory type in the low bits."""
        return MemoryType(self & 0xFF)


def type_of(value: Any) -> MemoryType:
    """`value` as a memory type. TypeError: no integer, or none of the 22."""
    known = _TYPES.get(value) if isinstance(value, int) else None
    if known is None:
        raise TypeError(f"type must be a realmap.MemoryType (0 to 21), not {value!r}")
    return known
