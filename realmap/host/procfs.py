"""What /proc says, read as it stands: maps by inode and offset, start times, page frame numbers.

psutil reports neither the offset nor the inode of a map, and rounds start times; the rest of what
realmap asks of /proc goes through psutil.
"""

from __future__ import annotations

import errno
import os
import re
import struct
import threading
import time
from collections.abc import Container
from typing import NamedTuple

from realmap._core import read_file
from realmap.pages import PAGE_SIZE
from realmap.rights import letters


class Map(NamedTuple):
    """One line of /proc/PID/maps. Addresses and offsets in bytes; the range is half-open."""

    start: int
    end: int
    perms: str
    offset: int
    device: str
    inode: int
    path: str

    @property
    def length(self) -> int:
        return self.end - self.start


def maps(pid: int | str = "self", low: int = 0, high: int = 1 << 64) -> list[Map]:
    """The maps of `pid` that touch [low, high), in order of address.

    ProcessLookupError: no such process (also one that died and is not reaped yet: it has no maps).
    """
    found = []
    try:
        with open(f"/proc/{pid}/maps", errors="surrogateescape", newline="\n") as lines:  # a name may hold a \r
            for line in lines:
                entry = _map_of(line)
                if entry.start >= high:  # they come in order: the lands lie below whatever Linux maps by itself
                    break
                if entry.end > low:
                    found.append(entry)
    except FileNotFoundError:
        raise ProcessLookupError(f"no process {pid}") from None
    return found


def _map_of(line: str) -> Map:
    bounds, perms, offset, device, inode, *path = line.split(maxsplit=5)
    start, _, end = bounds.partition("-")
    place = path[0].removesuffix("\n") if path else ""
    return Map(int(start, 16), int(end, 16), perms, int(offset, 16), device, int(inode), place)


#: What the core's `map_at` gives of a map.
_FOUND = struct.Struct("=6Q2I")


def is_that(found: bytes, entry: Map) -> bool:
    """Whether what `map_at` has found is `entry`; their names are not compared."""
    start, end, flags, _, offset, inode, major, minor = _FOUND.unpack(found)
    return entry[:6] == (start, end, letters(flags) + "ps"[flags >> 3 & 1], offset, f"{major:02x}:{minor:02x}", inode)


def setting(path: str) -> str:
    """What a file of /proc or /sys says; of choices (`always [madvise] never`) the one that holds. "": not shown."""
    try:
        with open(path) as file:
            text = file.read().strip()
    except OSError:
        return ""
    return text.partition("[")[2].partition("]")[0] or text


def map_limit() -> int:
    """How many maps Linux allows a process (vm.max_map_count); its default where that is not shown."""
    return int(setting("/proc/sys/vm/max_map_count") or 65_530)


class Resident(NamedTuple):
    """A map with its bytes in memory, and how many of these others map, too (as /proc/PID/smaps counts them)."""

    map: Map
    resident: int
    shared: int


def smaps(pid: int | str, low: int = 0, high: int = 1 << 64) -> list[Resident]:
    """The maps of `pid` that touch [low, high) as /proc/PID/smaps has them. (psutil leaves offset and inode out.)

    ProcessLookupError: as `maps`. PermissionError: it is not ours to look at.
    """
    found: list[Resident] = []
    try:
        with open(f"/proc/{pid}/smaps", errors="surrogateescape", newline="\n") as lines:
            entry, amounts = None, {"Rss": 0, "Shared_Clean": 0, "Shared_Dirty": 0}
            for line in lines:
                key, colon, rest = line.partition(":")
                if colon and key in amounts:
                    amounts[key] = int(rest.split()[0]) * 1024
                elif colon and key == "VmFlags" and entry is not None:  # the last line of each
                    if entry.end > low:
                        shared = amounts["Shared_Clean"] + amounts["Shared_Dirty"]
                        found.append(Resident(entry, amounts["Rss"], shared))
                elif "-" in key.split(" ")[0]:  # a map's own line: only that begins with a range of addresses
                    entry = _map_of(line)
                    if entry.start >= high:
                        break
    except FileNotFoundError:
        raise ProcessLookupError(f"no process {pid}") from None
    return found


