"""Takes memory away under live mirrors: the kernel lives on, and says so wherever something was touched.

truncate   a segment gets shorter while a mirror of it lives; what is touched then is a MemoryFault
regrow     it gets shorter, and long again before anybody looks: zeros, and no fault
punch      a hole is punched into it: zeros there, everything else as it was, and no fault
full       a page that was never committed is touched when /dev/shm is full: a MemoryFault
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

import realmap
from realmap import Call, MemoryFault, UserBuffer
from realmap.memory import SharedFrames

PAGE = realmap.PAGE_SIZE
KEEP_SIZE_PUNCH_HOLE = 3
INSIDE = "REALMAP_FAULTS_FULL"
#: Of /dev/shm, where it is to be full: bytes.
SMALL = 4 << 20

_kept: dict[str, Any] = {}
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


@realmap.syscall
def begin(call: Call, data: UserBuffer) -> list[int]:
    """Mirrors it, and keeps a view of the mirror; where the segment can be opened: the kernel's pid, the descriptor."""
    frames = data.mappings[0].frames
    assert isinstance(frames, SharedFrames)
    _kept["mirror"] = data.mirror()
    _kept["view"] = memoryview(_kept["mirror"])
    return [os.getpid(), frames.segments[0].fd]


@realmap.syscall
def touch(call: Call) -> list[int]:
    """Reads the first byte of every page of the mirror."""
    return list(_kept["view"][::PAGE])


@realmap.syscall(blocking=True)
def touch_beside(call: Call) -> list[int]:
    """The same on a worker thread."""
    return list(_kept["view"][::PAGE])


@realmap.syscall
def end(call: Call) -> bool:
    """Drops the mirror; whether it had a fault."""
    _kept.pop("view").release()
    try:
        _kept.pop("mirror").drop()
    except MemoryFault:
        return True
    return False


def require(holds: object, what: str) -> None:
    """SystemExit where something does not hold: these checks stay under -O, too."""
    if not holds:
        raise SystemExit(f"failed: {what}")


class Round:
    """One buffer, mirrored, and what is done to it behind everybody's back."""

    def __init__(self, me: realmap.Process, rng: random.Random) -> None:
        self.me = me
        self.rng = rng
        self.name = rng.choice(["touch", "touch_beside"])

    def _opened(self, buffer: realmap.Buffer) -> int:
        pid, fd = self.me.call("begin", buffer)
        return os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR)

    def truncate(self) -> None:
        """Reported exactly where it begins."""
        pages = self.rng.randrange(1, 64)
        with self.me.map(pages * PAGE) as buffer:
            buffer[:] = b"\1" * len(buffer)
            fd = self._opened(buffer)
            size = self.rng.randrange(pages * PAGE)
            os.ftruncate(fd, size)
            os.close(fd)
            there = -(-size // PAGE)
            if there == pages:  # the last page is there still, cut short: nothing is missing
                require(self.me.call(self.name) == [1] * pages, "pages that are there were read")
                require(not self.me.call("end"), "no fault where nothing is missing")
                return
            try:
                self.me.call(self.name)
            except MemoryFault as error:
                require(error.address == buffer.address + there * PAGE, f"the fault is at page {there}: {error}")
            else:
                require(False, "a truncation that was touched was reported")
            require(self.me.call("end"), "the mirror knew of it")

    def regrow(self) -> None:
        """Nothing to report."""
        pages = self.rng.randrange(1, 64)
        with self.me.map(pages * PAGE) as buffer:
            buffer[:] = b"\1" * len(buffer)
            fd = self._opened(buffer)
            there = self.rng.randrange(pages)
            os.ftruncate(fd, there * PAGE)
            os.ftruncate(fd, pages * PAGE)
            os.close(fd)
            require(self.me.call(self.name) == [1] * there + [0] * (pages - there), "zeros behind a shrink undone")
            require(not self.me.call("end"), "no fault for a shrink undone")

    def punch(self) -> None:
        """Nothing to report either."""
        pages = self.rng.randrange(1, 64)
        with self.me.map(pages * PAGE) as buffer:
            buffer[:] = b"\1" * len(buffer)
            fd = self._opened(buffer)
            start = self.rng.randrange(pages)
            count = self.rng.randrange(1, pages - start + 1)
            require(
                not _libc.fallocate(fd, KEEP_SIZE_PUNCH_HOLE, start * PAGE, count * PAGE), "a hole can be punched here"
            )
            os.close(fd)
            wanted = [0 if start <= page < start + count else 1 for page in range(pages)]
            require(self.me.call(self.name) == wanted, "zeros in a hole, and nowhere else")
            require(not self.me.call("end"), "no fault for a hole")

    def full(self) -> None:
        """/dev/shm is full but for a few pages: they are there, and the first one beyond is reported."""
        room = os.statvfs("/dev/shm")
        left = self.rng.randrange(4)
        filler = self.me.map((room.f_bavail - left) * PAGE)
        with self.me.map(16 * PAGE, commit=False) as buffer:
            os.close(self._opened(buffer))
            try:
                self.me.call(self.name)
            except MemoryFault as error:
                require((error.address - buffer.address) // PAGE <= left, f"the fault is behind {left} pages: {error}")
            else:
                require(False, "a page that was not to be had was reported")
            require(self.me.call("end"), "the mirror knew of it")
        filler.unmap()


def run(kinds: list[str], count: int, seed: int, say: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """`count` rounds of each kind on one kernel. SystemExit: something did not hold."""
    found = {}
    with realmap.boot(syscalls=[begin, touch, touch_beside, end]) as kernel, kernel.connect() as me:
        before = kernel.stats()
        for kind in kinds:
            began = time.monotonic()
            for number in range(count):
                getattr(Round(me, random.Random(f"{seed}/{kind}/{number}")), kind)()
            seconds = time.monotonic() - began
            found[kind] = {"rounds": count, "seconds": seconds}
            say(f"{kind}: {count} rounds in {seconds:.1f} s")
        report = kernel.audit()
        require(report, f"the books equal Linux: {report}")
        after = kernel.stats()
        for stats in (before, after):
            stats["descriptors"] -= stats["stock"]
        for name in ("processes", "mappings", "mirrors", "segments", "bytes", "descriptors"):
            require(after[name] == before[name], f"{name} as before: {before[name]} and {after[name]}")
    return found


def in_small_shm() -> None:
    """Starts anew with a /dev/shm that is small and nobody else's."""
    unshare = shutil.which("unshare")
    require(unshare, "`full` needs unshare (util-linux)")
    assert unshare is not None
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    shell = f'mount -t tmpfs -o size={SMALL} realmap /dev/shm && exec "$@"'
    os.environ[INSIDE] = "1"
    os.execv(unshare, [unshare, *as_root, "--mount", "sh", "-c", shell, "sh", sys.executable, *sys.argv])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", choices=["truncate", "regrow", "punch", "full", []], help="all by default")
    parser.add_argument("--count", type=int, default=500, help="rounds of each (the full count is 10000)")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--json", metavar="FILE")
    asked = parser.parse_args()
    kinds = asked.kinds or ["truncate", "regrow", "punch", "full"]
    if "full" in kinds and INSIDE not in os.environ:
        in_small_shm()
    print(f"tools/faults {' '.join(kinds)} --count {asked.count} --seed {asked.seed}", flush=True)
    found = run(kinds, asked.count, asked.seed, lambda line: print(line, flush=True))
    if asked.json:
        with open(asked.json, "w") as file:
            json.dump(found, file)
    print("ok: the kernel lives, everything that was touched was reported, nothing is left")


if __name__ == "__main__":
    main()
