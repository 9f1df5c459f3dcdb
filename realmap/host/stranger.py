"""A process that knows nothing of us: pinned, with what it has mapped this moment, and the ways to the files behind.

    /proc/PID/maps          one map: its range, device and inode
      → map_files/RANGE     whatever is mapped; takes CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE
      → fd/N                what the process has open as well; takes its uid
      → the name            where the file has one still
      → pidfd_getfd         its own open file, where that may not be opened anew
      → /proc/PID/maps      is that map still there? Else all of it once more

Whatever a way leads to is compared by device and inode before it is opened. So nothing that comes in between (an exit,
an exec, a munmap, another file of that name) leads to somebody else's bytes. Everything is asked through the process's
own folder of /proc, held open: it never becomes that of a later process of the same pid.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TypeAlias, TypeVar

from realmap._core import map_at
from realmap.errors import AccessDenied, InvalidHandle, InvalidMemState, KernelError, ProcessKilled
from realmap.host import files, liveness, procfs
from realmap.host.files import Descriptor
from realmap.host.procfs import Map
from realmap.host.segment import Segment
from realmap.host.signals import pass_on
from realmap.host.translate import shortage
from realmap.pages import HUGE_SIZE, PAGE_SIZE
from realmap.rights import MemoryType

T = TypeVar("T")
#: Gives what may be the file behind a map, to be looked at.
Way: TypeAlias = Callable[[Map], Iterator[Descriptor]]
#: include/uapi/linux/capability.h
CAP_SYS_PTRACE = 19


class Borrowed(Segment):
    """A file that a stranger has mapped, up to where it has; by a descriptor of ours, and without a name to unlink."""

    __slots__ = ("_file",)

    def __init__(self, file: Descriptor, entry: Map) -> None:
        status = os.fstat(file.fd)
        self.name = None
        self.device, self.inode = status.st_dev, status.st_ino
        self.length = entry.offset + entry.length
        self.huge = self.length if status.st_blksize == HUGE_SIZE else 0  # it is mapped by whole huge pages
        self._file, self.fd = file, file.fd

    def close(self) -> None:
        """Gives up the descriptor. Again: nothing."""
        self.fd = -1
        self._file.close()


class Stranger:
    """Process `pid`, pinned: it is this one or gone, never another one of that pid. Not safe for threads by itself."""

    def __init__(self, pid: int) -> None:
        """InvalidHandle: there is no such process, it or its first thread has ended, or it has no memory (kthreadd).

        AccessDenied: /proc is not there, or hides it. PhysicalMemoryExhaustion: no descriptors.
        """
        self.pid = pid
        #: Its maps, open: those of the program that it ran when that was last looked at. -1: they may be another's.
        self.maps_fd = -1
        self._maps: Descriptor | None = None
        self._file_systems: dict[str, str] = {}
        self._held: list[Descriptor] = []
        try:
            self._held.append(Descriptor(partial(os.pidfd_open, pid)))
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
            self._held.append(Descriptor(partial(os.open, f"/proc/{pid}", flags)))
            if liveness.is_dead(self._pidfd):  # asked now: while it lives, the folder of its pid is its own
                raise InvalidHandle(pid, why=f"process {pid} has ended, and waits to be reaped")
            if procfs.is_exiting(self._proc):
                raise ProcessLookupError(f"the first thread of process {pid} has ended")
            if procfs.is_kernel_thread(self._proc):
                raise InvalidHandle(pid, why=f"{pid} is a thread of Linux itself, which has no memory of its own")
        except OSError as error:
            if isinstance(error, KernelError):
                raise
            pass_on(error)
            raise _no_process(pid, error, len(self._held) > 0) from None

    @property
    def _pidfd(self) -> int:
        return self._held[0].fd

    @property
    def _folder(self) -> int:
        return self._held[1].fd

    @property
    def _proc(self) -> str:
        """Its folder, as `procfs` wants to be told of processes."""
        return f"self/fd/{self._folder}"

    def close(self) -> None:
        """Again: nothing."""
        self.maps_fd, self._maps = -1, None
        for each in self._held:
            each.close()

    @contextmanager
    def _asked(self, doing: str) -> Iterator[None]:
        """Says of an OSError what it means of this process."""
        if self._folder < 0:
            raise InvalidHandle(self.pid, why=f"process {self.pid} is looked at no more: this was closed")
        try:
            yield
        except OSError as error:
            if isinstance(error, KernelError):
                raise
            pass_on(error)
            if liveness.is_dead(self._pidfd) or error.errno in (errno.ENOENT, errno.ESRCH):
                raise self._ended() from None
            if error.errno in (errno.EACCES, errno.EPERM):
                raise AccessDenied(why=f"cannot {doing} process {self.pid}: it takes {self._missing()}") from None
            raise shortage(error, f"cannot {doing} process {self.pid}") from None

    def _ended(self) -> ProcessKilled:
        if not liveness.is_dead(self._pidfd):
            return ProcessKilled(self.pid, why=_shown_no_more(self.pid))
        is_another = os.path.exists(f"/proc/{self.pid}") and not os.path.exists(f"/proc/{self._proc}/stat")
        reused = "; its pid is another process's now" if is_another else ""
        return ProcessKilled(self.pid, why=f"process {self.pid} has ended{reused}")

    def read(self, name: str) -> bytes:
        """What a small file of its folder says: "comm", "status". Errors as `maps`."""
        with self._asked("look at"), open(f"/proc/{self._proc}/{name}", "rb") as file:
            return file.read()

    def maps(self, low: int = 0, high: int = 1 << 64) -> list[Map]:
        """What it has mapped of [low, high), in order of address.

        ProcessKilled: it, or its first thread, has ended. AccessDenied: it is not ours to look at; what that takes is
        named.
        """
        with self._asked("read the maps of"):
            return self._alive(procfs.maps(self._proc, low, high))

    def smaps(self) -> list[procfs.Resident]:
        """The same with what is in memory. Errors as `maps`."""
        with self._asked("read the maps of"):
            return self._alive(procfs.smaps(self._proc))

    def _alive(self, found: list[T]) -> list[T]:
        if not found and procfs.is_exiting(self._proc):  # it has none any more, also before it can be waited for
            raise self._ended()
        return found

    def look(self, address: int) -> bytes | None:
        """What the core's `map_at` says of what it has mapped there now. None: nothing, or only `maps` can tell."""
        found = map_at(self.maps_fd, address)
        if found is None:
            with self._asked("read the maps of"):  # the first look; or it runs another program by now
                self.maps_fd = -1  # before the old one is closed
                borrows = self._borrows_memory()
                self._maps = self._open("maps", os.O_RDONLY)
            found = map_at(self._maps.fd, address)
            if not borrows:  # else they stay there when it runs a program of its own, and are its parent's alone
                self.maps_fd = self._maps.fd
        return found

    def _borrows_memory(self) -> bool:
        """Whether it has its parent's memory for now, as after vfork(2)."""
        parent = procfs.forked_by(self._proc)
        if not parent:
            return False
        from realmap.host.paging import share_memory  # here, as in `_by_getfd`

        with suppress(OSError):  # the parent is gone, not ours to look at, or this Linux has no kcmp(2)
            return share_memory(self.pid, parent)
        return False

    def _open(self, name: str, flags: int = os.O_PATH) -> Descriptor:
        """What is so called in its folder."""
        return Descriptor(partial(os.open, name, flags | os.O_CLOEXEC, dir_fd=self._folder))

    def still_has(self, entries: list[Map]) -> bool:
        """Whether all of these are mapped this moment as they were, whatever their files are called by now."""
        if all((found := self.look(entry.start)) and procfs.is_that(found, entry) for entry in entries):
            return True
        now = self.maps(entries[0].start, entries[-1].end)
        return [entry[:6] for entry in now] == [entry[:6] for entry in entries]

    def memory(self, writable: bool) -> Descriptor:
        """Its memory as it is now, by address; not of what a program that it runs later has.

        Errors as `maps`: it takes more to look into private memory.
        """
        with self._asked("write into" if writable else "look into"):
            return self._open("mem", os.O_RDWR if writable else os.O_RDONLY)

    # ---- the ways in ------------------------------------------------------------------------

    def open(self, entry: Map, writable: bool) -> Borrowed:
        """The file that it has mapped there, as a segment; the caller's to close.

        ProcessKilled: as `maps`. AccessDenied: no way is allowed; what is missing is named. InvalidMemState: no regular
        file, or one on FUSE. LookupError: it has something else there by now. PhysicalMemoryExhaustion: no descriptors.
        """
        if self.file_system(entry.device).startswith("fuse"):  # nothing of it is asked: that may never be answered
            why = f"a file on FUSE ({entry.path}): when its bytes come, if ever, is up to the program that serves it"
            raise InvalidMemState(entry.start, MemoryType.SHARED_MEMORY, why=why)
        flags = os.O_RDWR if writable else os.O_RDONLY
        ways: list[Callable[[Map], Iterator[Descriptor]]] = [
            self._by_map_files,
            self._by_fd,
            self._by_name,
            self._by_getfd,
        ]
        denied, refused, gone = False, "", False
        with self._asked("open what is mapped by"):
            for way in ways:
                try:
                    for file in way(entry):
                        try:
                            if _is_file_of(file.fd, entry):
                                return Borrowed(_reopened(file, flags), entry)
                        except PermissionError as error:
                            if isinstance(error, KernelError):
                                raise
                            pass_on(error)
                            refused = f" ({error.strerror})"
                        finally:
                            file.close()
                except (FileNotFoundError, PermissionError) as error:
                    if isinstance(error, KernelError):
                        raise
                    pass_on(error)
                    gone |= isinstance(error, FileNotFoundError)  # as an exec begins: `still_has` may see the old maps
                    denied |= isinstance(error, PermissionError)
        # Where nothing was denied, something else was there: a file that it has mapped since may have the old number.
        if gone or not (denied or refused) or not self.still_has([entry]):
            raise LookupError(entry)
        takes = " and ".join(["CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE (for /proc/PID/map_files)", *obstacles()])
        why = (
            f"what process {self.pid} has mapped there ({entry.path}) cannot be opened{refused}: it takes {takes}, or "
        )
        raise AccessDenied(None, None, entry.start, why=f"{why}that the process has it open as well, or a name of it")

    def _by_map_files(self, entry: Map) -> Iterator[Descriptor]:
        yield self._open(f"map_files/{entry.start:x}-{entry.end:x}")

    def _by_fd(self, entry: Map) -> Iterator[Descriptor]:
        for number in self._numbers(entry):
            yield self._open(f"fd/{number}")

    def _by_name(self, entry: Map) -> Iterator[Descriptor]:
        for name in {entry.path, entry.path.replace("\\012", "\n")}:  # the one letter that Linux escapes there
            if name.startswith("/"):
                for path in (name, f"root{name}"):  # as we see it, and as the process does
                    with suppress(OSError):
                        yield self._open(path)

    def _by_getfd(self, entry: Map) -> Iterator[Descriptor]:
        from realmap.host.paging import pidfd_getfd  # here: hardly anybody comes this far, and ctypes takes a while

        for number in self._numbers(entry):
            with suppress(OSError):
                yield Descriptor(partial(pidfd_getfd, self._pidfd, number))

    def _numbers(self, entry: Map) -> list[int]:
        """Which of its descriptors may be of that file: by what they are called, which asks no file system."""
        found = []
        for number in os.listdir(f"/proc/{self._proc}/fd"):
            with suppress(FileNotFoundError):
                name = os.readlink(f"fd/{number}", dir_fd=self._folder)
                if name.replace("\n", "\\012") == entry.path:
                    found.append(int(number))
        return found

    def file_system(self, device: str) -> str:
        """What kind of file system is mounted of that device, in its mount namespace. "": none that shows."""
        if device not in self._file_systems:
            with suppress(OSError), open(f"/proc/{self._proc}/mountinfo", errors="replace") as lines:
                for line in lines:
                    before, _, after = line.partition(" - ")
                    major, _, minor = before.split()[2].partition(":")
                    self._file_systems[f"{int(major):02x}:{int(minor):02x}"] = after.split()[0]
                self._file_systems.setdefault(device, "")  # not where they could not be read: it is asked again
        return self._file_systems.get(device, "")

    def _missing(self) -> str:
        """What it takes to look into it that this process has not, by name."""
        lacks = obstacles()
        with suppress(OSError):
            with open(f"/proc/{self._proc}/status", errors="replace") as lines:
                owner = [int(line.split()[1]) for line in lines if line.startswith(("Uid:", "Gid:"))]
            if owner != [os.geteuid(), os.getegid()]:
                lacks.insert(0, "its uid and gid, {} and {}, or CAP_SYS_PTRACE".format(*owner))
            elif not has_capability(CAP_SYS_PTRACE):
                lacks.append("CAP_SYS_PTRACE (it is not dumpable: prctl(2), or has capabilities that this one has not)")
        return " and ".join(lacks) or "rights that this process has not"


