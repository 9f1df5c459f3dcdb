"""What the figures depend on: the machine, its settings, and what its hypervisor took away meanwhile."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil

from realmap.host.procfs import setting
from realmap.host.translate import SHM
from realmap.pages import PAGE_SIZE

#: Others may take this share of the CPUs before it is said.
BUSY = 0.05


def facts() -> dict[str, str | int | float | bool]:
    """The machine, in the words of Linux. Sizes in bytes."""
    disk = os.statvfs(SHM)
    cpus = Path("/proc/cpuinfo").read_text()
    return {
        "cpu": _cpu(cpus.splitlines()),
        "cpus": len(os.sched_getaffinity(0)),
        "virtual": "hypervisor" in cpus,
        "memory": psutil.virtual_memory().total,
        "linux": platform.release(),
        "architecture": platform.machine(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "page": PAGE_SIZE,
        "shm": disk.f_blocks * disk.f_frsize,
        "shmem_huge": setting("/sys/kernel/mm/transparent_hugepage/shmem_enabled") or "unknown",
        "governor": setting("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "unknown",
        "load": round(os.getloadavg()[0], 2),
    }


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
