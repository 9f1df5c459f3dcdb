"""What the figures depend on: the machine, its settings, and what its hypervisor took away meanwhile."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil

from realmap.host import SHM
from realmap.host.cgroups import places
from realmap.host.procfs import setting
from realmap.pages import PAGE_SIZE

#: Others may take this share of the CPUs before it is said.
BUSY = 0.05
BUGS = Path("/sys/devices/system/cpu/vulnerabilities")
THP = "/sys/kernel/mm/transparent_hugepage"
#: Who made the machine; of a virtual one, whose hypervisor it is.
MAKERS = ("/sys/class/dmi/id/sys_vendor", "/sys/class/dmi/id/product_name", "/sys/hypervisor/type")


def facts() -> dict[str, str | int | float | bool]:
    """The machine, in the words of Linux. Sizes in bytes."""
    disk = os.statvfs(SHM)
    cpus = Path("/proc/cpuinfo").read_text()
    bugs = sorted(path.name for path in BUGS.iterdir()) if BUGS.is_dir() else []
    return {
        "cpu": _cpu(cpus.splitlines()),
        "cpus": len(os.sched_getaffinity(0)),
        "virtual": "hypervisor" in cpus,
        "virtualization": " ".join(filter(None, map(setting, MAKERS))) or "unknown",
        "memory": psutil.virtual_memory().total,
        "linux": platform.release(),
        "build": platform.version(),
        "architecture": platform.machine(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "page": PAGE_SIZE,
        "shm": disk.f_blocks * disk.f_frsize,
        "shmem_huge": setting(f"{THP}/shmem_enabled") or "unknown",
        "thp": setting(f"{THP}/enabled") or "unknown",
        "thp_defrag": setting(f"{THP}/defrag") or "unknown",
        "numa": setting("/sys/devices/system/node/online") or "unknown",
        "numa_balancing": setting("/proc/sys/kernel/numa_balancing") or "unknown",
        "governor": setting("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "unknown",
        "cgroup_memory": cgroup("memory", "memory.max", "memory.limit_in_bytes"),
        "cgroup_cpu": cgroup("cpu", "cpu.max", "cpu.cfs_quota_us"),
        **{f"mitigation_{bug}": setting(f"{BUGS}/{bug}") for bug in bugs},
        "load": round(os.getloadavg()[0], 2),
    }


def cgroup(controller: str, limit: str, old: str) -> str:
    """What this process's group may have of it: by the file `limit` (version 2) or `old` (version 1)."""
    found = [setting(str(at.folder / (limit if at.version == 2 else old))) for at in places(controller)]
    return next(filter(None, found), "unknown")


def _cpu(lines: list[str]) -> str:
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Hardware", "CPU part"):
            return value.strip()
    return platform.processor() or "unknown"


class Disturbance:
    """How much of the CPUs was not ours to use, from its making to `doubts`."""

    def __init__(self) -> None:
        self._before = psutil.cpu_times()
        self._load = os.getloadavg()[0]

    def doubts(self) -> list[str]:
        """In words: who else wanted the CPUs, and what share the hypervisor took, where that matters."""
        cpus = len(os.sched_getaffinity(0))
        found = []
        if self._load > cpus:
            found.append(f"the load was {self._load:.1f} on {cpus} CPUs when it began: others slowed some rounds down")
        before, after = self._before, psutil.cpu_times()
        total = sum(after) - sum(before)
        stolen = (after.steal - before.steal) / total if total > 0 else 0.0
        if stolen > BUSY:
            found.append(f"the hypervisor took {stolen:.0%} of the CPUs' time away: compare ratios, not times")
        return found
