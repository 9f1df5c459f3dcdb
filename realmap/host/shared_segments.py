"""Every segment of shared memory of the machine, and who maps it or has it open: one pass over /proc.

/dev/shm of each mount namespace   names and bytes: what is there, whether anybody uses it or not
/proc/PID/maps, /proc/PID/fd       who uses it; what has no name (any more): unlinked, memfd, System V, anonymous
/proc/sysvipc/shm                  System V segments, attached or not

There may be thousands: of a process only what is shared memory becomes an object. Processes come and go meanwhile: what
ends is left out.
"""

from __future__ import annotations

import os
import stat
import struct
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from realmap._core import device_maps, open_files
from realmap.host import SHM, files, procfs

POSIX, UNLINKED, MEMFD, SYSV, ANONYMOUS = "posix", "unlinked", "memfd", "sysv", "anonymous"
#: What a process says that is gone, or goes.
GONE = (FileNotFoundError, ProcessLookupError)
DELETED = " (deleted)"
#: What a descriptor of shared memory without a file system to be seen links to.
NAMELESS = ("/memfd:", "/SYSV", "/dev/zero (deleted)", "[anon_shmem:")
SYSVIPC, SYSV_PATH = "/proc/sysvipc/shm", b"/SYSV"
#: What `device_maps` and `open_files` tell of a process, in order.
_Mapped = tuple[int, int, int, int, int, int, bytes]
_Opened = tuple[int, int, bytes, int, int, int, float]
#: The rights of a map as /proc/PID/maps has them, by the four lowest bits of its flags.
PERMS = [
    "".join(letter if flags & bit else "-" for letter, bit in (("r", 1), ("w", 2), ("x", 4))) + "ps"[flags >> 3]
    for flags in range(16)
]


class Shown(NamedTuple):
    """Where a process has mapped a segment: addresses and the offset in it, in bytes; rights as in /proc/PID/maps."""

    pid: int
    start: int
    end: int
    offset: int
    perms: str


class Segment:
    """A segment; `size`, `resident` in bytes.

    `name`: in its /dev/shm (also what it was), of a memfd, the key of a System V one. `names`: all that it has now.
    `resident`: what it takes, swapped pages too; where not `exact`, only what its holders have touched could be told.
    `uid`: its owner; `touched`: when anything of it last changed, seconds since 1970; None where Linux does not tell.
    `makers`: pids that Linux has noted (System V). `maps`, `opened` (descriptors by pid): its holders.
    """

    def __init__(
        self, kind: str, name: str, device: int, inode: int, size: int = 0, resident: int = 0, exact: bool = False,
        uid: int | None = None, touched: float | None = None, *, names: Sequence[str] = (), makers: Sequence[int] = (),
        attached: int = 0, maps: Sequence[Shown] = (), opened: Mapping[int, int] | None = None,
    ) -> None:  # fmt: skip
        self.kind, self.name, self.device, self.inode = kind, name, device, inode
        self.size, self.resident, self.exact, self.uid, self.touched = size, resident, exact, uid, touched
        self.names, self.makers, self.attached = [*names], makers, attached
        self.maps, self.opened = [*maps], {**opened} if opened else {}

    def measure(self, status: os.stat_result) -> None:
        """Notes what Linux says of it."""
        touched = max(status.st_atime, status.st_ctime)  # a change of its bytes is one of it, too
        self.measured(status.st_size, status.st_blocks * 512, status.st_uid, touched)

    def measured(self, size: int, resident: int, uid: int, touched: float) -> None:
        """The same, taken apart."""
        self.size, self.resident, self.uid, self.touched, self.exact = size, resident, uid, touched, True

    @property
    def holders(self) -> set[int]:
        """The pids of whoever maps it or has it open."""
        return {each.pid for each in self.maps} | set(self.opened)


