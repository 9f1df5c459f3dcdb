"""errno, turned into an error of ours that says what was wrong and what would be right."""

from __future__ import annotations

import errno
import mmap
import os
import resource

from realmap.errors import AccessDenied, InvalidAddress, KernelError, PhysicalMemoryExhaustion, VirtualMemoryExhaustion
from realmap.host import SHM
from realmap.host.signals import pass_on

#: Linux has no memory for the call itself (a socket's buffer, a table): nothing was done, and it may go well later.
SHORT_OF_MEMORY = (errno.ENOMEM, errno.ENOBUFS)


def shm_mount() -> tuple[str, str]:
    """The mount that holds /dev/shm, as (mount point, options)."""
    import psutil  # here: it takes longer to import than all that comes without an error

    mounts = [
        part for part in psutil.disk_partitions(all=True) if (SHM + "/").startswith(part.mountpoint.rstrip("/") + "/")
    ]
    best = max(mounts, key=lambda part: len(part.mountpoint), default=None)
    return (best.mountpoint, best.opts) if best else (SHM, "unknown")


def frames_error(error: OSError, size: int) -> KernelError:
    """Why `size` bytes of frames could not be had."""
    pass_on(error)
    if error.errno in (errno.EMFILE, errno.ENFILE):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return PhysicalMemoryExhaustion(
            size, why=f"no descriptors left for a segment (limit {limit}: ulimit -n); unmap something first"
        )
    if error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT, errno.EFBIG):
        try:
            disk = os.statvfs(SHM)
            room = f"{disk.f_bavail * disk.f_frsize} of {disk.f_blocks * disk.f_frsize} bytes free"
        except OSError:
            room = "its size unknown"
        reason = "the limit of file sizes (ulimit -f)" if error.errno == errno.EFBIG else f"{SHM} ({room})"
        return PhysicalMemoryExhaustion(size, why=f"no room for a segment of {size} bytes: {reason}: {error.strerror}")
    if error.errno in (errno.EACCES, errno.EPERM):
        return AccessDenied(why=f"cannot make a segment in {SHM}: {error.strerror}")
    return PhysicalMemoryExhaustion(size, why=f"cannot make a segment: {error.strerror}")


def shortage(error: OSError, doing: str) -> KernelError:
    """Why something else failed: a connection, a wait. `doing` says in words what."""
    pass_on(error)
    if isinstance(error, KernelError):  # it says so already
        return error
    if error.errno in (errno.EMFILE, errno.ENFILE):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return PhysicalMemoryExhaustion(why=f"{doing}: no descriptors left (limit {limit}: ulimit -n)")
    if error.errno in SHORT_OF_MEMORY or error.errno == errno.EAGAIN:
        return PhysicalMemoryExhaustion(why=f"{doing}: {error.strerror}")
    if error.errno in (errno.EACCES, errno.EPERM):
        return AccessDenied(why=f"{doing}: {error.strerror}")
    return KernelError(why=f"{doing}: {error.strerror or error}")


def window_error(error: OSError, address: int, size: int, prot: int) -> KernelError:
    """Why `size` bytes could not be mapped at (or unmapped from) `address`."""
    pass_on(error)
    if isinstance(error, KernelError):  # it says so already
        return error
    if error.errno == errno.EEXIST:
        return InvalidAddress(address, why="something is mapped there already")
    if error.errno == errno.ENOMEM:
        return VirtualMemoryExhaustion(
            size, why="Linux allows this process no more mappings (vm.max_map_count, or ulimit -v); drop some first"
        )
    if error.errno in (errno.EPERM, errno.EACCES):
        if prot & mmap.PROT_EXEC:
            mount, options = shm_mount()
            return AccessDenied(why=f"executable rights need frames on a mount without noexec: {mount} is {options}")
        return AccessDenied(why=f"the frames do not allow these rights: {error.strerror}")
    if error.errno == errno.EAGAIN:
        return PhysicalMemoryExhaustion(size, why="the limit of locked memory is reached (ulimit -l)")
    return InvalidAddress(address, why=f"cannot map there: {error.strerror}")
