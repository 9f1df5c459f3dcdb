"""What this machine allows, as far as realmap depends on it: checks as data, each with what would help."""

from __future__ import annotations

import mmap
import os
import platform
import resource
import socket
import sys
from collections.abc import Callable, Iterator

import msgspec
import posix_ipc
import psutil

from realmap.errors import KernelError
from realmap.host import SHM, files, liveness, procfs, room, runtime, stranger
from realmap.host.segment import Segment
from realmap.pages import HUGE_SIZE
from realmap.wire import status

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


def examine(path: str | None = None) -> list[Check]:
    """Looks at everything, and at the kernel at `path`, by default at all in the private directory. None is asked: so
    nothing here waits. What cannot be looked at is a warning of its own, never an exception.
    """

    def kernels() -> Iterator[Check]:
        return _kernels([path] if path is not None else runtime.sockets())

    found = []
    for look in [*_LOOKS, kernels]:
        try:
            found += list(look())
        except (OSError, ValueError, KernelError) as error:
            name = look.__name__.strip("_").replace("_", " ")
            found.append(Check(name, f"cannot be told: {error}", WARN, "look at it by hand"))
    return found


def _mib(size: float) -> str:
    return f"{size / MIB:.0f} MiB"


def _judged(name: str, found: str, advice: str = "", worse: str = WARN) -> Check:
    """All right, unless there is something to advise."""
    return Check(name, found, worse if advice else OK, advice)


def _python() -> Iterator[Check]:
    version = platform.python_version()
    fine = sys.version_info >= (3, 11) and sys.implementation.name == "cpython"
    advice = "" if fine else "use CPython 3.11 or newer"
    yield _judged("python", f"{sys.implementation.name} {version}", advice, BAD)
    yield Check("posix_ipc", posix_ipc.VERSION, OK)


def _linux() -> Iterator[Check]:
    release = platform.release()
    numbers = tuple(int(part) if part.isdigit() else 0 for part in release.split("-")[0].split(".")[:2])
    yield _judged("linux", release, "" if numbers >= OLDEST else "realmap is made for Linux 6.1 or newer")


def _address_space() -> Iterator[Check]:
    bits = procfs.address_bits()
    advice = "" if bits >= 47 else "the lands need 47 bits: another machine, or a kernel built with more"
    yield _judged("address space", f"{bits} bits", advice, BAD)


def _shared_memory() -> Iterator[Check]:
    if not os.path.isdir(SHM):
        yield Check(SHM, "missing", BAD, f"mount -t tmpfs -o size=1g tmpfs {SHM}")
        return
    disk = os.statvfs(SHM)
    size, free = disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize
    found = f"{_mib(size)}, {_mib(size - free)} in use, {_mib(free)} free" if size else "no limit of its size"
    advice = ""
    if size and size <= DOCKER_SHM:
        advice = f"small (Docker's default is 64 MiB): docker run --shm-size=1g, or mount -o remount,size=1g {SHM}"
    elif size and free < size // 10:
        advice = f"nearly full: realmap gc sweeps what killed kernels left; or remount {SHM} with size="
    yield _judged(SHM, found, advice)
    kinds = [part.fstype for part in psutil.disk_partitions(all=True) if part.mountpoint == SHM]
    if kinds and kinds[-1] != "tmpfs":
        yield Check(f"{SHM} file system", kinds[-1], WARN, f"mount -t tmpfs tmpfs {SHM}: on a disk it is no memory")
    noexec = bool(disk.f_flag & os.ST_NOEXEC)
    advice = f"mappings with u_rx are refused; if you want them: mount -o remount,exec {SHM}" if noexec else ""
    yield _judged(f"{SHM} noexec", "yes" if noexec else "no", advice)
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
    advice = "a segment takes one: raise `ulimit -Hn`, or use larger segments" if hard < FEW_DESCRIPTORS else ""
    yield _judged("descriptors", f"{soft} now, {hard} at most (a kernel takes them all)", advice)
    count = procfs.map_limit()
    advice = "each mirror takes one: sysctl vm.max_map_count=262144" if count < FEW_MAPS else ""
    yield _judged("maps of a process", str(count), advice)
    seen = procfs.setting("/proc/sys/vm/overcommit_memory")
    advice = "what is mapped private counts in full against CommitLimit: sysctl vm.overcommit_memory=0"
    found = {"0": "heuristic", "1": "always", "2": "strict"}.get(seen, "not shown")
    yield _judged("overcommit", found, advice if found == "strict" else "")


def _memory() -> Iterator[Check]:
    left = room.memory_left()
    machine = psutil.virtual_memory().total
    rooms = room.cgroup_rooms()
    bound = f", {_mib(min(rooms))} by its memory cgroup" if rooms and min(rooms) < machine else ""
    advice = "" if left >= 256 * MIB else "little is left: free some, or raise the cgroup's memory.max"
    yield _judged("memory", f"{_mib(left)} left of {_mib(machine)}{bound}", advice)
    cpus = len(os.sched_getaffinity(0))
    advice = "" if cpus > 1 else "kernel and users take turns on one: calls sleep instead of spin, and take longer"
    yield _judged("cpus", f"{cpus} usable of {os.cpu_count()}", advice)


def _huge_pages() -> Iterator[Check]:
    base = "/sys/kernel/mm/transparent_hugepage"
    shared, others = (procfs.setting(f"{base}/{name}") or "not shown" for name in ("shmem_enabled", "enabled"))
    none = shared in ("not shown", "deny")
    advice = f"map(huge=True) gets none: echo advise > {base}/shmem_enabled" if none else ""
    yield _judged("huge pages, shared memory", f"shmem_enabled {shared}, enabled {others}", advice)
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
    yield _judged("MADV_COLLAPSE", f"{_mib(got)} of {_mib(HUGE_SIZE)} in huge pages", advice)


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
        files.close(files.sealed("realmap-doctor", mmap.PAGESIZE))
        yield Check("memfd with seals", "works", OK)
    except OSError as error:
        yield Check("memfd with seals", error.strerror or "fails", WARN, "calls go by the socket, not by rings: slower")


def _ways() -> Iterator[Check]:
    """What `ForeignProcess` may do here."""
    held = [f"it needs {each}" for each in stranger.obstacles()]
    if stranger.may_open_map_files():
        found, advice = "of all that it shares", ""
    else:
        found = "of this uid's, and of what it has open, too, or under a name"
        advice = "; ".join(["for all else: root, or setcap cap_checkpoint_restore,cap_sys_ptrace=ep PYTHON", *held])
    yield _judged("mirrors of any process", found, advice)
    if stranger.has_capability(stranger.CAP_SYS_PTRACE):
        yield Check("copies of its private memory", "of anybody's", OK)
    else:
        yield _judged("copies of its private memory", "of this uid's" if not held else "none", "; ".join(held))


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
    yield Check("sockets", str(folder), OK)


def _kernels(paths: list[str]) -> Iterator[Check]:
    found = [at for path in paths if (at := status.look(path)) is not None]
    stuck = [at for at in found if at.is_stuck]
    yield Check("kernels", f"{len(found)} at work, {len(stuck)} of them stuck", OK)
    for at in stuck:
        advice = (
            f"kill -CONT {at.pid}" if at.stopped else f"blocking=True for that handler; to end it: kill -9 {at.pid}"
        )
        yield Check("a kernel", str(at), WARN, advice)


_LOOKS: list[Callable[[], Iterator[Check]]] = [
    _python,
    _linux,
    _address_space,
    _shared_memory,
    _limits,
    _memory,
    _huge_pages,
    _kernel_features,
    _ways,
    _container,
    _user,
]