def _is_file_of(fd: int, entry: Map) -> bool:
    """Whether it is the file that `entry` shows. InvalidMemState: it is, but no regular one."""
    status = os.fstat(fd)
    if (status.st_dev, status.st_ino) != (procfs.device_number(entry.device), entry.inode):
        return stat.S_ISREG(status.st_mode) and _is_mapped_as(fd, entry)
    if not stat.S_ISREG(status.st_mode):
        raise InvalidMemState(entry.start, MemoryType.IO, why=f"a device is mapped there ({entry.path})")
    return True


def _is_mapped_as(fd: int, entry: Map) -> bool:
    """The same, where what is mapped has other numbers than the file itself (btrfs, overlays): it is mapped to see."""
    from realmap.host import paging  # here, as in `_by_getfd`; and it maps a file that was truncated to nothing, too

    try:
        with Descriptor(partial(os.open, f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)) as own:
            address = paging.map_file(own, PAGE_SIZE)
            try:
                (seen,) = procfs.maps("self", address, address + 1)
            finally:
                paging.unmap(address, PAGE_SIZE)
    except OSError as error:
        pass_on(error)
        if error.errno in (errno.EMFILE, errno.ENFILE):  # that says nothing of the file
            raise
        return False
    return (seen.device, seen.inode) == (entry.device, entry.inode)


