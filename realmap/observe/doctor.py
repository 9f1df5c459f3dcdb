"""What this machine allows, as far as realmap depends on it: checks as data, each with what would help."""

from __future__ import annotations

import fcntl
import mmap
import os
import platform
import resource
import socket
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import msgspec
import psutil

from realmap.errors import KernelError
from realmap.host import files, liveness, procfs, room, runtime
from realmap.host.segment import Segment
from realmap.host.translate import SHM
from realmap.pages import HUGE_SIZE

OK, WARN, BAD = "ok", "warn", "bad"
MIB = 1 << 20
#: What Docker gives a container for shared memory unless told otherwise, in bytes.
DOCKER_SHM = 64 * MIB
#: Fewer would be felt: descriptors (one for each segment), and maps of one process.
FEW_DESCRIPTORS, FEW_MAPS = 4096, 65_530
OLDEST = (6, 1)


class Check(msgspec.Struct, frozen=True):
    """One thing that was looked at. `status`: "ok", "warn" (it works, with less) or "bad" (realmap does not work)."""

    name: str
    found: str
    status: str
    advice: str = ""


def examine() -> list[Check]:
    """Looks at everything. What cannot be looked at is a warning of its own, never an exception."""
    found = []
    for look in _LOOKS:
        try:
            found += list(look())
        except (OSError, ValueError, KernelError) as error:
            name = look.__name__.strip("_").replace("_", " ")
            found.append(Check(name, f"cannot be told: {error}", WARN, "look at it by hand"))
    return found


def _mib(size: float) -> str:
    return f"{size / MIB:.0f} MiB"


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _chosen(path: str) -> str | None:
    """The word in brackets: that is how /sys says which of its choices holds."""
    text = _read(path)
    return text[text.index("[") + 1 : text.index("]")] if text and "[" in text else text


def _python() -> Iterator[Check]:
    version = platform.python_version()
    fine = sys.version_info >= (3, 11) and sys.implementation.name == "cpython"
    yield Check(
        "python",
        f"{sys.implementation.name} {version}",
        OK if fine else BAD,
        "" if fine else "use CPython 3.11 or newer",
    )
    try:
        yield Check("posix_ipc", metadata.version("posix_ipc"), OK)
    except metadata.PackageNotFoundError:
        yield Check("posix_ipc", "missing", BAD, "pip install posix_ipc")


def _linux() -> Iterator[Check]:
    release = platform.release()
    numbers = tuple(int(part) if part.isdigit() else 0 for part in release.split("-")[0].split(".")[:2])
    fine = numbers >= OLDEST
    yield Check("linux", release, OK if fine else WARN, "" if fine else "realmap is made for Linux 6.1 or newer")


def _address_space() -> Iterator[Check]:
    bits = procfs.address_bits()
    advice = "" if bits >= 47 else "the lands need 47 bits: another machine, or a kernel built with more"
    yield Check("address space", f"{bits} bits", BAD if advice else OK, advice)


def _shared_memory() -> Iterator[Check]:
    if not os.path.isdir(SHM):
        yield Check(SHM, "missing", BAD, f"mount -t tmpfs -o size=1g tmpfs {SHM}")
        return
    disk = os.statvfs(SHM)
    size, free = disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize
    found = f"{_mib(size)}, {_mib(size - free)} in use, {_mib(free)} free" if size else "no limit of its size"
    status, advice = OK, ""
    if size and size <= DOCKER_SHM:
        status = WARN
        advice = f"small (Docker's default is 64 MiB): docker run --shm-size=1g, or mount -o remount,size=1g {SHM}"
    elif size and free < size // 10:
        status, advice = WARN, f"nearly full: realmap gc sweeps what killed kernels left; or remount {SHM} with size="
    yield Check(SHM, found, status, advice)
    kinds = [part.fstype for part in psutil.disk_partitions(all=True) if part.mountpoint == SHM]
    if kinds and kinds[-1] != "tmpfs":
        yield Check(f"{SHM} file system", kinds[-1], WARN, f"mount -t tmpfs tmpfs {SHM}: on a disk it is no memory")
    noexec = bool(disk.f_flag & os.ST_NOEXEC)
    yield Check(
        f"{SHM} noexec",
        "yes" if noexec else "no",
        WARN if noexec else OK,
        f"mappings with u_rx are refused; if you want them: mount -o remount,exec {SHM}" if noexec else "",
    )
    yield _segment()


def _segment() -> Check:
    try:
        segment = Segment(mmap.PAGESIZE)
    except KernelError as error:
        return Check("a segment", str(error), BAD, f"see that {SHM} has room, and that you may write there")
    segment.close()
    return Check("a segment", "made and unlinked", OK)