def process_maps(pid: int, low: int, high: int) -> list[Map]:
    """As `maps`, also of a process whose first thread has ended."""
    found = maps(pid, low, high)
    return maps(thread, low, high) if not found and (thread := shown_by(pid)) != pid else found


def which_it_maps(pid: int, files: Container[tuple[int, int]], low: int, high: int) -> dict[tuple[int, int], int]:
    """Those of `files` (device, inode) that `pid` maps within [low, high), with the last address of each. None where it
    is gone, or not ours.
    """
    try:
        entries = process_maps(pid, low, high)
    except (ProcessLookupError, PermissionError):
        return {}
    mapped = {(device_number(entry.device), entry.inode): entry.start for entry in entries if entry.inode}
    return {each: address for each, address in mapped.items() if each in files}


def device_number(text: str) -> int:
    """The device that /proc writes as MAJOR:MINOR, in hex."""
    major, _, minor = text.partition(":")
    return os.makedev(int(major, 16), int(minor, 16))


def pids() -> list[int]:
    """Of all processes that /proc shows, in order; none where there is no /proc."""
    try:
        return sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
    except FileNotFoundError:
        return []


def who_maps(files: Container[tuple[int, int]], low: int, high: int, known: Container[int]) -> list[int]:
    """The pids, but for `known` ones, that map one of `files` (device, inode) within [low, high)."""
    return [pid for pid in pids() if pid not in known and which_it_maps(pid, files, low, high)]


def obstacle(address: int, length: int) -> tuple[int, int]:
    """The hull (start, end) of what this process has mapped in [address, address + length); (0, 0) if nothing is, or
    no descriptor is left to look with."""
    try:
        inside = maps("self", address, address + length)
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise
        inside = []
    return (inside[0].start, inside[-1].end) if inside else (0, 0)


def start_time(pid: int) -> int:
    """When the process started, in clock ticks since boot: pid and start time name a process for good.

    ProcessLookupError: there is no such process, or it has ended and only waits to be reaped.
    """
    return int(_stat(pid)[19])


def started(pid: int) -> float:
    """When the process started, in seconds since 1970. ProcessLookupError: as `start_time`."""
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return booted + start_time(pid) / os.sysconf("SC_CLK_TCK")


def inner_pids() -> set[int]:
    """Every number that some process has as its pid, in this pid namespace or in one inside of it."""
    found: set[int] = set()
    for pid in pids():
        try:
            status = read_file(b"/proc/%d/status" % pid, 4096)
        except OSError:
            continue
        line = re.search(rb"^NSpid:(.*)$", status, re.MULTILINE)
        found.update([pid] if line is None else map(int, line[1].split()))
    return found


#: include/linux/sched.h: it is on its way through exit; it was forked, and runs no program of its own yet; it is a
#: thread of Linux itself.
PF_EXITING, PF_FORKNOEXEC, PF_KTHREAD = 4, 0x40, 0x20_0000


def is_exiting(pid: int | str) -> bool:
    """Whether it, or its first thread, has ended, or is about to: /proc shows nothing more of what it has."""
    try:
        return bool(int(_stat(pid)[6]) & PF_EXITING)
    except ProcessLookupError:
        return True


def is_dying(pid: int) -> bool:
    """Whether it is on its way through exit: its memory is gone, its files may not be; nobody can wait for it yet."""
    try:
        return bool(int(_stat(shown_by(pid))[6]) & PF_EXITING)
    except ProcessLookupError:
        return False


def is_kernel_thread(pid: int | str) -> bool:
    """Whether it is a thread of Linux itself, without memory of its own. ProcessLookupError: as `start_time`."""
    return bool(int(_stat(pid)[6]) & PF_KTHREAD)


def forked_by(pid: int | str) -> int:
    """Its parent, of which it may have all of its memory (vfork(2)); 0: it runs a program of its own.

    ProcessLookupError: as `start_time`.
    """
    found = _stat(pid)
    return int(found[1]) if int(found[6]) & PF_FORKNOEXEC else 0