def _reopened(file: Descriptor, flags: int) -> Descriptor:
    try:
        return Descriptor(partial(os.open, f"/proc/self/fd/{file.fd}", flags | os.O_CLOEXEC))
    except PermissionError as error:
        pass_on(error)
        if fcntl.fcntl(file.fd, fcntl.F_GETFL) & os.O_PATH:
            raise
        return Descriptor(partial(fcntl.fcntl, file.fd, fcntl.F_DUPFD_CLOEXEC, 0))  # its own: it can be mapped


def _shown_no_more(pid: int) -> str:
    return f"the first thread of process {pid} has ended, or all of it has: Linux shows its memory no more"


def _no_process(pid: int, error: OSError, opened: bool) -> KernelError:
    """Why it could not be pinned; `opened`: there is a process of that pid."""
    if not os.path.exists("/proc/self"):
        return AccessDenied(why="/proc is not mounted here: mount -t proc proc /proc")
    if error.errno in (errno.EACCES, errno.EPERM):
        return AccessDenied(why=f"process {pid} cannot be looked at: {error.strerror} (a sandbox, or hidepid of /proc)")
    if error.errno == errno.ENOENT and opened and os.path.exists("/proc/self/mounts"):
        hidden = [line for line in open("/proc/self/mounts") if line.split()[1] == "/proc" and "hidepid=" in line]
        if hidden:
            return AccessDenied(why=f"process {pid} is hidden from uid {os.geteuid()}: /proc is mounted with hidepid")
    if opened and isinstance(error, ProcessLookupError):  # while it can be pinned
        return InvalidHandle(pid, why=_shown_no_more(pid))
    if error.errno in (errno.ENOENT, errno.ESRCH, errno.EINVAL):
        thread = " of its own: it is a thread of one" if os.path.exists(f"/proc/{pid}/status") else ""
        return InvalidHandle(pid, why=f"there is no process {pid}{thread}")
    return shortage(error, f"process {pid} cannot be looked at")


