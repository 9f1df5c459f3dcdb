"""Antagonists that work on page tables and frames: huge pages, reclaim, holes, other windows onto the same frames."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
from contextlib import suppress

from realmap.host import SHM, files, paging
from realmap.host.procfs import maps, setting
from realmap.lab.stress.actor import WrongBytes
from realmap.lab.stress.antagonists.antagonist import Antagonist, Bytes, within
from realmap.memory.lands import KERNEL_LAND, USER_LAND
from realmap.pages import HUGE_SIZE, PAGE_SIZE
from realmap.user.windows import open_segment

#: What Linux answers where pages are busy, gone, or not of the kind: nothing was done, and nothing is wrong.
PASSING = (errno.EAGAIN, errno.EBUSY, errno.ENOMEM, errno.EINVAL, errno.EFAULT)
SHM_HUGE = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"


class Collapse(Antagonist):
    """Makes huge pages of its own ones, beside a mirror that the kernel keeps, and splits them again."""

    name = "collapse"

    def available(self) -> str | None:
        """Tries it on private memory: that lies right for it anywhere."""
        if setting(SHM_HUGE) == "deny":
            return f"huge pages of shared memory are denied: echo advise > {SHM_HUGE}"
        with mmap.mmap(-1, 2 * HUGE_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            memory.write(b"\1" * len(memory))
            address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            try:
                paging.advise(-(-address // HUGE_SIZE) * HUGE_SIZE, HUGE_SIZE, paging.MADV_COLLAPSE)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    return "no MADV_COLLAPSE here: needs Linux 6.1 or newer with CONFIG_TRANSPARENT_HUGEPAGE"
        return None

    def begin(self, rng: random.Random) -> None:
        self._bytes = Bytes(self.target, 3 * HUGE_SIZE + 3333, rng)
        self._bytes.keep(1)

    def step(self, rng: random.Random) -> bool:
        own = self._bytes
        offset = rng.randrange(3) * HUGE_SIZE
        address = own.buffer.address + offset
        try:
            paging.advise(address, HUGE_SIZE, paging.MADV_COLLAPSE)
        except OSError as error:
            if error.errno not in PASSING:
                raise
            return False
        place, length = within(offset, offset + HUGE_SIZE, rng, 16)
        own.check("a collapse", place, length)
        if rng.randrange(2):  # the huge page itself is split by a hole in it
            paging.advise(own.buffer.address + place, length, mmap.MADV_REMOVE)
            own.fill(place, length, rng)
        else:  # and only how it is mapped here, by other rights for a part
            paging.protect(own.buffer.address + place, length, mmap.PROT_READ)
            paging.protect(own.buffer.address + place, length, mmap.PROT_READ | mmap.PROT_WRITE)
        own.check("a split", offset, HUGE_SIZE)
        if not rng.randrange(16):
            own.drop(1, "collapses and splits")
            own.keep(1)
        return True


class PageOut(Antagonist):
    """Tells Linux that users' pages, the kernel's mirrors and its own are cold, or to be paged out."""

    name = "pageout"

    def available(self) -> str | None:
        """Asks for a page that is not mapped: what matters is which way Linux refuses."""
        pidfd = os.pidfd_open(self.target.kernel)
        try:
            paging.advise_process(pidfd, KERNEL_LAND.end - PAGE_SIZE, PAGE_SIZE, paging.MADV_COLD)
        except PermissionError:
            return (
                "process_madvise is not allowed: needs CAP_SYS_NICE (be root, or setcap cap_sys_nice,cap_sys_ptrace+ep)"
            )
        except OSError as error:
            if error.errno == errno.ENOSYS:
                return "no process_madvise here: needs Linux 5.10 or newer with CONFIG_ADVISE_SYSCALLS"
        finally:
            files.close(pidfd)
        return None

    def begin(self, rng: random.Random) -> None:
        self._bytes = Bytes(self.target, (1 << 20) + 3333, rng)
        self._kernel = os.pidfd_open(self.target.kernel)

    def step(self, rng: random.Random) -> bool:
        advice = rng.choice((paging.MADV_COLD, paging.MADV_PAGEOUT))
        whose = rng.randrange(4)
        if not whose:
            offset, length = self._bytes.range(rng)
            paging.advise(self._bytes.buffer.address + offset, length, advice)
            self._bytes.check("paging out", offset, length)
            return True
        if whose == 1:
            return self._advise(self._kernel, self.target.kernel, KERNEL_LAND.start, KERNEL_LAND.end, advice, rng)
        with self.target.board.held(rng) as user:
            if user is None:
                return False
            return self._advise(user.pidfd, user.pid, USER_LAND.start, USER_LAND.end, advice, rng)

    def _advise(self, pidfd: int, pid: int, low: int, high: int, advice: int, rng: random.Random) -> bool:
        try:
            found = [entry for entry in maps(pid, low, high) if entry.path.startswith(SHM)]
            if not found:
                return False
            entry = rng.choice(found)
            return paging.advise_process(pidfd, *within(entry.start, entry.end, rng, 256), advice) > 0
        except ProcessLookupError:
            return False
        except OSError as error:
            if error.errno not in PASSING:
                raise
            return False


class Holes(Antagonist):
    """Punches holes into its own pages, which must be zero then, everywhere, and fills them again."""

    name = "holes"

    def begin(self, rng: random.Random) -> None:
        self._bytes = Bytes(self.target, (1 << 20) + 3333, rng)
        self._bytes.keep(1)

    def step(self, rng: random.Random) -> bool:
        own = self._bytes
        offset, length = own.range(rng)
        paging.advise(own.buffer.address + offset, length, mmap.MADV_REMOVE)
        own.expected[offset : offset + length] = bytes(length)
        own.check("a hole", offset, length)
        if rng.randrange(4):
            own.fill(offset, length, rng)
            own.check("a hole was filled")
        if not rng.randrange(16):
            own.drop(1, "holes")
            own.keep(1)
        return True


class Windows(Antagonist):
    """Maps users' frames and its own a second time, and locks, protects, moves, shrinks and stretches these windows."""

    name = "windows"

    def available(self) -> str | None:
        """Whether the kernel's descriptors can be opened."""
        try:
            os.listdir(f"/proc/{self.target.kernel}/fd")
        except PermissionError:
            return "the kernel's descriptors cannot be opened: be its user, or root"
        return None

    def begin(self, rng: random.Random) -> None:
        self._bytes = Bytes(self.target, 64 * PAGE_SIZE, rng)
        self._segment = open_segment(self._bytes.buffer)

    def step(self, rng: random.Random) -> bool:
        if not rng.randrange(3):
            self._work(self._segment, 64 * PAGE_SIZE, rng, own=True)
            return True
        folder = f"/proc/{self.target.kernel}/fd"
        fd = -1
        with suppress(FileNotFoundError, ProcessLookupError):  # it closes them all the time
            places = [f"{folder}/{name}" for name in os.listdir(folder)]
            segments = [place for place in places if _is_segment(place)]
            fd = os.open(rng.choice(segments), os.O_RDONLY | os.O_CLOEXEC) if segments else -1
        if fd < 0:
            return False
        try:
            length = os.fstat(fd).st_size // PAGE_SIZE * PAGE_SIZE
            if not length or not _is_segment(f"/proc/self/fd/{fd}"):
                return False
            self._work(fd, min(length, 64 * PAGE_SIZE), rng, own=False)
            return True
        finally:
            files.close(fd)

    def _work(self, fd: int, length: int, rng: random.Random, *, own: bool) -> None:
        """Only its own frames are read: from others a user may have cut off the end."""
        size = length
        address = paging.map_file(fd, size)
        try:
            for _ in range(rng.randint(2, 8)):
                place, part = within(address, address + size, rng, 64)
                what = rng.choice(("lock", "protect", "move"))
                if what == "lock":
                    with suppress(OSError):  # what a user has truncated cannot be, nor more than `ulimit -l`
                        paging.lock(place, part)
                        paging.unlock(place, part)
                elif what == "protect":
                    paging.protect(place, part, paging.PROT_NONE)
                    paging.protect(place, part, mmap.PROT_READ)
                else:
                    new = rng.randint(1, length // PAGE_SIZE) * PAGE_SIZE
                    address = paging.move(address, size, new)
                    size = new
                if own and ctypes.string_at(address, size) != self._bytes.expected[:size]:
                    raise WrongBytes(f"wrong bytes in a window of its own after {what}")
        finally:
            paging.unmap(address, size)


def _is_segment(link: str) -> bool:
    try:
        return os.readlink(link).startswith(f"{SHM}/")
    except FileNotFoundError:
        return False