def _limits() -> Iterator[Check]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = hard < FEW_DESCRIPTORS
    yield Check(
        "descriptors",
        f"{soft} now, {hard} at most (a kernel takes them all)",
        WARN if few else OK,
        "a segment takes one: raise `ulimit -Hn`, or use larger segments" if few else "",
    )
    count = int(_read("/proc/sys/vm/max_map_count") or FEW_MAPS)
    yield Check(
        "maps of a process",
        str(count),
        WARN if count < FEW_MAPS else OK,
        "each mirror takes one: sysctl vm.max_map_count=262144" if count < FEW_MAPS else "",
    )
    seen = _read("/proc/sys/vm/overcommit_memory")
    strict = seen == "2"
    yield Check(
        "overcommit",
        {"0": "heuristic", "1": "always", "2": "strict"}.get(seen or "", "not shown"),
        WARN if strict else OK,
        "what is mapped private counts in full against CommitLimit: sysctl vm.overcommit_memory=0" if strict else "",
    )


def _memory() -> Iterator[Check]:
    left = room.memory_left()
    machine = psutil.virtual_memory().total
    rooms = room.cgroup_rooms()
    bound = f", {_mib(min(rooms))} by its memory cgroup" if rooms and min(rooms) < machine else ""
    advice = "" if left >= 256 * MIB else "little is left: free some, or raise the cgroup's memory.max"
    yield Check("memory", f"{_mib(left)} left of {_mib(machine)}{bound}", WARN if advice else OK, advice)
    cpus = len(os.sched_getaffinity(0))
    advice = "" if cpus > 1 else "kernel and users take turns on one: calls sleep instead of spin, and take longer"
    yield Check("cpus", f"{cpus} usable of {os.cpu_count()}", WARN if advice else OK, advice)


def _huge_pages() -> Iterator[Check]:
    base = "/sys/kernel/mm/transparent_hugepage"
    enabled = _chosen(f"{base}/shmem_enabled")
    yield Check(
        "huge pages, shared memory",
        f"shmem_enabled {enabled or 'not shown'}, enabled {_chosen(f'{base}/enabled') or 'not shown'}",
        WARN if enabled in (None, "deny") else OK,
        f"map(huge=True) gets none: echo advise > {base}/shmem_enabled" if enabled in (None, "deny") else "",
    )
    try:
        segment = Segment(HUGE_SIZE, huge=True)
    except KernelError as error:
        yield Check("MADV_COLLAPSE", f"not tried: {error}", WARN, f"make room in {SHM} for a huge page")
        return
    got = segment.huge
    segment.close()
    advice = (
        "" if got else "Linux 6.1 or newer has it, where memory is not too fragmented; without, huge=True has no effect"
    )
    yield Check("MADV_COLLAPSE", f"{_mib(got)} of {_mib(HUGE_SIZE)} in huge pages", OK if got else WARN, advice)


def _kernel_features() -> Iterator[Check]:
    try:
        files.close(os.pidfd_open(os.getpid()))
        yield Check("pidfd_open", "works", OK)
    except OSError as error:
        advice = "deaths cannot be seen: allow it in the sandbox (seccomp) rules"
        yield Check("pidfd_open", error.strerror or "fails", BAD, advice)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        try:
            files.close(ours.getsockopt(socket.SOL_SOCKET, liveness.SO_PEERPIDFD))
            yield Check("SO_PEERPIDFD", "works", OK)
        except OSError:
            # The start time is compared in its place (host/liveness.py): nothing is lost.
            yield Check("SO_PEERPIDFD", "not there (Linux 6.5 has it): pid and start time are used instead", OK)
    try:
        fd = os.memfd_create("realmap-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        finally:
            files.close(fd)
        yield Check("memfd with seals", "works", OK)
    except OSError as error:
        yield Check("memfd with seals", error.strerror or "fails", WARN, "calls go by the socket, not by rings: slower")


def _container() -> Iterator[Check]:
    signs = {
        "docker": os.path.exists("/.dockerenv"),
        "podman": os.path.exists("/run/.containerenv"),
        "kubernetes": "KUBERNETES_SERVICE_HOST" in os.environ,
        str(os.environ.get("container")): "container" in os.environ,
    }
    found = [name for name, there in signs.items() if there]
    yield Check("container", ", ".join(found) or "none that shows", OK)


def _user() -> Iterator[Check]:
    yield Check("uid", f"{os.geteuid()} (a kernel lets in its own uid only)", OK)
    try:
        folder = runtime.directory()
    except (KernelError, OSError) as error:
        yield Check("sockets", str(error), BAD, f"set {runtime.VARIABLE} to a directory of yours (chmod 700)")
        return
    longest = len(os.fsencode(str(folder))) + len("/4026531836.4194304.99999999.99.sock.lock")
    fits = longest <= runtime.LONGEST_PATH
    advice = "" if fits else f"the path is too long for a socket: set {runtime.VARIABLE} to a shorter one"
    yield Check("sockets", str(folder), OK if fits else BAD, advice)


_LOOKS: list[Callable[[], Iterator[Check]]] = [
    _python,
    _linux,
    _address_space,
    _shared_memory,
    _limits,
    _memory,
    _huge_pages,
    _kernel_features,
    _container,
    _user,
]