# ---- what this process may do, whatever process it is about ---------------------------------


def may_open_map_files() -> bool:
    """Whether this process may open what is in /proc/PID/map_files, where it may look at that process at all."""
    for entry in procfs.maps("self"):
        if entry.path.startswith("/"):
            try:
                files.close(os.open(f"/proc/self/map_files/{entry.start:x}-{entry.end:x}", os.O_PATH | os.O_CLOEXEC))
                return True
            except PermissionError as error:
                pass_on(error)
                return False
            except OSError as error:  # it is gone by now, or a part of another one
                pass_on(error)
    return False


def has_capability(number: int) -> bool:
    """Whether it is among those that are in effect."""
    with open("/proc/self/status") as lines:
        found = next((line.split()[1] for line in lines if line.startswith("CapEff:")), "0")
    return bool(int(found, 16) >> number & 1)


def obstacles() -> list[str]:
    """What keeps this process from processes of its own uid, too, in words."""
    found = []
    scope = procfs.setting("/proc/sys/kernel/yama/ptrace_scope")
    if scope not in ("", "0") and not has_capability(CAP_SYS_PTRACE):
        found.append(f"CAP_SYS_PTRACE (sysctl kernel.yama.ptrace_scope is {scope})")
    if procfs.setting("/proc/self/uid_map").split() != ["0", "0", "4294967295"]:
        found.append("the first user namespace (this process is in another one, where capabilities count for less)")
    return found
