"""How much memory may still be taken, asked before it is taken.

posix_fallocate on tmpfs says ENOSPC where the file system is full, but where the machine (or the
memory cgroup) has less memory than /dev/shm has room, Linux ends a process instead of saying no.
So what is about to be taken is held against all three first.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from realmap.host import SHM, cgroups
from realmap.host.signals import pass_on

#: Small segments are not worth the 0.1 ms of a look each: this much is taken between two looks at the most.
UNCHECKED = 16 << 20
_allowance = 0
#: From so many bytes on, a limit of version 1 is none.
UNLIMITED = 1 << 62


def require(length: int, *, in_shm: bool = True) -> None:
    """Answers if `length` bytes can be taken now; not `in_shm`: of memory that has no name there.

    OSError (ENOSPC or ENOMEM): they cannot, and taking them is not tried.
    """
    global _allowance
    if length <= _allowance:
        _allowance -= length
        return
    if in_shm:
        disk = os.statvfs(SHM)
        if disk.f_blocks and length > disk.f_bavail * disk.f_frsize:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    left = memory_left()
    if length > left:
        raise OSError(errno.ENOMEM, f"{left} bytes of memory are left")
    _allowance = min(UNCHECKED, (left - length) // 8)


def memory_left() -> int:
    """Bytes that this process can still take without somebody being killed for it: the machine's and its cgroup's."""
    # By hand: psutil finds out far more, which takes longer.
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    machine = sum(int(fields[name].split()[0]) << 10 for name in ("MemAvailable", "SwapFree"))
    return max(0, min([machine, *cgroup_rooms()]))


def cgroup_rooms() -> list[int]:
    """What the memory cgroups above this process leave it (version 2 and version 1), in bytes."""
    rooms = []
    for place in cgroups.places():
        if place.version == 2:
            limit, use, total = "memory.max", "memory.current", ""
        else:
            limit, use, total = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        for level in place.levels:
            room = _room(level / limit, level / use, level / "memory.stat", total)
            rooms += [room] if room is not None else []
    return rooms


def _room(limit: Path, use: Path, stat: Path, total: str) -> int | None:
    try:
        most = limit.read_text().strip()
        if most == "max" or int(most) >= UNLIMITED:  # use and statistics of a group without a limit take milliseconds
            return None
        used = int(use.read_text())
        fields = dict(line.split() for line in stat.read_text().splitlines())
        # Page cache of files counts as use, but Linux gives it up before it says no. (That of tmpfs is not in these.)
        cache = sum(int(fields.get(f"{total}{name}_file", 0)) for name in ("active", "inactive"))
        return int(most) - used + cache
    except ValueError:
        return None
    except OSError as error:
        pass_on(error)
        return None