class Mount:
    """A /dev/shm. `path`: in its mount namespace; `root`: from here, by way of a process there.

    `memory`: it is a file system in memory. `size`, `used`: what statvfs says, in bytes; None where it counts nothing,
    or not memory alone. `other`: bytes of what has a name there and is no segment: links and the like. `closed`:
    directories that this process may not read. `steady`: `used` was the same before the pass and after it.
    """

    def __init__(
        self, path: str, root: str, device: int, memory: bool = True,
        *, size: int | None = None, used: int | None = None, other: int = 0,
    ) -> None:  # fmt: skip
        self.path, self.root, self.device, self.memory = path, root, device, memory
        self.size, self.used, self.other = size, used, other
        self.closed, self.steady = 0, True

    def ask(self) -> None:
        """What the file system says of itself. OSError: it is gone."""
        disk = os.statvfs(self.root)
        self.size = (disk.f_blocks * disk.f_frsize or None) if self.memory else None
        self.used = None if self.size is None else (disk.f_blocks - disk.f_bfree) * disk.f_frsize


class Machine(NamedTuple):
    """All of it, at about one moment. `mounts`: this process's own /dev/shm is the first.

    `processes` could be looked into, `unseen` not: they are not this process's to see.
    """

    time: float
    mounts: list[Mount]
    segments: list[Segment]
    processes: int
    unseen: int


def look() -> Machine:
    """The pass. OSError: this process has no memory or no descriptors for it."""
    return _Pass().machine()