def shown_by(pid: int) -> int:
    """The thread by which /proc shows what a process has: its first, or, where that has ended, another one.

    ProcessLookupError: there is no such process.
    """
    if not is_exiting(pid):
        return pid
    try:
        return next((thread for thread in map(int, os.listdir(f"/proc/{pid}/task")) if thread != pid), pid)
    except FileNotFoundError:
        raise ProcessLookupError(f"no process {pid}") from None


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped it. ProcessLookupError: as `start_time`."""
    return _stat(pid)[0] == b"T"


def user_time(pid: int) -> float:
    """Seconds that its threads have had a CPU, but for what Linux itself did for them there.

    ProcessLookupError: as `start_time`.
    """
    return int(_stat(pid)[11]) / os.sysconf("SC_CLK_TCK")


def would_run(pid: int) -> bool:
    """Whether a thread of it has a CPU, waits for one, or is kept within Linux.

    OSError: it has ended, or a thread of it, meanwhile.
    """
    return not {b"R", b"D"}.isdisjoint(_states(pid))


def is_at_rest(pid: int) -> bool:
    """Whether all its threads but the one that asks wait: none would run, or is stopped. OSError: as `would_run`."""
    return _states(pid, str(threading.get_native_id())) <= {b"S", b"I", b"Z", b"X"}


def _states(pid: int, but: str = "") -> set[bytes]:
    """Of its threads, without one (proc_pid_stat(5): state)."""
    return {_stat(f"{pid}/task/{thread}")[0] for thread in os.listdir(f"/proc/{pid}/task") if thread != but}


def program(pid: int) -> str:
    """The name of what runs as `pid`, bytes that are no text as escapes. ProcessLookupError: it has ended.

    What Linux calls it (a spawned process is called by its function); for Python, the script.
    """
    name = os.fsencode(comm(pid))
    try:
        command = read_file(b"/proc/%d/cmdline" % pid, 4096).split(b"\0")[:-1]
    except OSError:  # it has ended meanwhile, or is not ours to look at
        command = []
    if name.startswith(b"python"):
        name = _script(command) or name
    elif len(name) == 15 and command and (whole := os.path.basename(command[0])).startswith(name):
        name = whole  # Linux keeps no more
    return name.decode("utf-8", "backslashreplace")


def comm(pid: int) -> str:
    """What Linux calls it, at most 15 bytes. ProcessLookupError: it has ended."""
    text = _stat_line(pid)
    return os.fsdecode(text[text.index(b"(") + 1 : text.rindex(b")")])


def _script(command: list[bytes]) -> bytes:
    """The script or the module of Python's command line; b"" where there is none."""
    words = iter(command[1:])
    for word in words:
        if word == b"-m":
            return next(words, b"")
        if not word.startswith(b"-"):
            return os.path.basename(word)
        if word in (b"-W", b"-X"):
            next(words, None)
        elif word in (b"-c", b"-"):
            break
    return b""


def _stat_line(pid: int | str) -> bytes:
    """All of /proc/PID/stat. ProcessLookupError: it has ended."""
    try:
        text = read_file(f"/proc/{pid}/stat".encode(), 4096)
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(f"no process {pid}") from None
    # The name in parentheses may hold spaces and parentheses of its own: count from the last one.
    state, *fields = text[text.rindex(b")") + 2 :].split(None, 18)
    threads = fields[16]  # where there are others, only the first one has ended
    if state in (b"Z", b"X") and int(threads) < 2:
        raise ProcessLookupError(f"process {pid} has ended")
    return text


def _stat(pid: int | str) -> list[bytes]:
    """/proc/PID/stat from the state on (proc_pid_stat(5): field 3 is the first). ProcessLookupError: it has ended."""
    text = _stat_line(pid)
    return text[text.rindex(b")") + 2 :].split()


def pid_namespace() -> int:
    """The inode of this process's pid namespace: pids only mean something within it."""
    return os.stat("/proc/self/ns/pid").st_ino


def address_bits() -> int:
    """How many bits of address space user processes have here, as the highest map of this one shows."""
    return max(entry.end for entry in maps("self") if entry.end < 1 << 63).bit_length()


def frame_number(pid: int, address: int) -> int | None:
    """The page frame number behind `address` of `pid`; None where Linux does not tell (not root, or not present).

    From /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst): bit 63 present, bits 0-54 the frame.
    """
    try:
        with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as file:
            (entry,) = struct.unpack("=Q", os.pread(file.fileno(), 8, address // PAGE_SIZE * 8))
    except (OSError, struct.error):
        return None
    return (entry & ((1 << 55) - 1)) or None if entry >> 63 else None
