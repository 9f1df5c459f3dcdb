"""What is asked of Linux where neither Python nor a library of its has a function, by ctypes: about pages, mostly.

Each raises OSError where Linux says no. Addresses and lengths are bytes, and of whole pages.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
from collections.abc import Sequence
from typing import Any

# include/uapi/asm-generic/mman-common.h: these are not in `mmap`.
MADV_COLD, MADV_PAGEOUT, MADV_COLLAPSE = 20, 21, 25
MREMAP_MAYMOVE = 1
PROT_NONE = 0
#: The same on every architecture (asm-generic/unistd.h, since Linux 5.6 and 5.10).
SYS_PIDFD_GETFD, SYS_PROCESS_MADVISE = 438, 440
#: move_pages is a library's (libnuma) that need not be there.
SYS_MOVE_PAGES = {"x86_64": 279, "aarch64": 239, "riscv64": 239, "ppc64le": 301, "s390x": 310}
MPOL_MF_MOVE_ALL = 4
SYS_KCMP = {"x86_64": 312, "aarch64": 272, "riscv64": 272, "ppc64le": 354, "s390x": 343}
KCMP_VM = 1  # include/uapi/linux/kcmp.h

_libc = ctypes.CDLL(None, use_errno=True)
_Word = ctypes.c_size_t
_libc.mmap.restype = _libc.mremap.restype = ctypes.c_ssize_t
_libc.syscall.restype = ctypes.c_long


def _ask(name: str, *arguments: Any) -> int:
    result = int(getattr(_libc, name)(*(_Word(each) if isinstance(each, int) else each for each in arguments)))
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)
    return result


def map_file(fd: int, length: int, protection: int = mmap.PROT_READ, offset: int = 0) -> int:
    """Maps a file, shared, wherever Linux likes; the address."""
    return _ask("mmap", 0, length, protection, mmap.MAP_SHARED, fd, offset)


def unmap(address: int, length: int) -> None:
    _ask("munmap", address, length)


def move(address: int, length: int, new_length: int) -> int:
    """Moves a map, or lets it become shorter or longer; its new address."""
    return _ask("mremap", address, length, new_length, MREMAP_MAYMOVE)


def protect(address: int, length: int, protection: int) -> None:
    _ask("mprotect", address, length, protection)


def lock(address: int, length: int) -> None:
    _ask("mlock", address, length)


def unlock(address: int, length: int) -> None:
    _ask("munlock", address, length)


def advise(address: int, length: int, advice: int) -> None:
    _ask("madvise", address, length, advice)


def advise_process(pidfd: int, address: int, length: int, advice: int) -> int:
    """As process_madvise(2), of one range of another process (CAP_SYS_NICE); how many bytes were advised."""
    return _ask("syscall", SYS_PROCESS_MADVISE, pidfd, (_Word * 2)(address, length), 1, advice, 0)


def pidfd_getfd(pidfd: int, number: int) -> int:
    """As pidfd_getfd(2): a descriptor of our own for what is `number` in that process."""
    return _ask("syscall", SYS_PIDFD_GETFD, pidfd, number, 0)


def share_memory(pid: int, other: int) -> bool:
    """Whether two processes have one and the same memory (kcmp(2)), as after vfork(2)."""
    return _ask("syscall", SYS_KCMP.get(platform.machine(), -1), pid, other, KCMP_VM, 0, 0) == 0


def move_pages(pid: int, addresses: Sequence[int], node: int) -> list[int]:
    """Moves pages of a process to a NUMA node; for each the node that it is on now, or an errno, negative.

    Pages that others map too are moved with CAP_SYS_NICE only. OSError (ENOSYS) also where its number is not known.
    """
    count = len(addresses)
    number = SYS_MOVE_PAGES.get(platform.machine(), -1)
    found = (ctypes.c_int * count)()
    nodes = (ctypes.c_int * count)(*[node] * count)
    _ask("syscall", number, pid, count, (_Word * count)(*addresses), nodes, found, MPOL_MF_MOVE_ALL)
    return list(found)