class _Pass:
    def __init__(self) -> None:
        self.mounts: dict[int, Mount] = {}
        self.segments: dict[tuple[int | str, int], Segment] = {}
        self.unseen = self.seen = 0
        self.moment = time.time()
        #: Of the /dev/shm, of what has no file system to be seen, of its huge pages.
        self.devices = b""
        self.prefixes: dict[str, int] = {}
        #: What descriptors of shared memory link to begins so.
        self.starts = b""
        self.ipc = _link("/proc/self/ns/ipc")

    def machine(self) -> Machine:
        pids = procfs.pids()
        self._find_mounts(pids)
        for mount in list(self.mounts.values()):
            self._list(mount)
        devices = [*self.mounts, *_hidden_devices()]
        self.devices = struct.pack(f"={len(devices)}Q", *devices)
        self._read_sysv()
        self.starts = b"".join(os.fsencode(start) + b"\0" for start in (*self.prefixes, *NAMELESS))
        for pid in pids:
            try:
                self._look_into(pid)
                self.seen += 1
            except GONE:
                continue
            except PermissionError:
                self.unseen += 1
        self._guess()
        for mount in self.mounts.values():
            before = mount.used
            try:
                mount.ask()
            except OSError:  # the last process of its namespace has ended
                mount.used = None
            mount.steady = mount.used == before
        return Machine(self.moment, list(self.mounts.values()), list(self.segments.values()), self.seen, self.unseen)

    # ---- /dev/shm -----------------------------------------------------------------------------

    def _find_mounts(self, pids: list[int]) -> None:
        """This process's own first: a device has the path by which it was found first."""
        ours = [device for _, device in _tmpfs("self")]
        self._mount(SHM, SHM, ours)
        known = {_link("/proc/self/ns/mnt")}
        for pid in pids:
            space = _link(f"/proc/{pid}/ns/mnt")
            if space and space not in known:
                known.add(space)
                found = [(path, device) for path, device in _tmpfs(pid) if path.endswith(SHM)]
                for path, _ in found:
                    self._mount(path, f"/proc/{pid}/root{path}", [device for _, device in found])

    def _mount(self, path: str, root: str, memory: list[int]) -> None:
        """`memory`: the devices that are some there; none where that cannot be told."""
        try:
            fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:  # not there, not to be seen, or gone
            return
        try:
            device, place = os.fstat(fd).st_dev, os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            device, place = os.fstat(fd).st_dev, path  # no /proc
        finally:
            files.close(fd)
        if device not in self.mounts:
            self.mounts[device] = Mount(path, root, device, not memory or device in memory)
            self.mounts[device].ask()
        self.prefixes[place.rstrip("/") + "/"] = device

    def _list(self, mount: Mount) -> None:
        folders = [""]
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(f"{mount.root}/{folder}") as entries:
                    for entry in entries:
                        name = folder + entry.name
                        try:
                            status = entry.stat(follow_symlinks=False)
                        except FileNotFoundError:
                            continue
                        if status.st_dev != mount.device:  # something else is mounted there
                            continue
                        if stat.S_ISDIR(status.st_mode):
                            folders.append(name + "/")
                        self._named(mount, name, status)
            except GONE:
                continue
            except PermissionError:
                mount.closed += 1

    def _named(self, mount: Mount, name: str, status: os.stat_result) -> None:
        if not stat.S_ISREG(status.st_mode):
            mount.other += status.st_blocks * 512  # a long symbolic link takes a page
            return
        segment = self.segments.get((mount.device, status.st_ino))
        if segment is None:
            segment = Segment(POSIX, name, mount.device, status.st_ino)
            segment.measure(status)
            self.segments[mount.device, status.st_ino] = segment
        segment.names.append(name)

    # ---- processes ----------------------------------------------------------------------------

    def _look_into(self, pid: int) -> None:
        """PermissionError: it is not ours to see. GONE: it has ended."""
        thread = pid
        try:
            mapped, opened = self._has(pid)
        except (*GONE, PermissionError):  # where its first thread has ended, its folder is root's (task_dump_owner)
            if (thread := procfs.shown_by(pid)) == pid:
                raise
        else:
            if not mapped:  # only then is it asked, which takes as long as to look: has its first thread ended?
                thread = procfs.shown_by(pid)
        if thread != pid:
            mapped, opened = self._has(thread)
        self._open(pid, opened)  # before its maps: what it has open is measured
        self._map(pid, thread, mapped)

    def _has(self, thread: int) -> tuple[list[_Mapped], list[_Opened]]:
        """What of it is mapped, and open."""
        return _maps(b"/proc/%d/maps" % thread, self.devices), open_files(b"/proc/%d/fd" % thread, self.starts)

    def _open(self, pid: int, found: list[_Opened]) -> None:
        known = self.segments.get
        for device, inode, link, size, resident, uid, touched in found:
            segment = known((device, inode)) if link[:5] != SYSV_PATH else None
            if segment is not None or (segment := self._segment(pid, device, inode, link)) is not None:
                segment.opened[pid] = segment.opened.get(pid, 0) + 1
                if not segment.exact:
                    segment.measured(size, resident, uid, touched)

    def _map(self, pid: int, thread: int, found: list[_Mapped]) -> None:
        known = self.segments.get
        for start, end, flags, offset, device, inode, path in found:
            segment = known((device, inode)) if path[:5] != SYSV_PATH else None
            if segment is None and (segment := self._segment(pid, device, inode, path)) is None:
                continue
            segment.maps.append(Shown(pid, start, end, offset, PERMS[flags & 15]))
            if not segment.exact:
                segment.size = max(segment.size, offset + end - start)
                try:
                    segment.measure(os.stat(f"/proc/{thread}/map_files/{start:x}-{end:x}"))
                except OSError:  # not ours to follow, or unmapped meanwhile
                    pass

    def _segment(self, pid: int, device: int, inode: int, path: bytes) -> Segment | None:
        """The one that a path of a process leads to. None: it is no shared memory."""
        space: int | str = device
        if path.startswith(SYSV_PATH) and device not in self.mounts:
            space = _link(f"/proc/{pid}/ns/ipc") or self.ipc  # its inode is its id, which each namespace has for itself
        found = self.segments.get((space, inode))
        if found is None:
            kind, name = self._kind(device, os.fsdecode(path))
            if kind:
                found = Segment(kind, name, device, inode, names=[name] if kind == POSIX else [])
                self.segments[space, inode] = found
        return found

    def _kind(self, device: int, path: str) -> tuple[str, str]:
        """What it is, and its name; "" twice: no shared memory."""
        bare = path.removesuffix(DELETED)
        if device in self.mounts:
            place = next((each for each in self.prefixes if bare.startswith(each)), "")
            return (UNLINKED if path.endswith(DELETED) else POSIX), bare[len(place) :]
        if bare.startswith("/memfd:"):
            return MEMFD, bare[len("/memfd:") :]
        if bare.startswith("/SYSV"):
            return SYSV, f"0x{bare[len('/SYSV') :]}"
        if bare.startswith("[anon_shmem:"):
            return ANONYMOUS, bare[len("[anon_shmem:") : -1]
        return (ANONYMOUS, "") if bare in ("/dev/zero", "/anon_hugepage") else ("", "")

    # ---- what is left -------------------------------------------------------------------------

    def _read_sysv(self) -> None:
        try:
            head, *rows = _read(SYSVIPC).decode().splitlines()
        except (OSError, ValueError):  # no /proc, or one with processes alone
            return
        for row in rows:
            each = dict(zip(head.split(), map(int, row.split()), strict=False))
            self.segments[self.ipc, each["shmid"]] = Segment(
                SYSV, f"{each['key'] & 0xFFFFFFFF:#010x}", _internal_device(), each["shmid"], each["size"],
                each["rss"] + each["swap"], True, each["uid"], max(each["atime"], each["dtime"], each["ctime"]),
                makers=[each["cpid"], each["lpid"]], attached=each["nattch"],
            )  # fmt: skip

    def _guess(self) -> None:
        """Of what could not be measured (only a map is left of it, which is not ours to follow): what was touched."""
        vague = {segment.inode: segment for segment in self.segments.values() if not segment.exact}
        for pid in sorted({shown.pid for segment in vague.values() for shown in segment.maps}):
            try:
                entries = procfs.smaps(pid)
            except (*GONE, PermissionError):
                continue
            touched: dict[int, dict[int, int]] = {}  # of each, by offset: what is mapped twice counts once
            for entry, resident, _ in entries:
                if entry.inode in vague and procfs.device_number(entry.device) == vague[entry.inode].device:
                    spots = touched.setdefault(entry.inode, {})
                    spots[entry.offset] = max(spots.get(entry.offset, 0), resident)
            for inode, spots in touched.items():
                vague[inode].resident = max(vague[inode].resident, sum(spots.values()))


def _read(path: str | bytes) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while part := os.read(fd, 1 << 16):
            parts.append(part)
        return b"".join(parts)
    finally:
        files.close(fd)


def _link(path: str) -> str:
    """Where it leads; "" where it is gone, or not ours to see."""
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _tmpfs(pid: int | str) -> list[tuple[str, int]]:
    """Where a process sees file systems in memory, and their devices."""
    try:
        mounts = _read(f"/proc/{pid}/mountinfo").split(b"\n")
        lines = [line.split() for line in mounts if b" - tmpfs " in line]
    except OSError:
        return []
    return [(os.fsdecode(line[4]), os.makedev(*map(int, line[2].split(b":")))) for line in lines]


def _maps(path: bytes, devices: bytes) -> list[_Mapped]:
    """As `device_maps`, also where Linux shows them as text alone."""
    found = device_maps(path, devices)
    return _parsed(_read(path), devices) if found is None else found


def _parsed(text: bytes, devices: bytes) -> list[_Mapped]:
    found = []
    for (number,) in struct.iter_unpack("=Q", devices):
        wanted = b" %02x:%02x " % (os.major(number), os.minor(number))
        at = text.find(wanted)
        while at >= 0:
            end = text.find(b"\n", at)
            bounds, perms, offset, device, inode, *path = text[text.rfind(b"\n", 0, at) + 1 : end].split(None, 5)
            if device == wanted.strip() and path:  # else it stood in a path
                start, _, stop = bounds.partition(b"-")
                place = (int(start, 16), int(stop, 16), PERMS.index(perms.decode()), int(offset, 16))
                found.append((*place, number, int(inode), path[0].replace(b"\\012", b"\n")))
            at = text.find(wanted, end)
    return found


def _internal_device() -> int:
    """Of memfds, System V and anonymous shared memory: a tmpfs that is mounted nowhere."""
    return _device_of(os.MFD_CLOEXEC)


def _hidden_devices() -> list[int]:
    found = [_internal_device()]
    try:
        found.append(_device_of(os.MFD_CLOEXEC | os.MFD_HUGETLB))
    except OSError:  # built without
        pass
    return found


def _device_of(flags: int) -> int:
    fd = os.memfd_create("realmap-device", flags)
    try:
        return os.fstat(fd).st_dev
    finally:
        files.close(fd)
