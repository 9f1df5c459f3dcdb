"""A program: a storm of making and killing over a /dev/shm of its own, every byte of it explained after each round.

    unshare -m sh -c 'mount -t tmpfs -o size=64m tmpfs /dev/shm; exec python shm_storm.py ROUNDS SEED [UID]'

Children make segments of every kind, hold them by maps or by descriptors alone, unlink them, grow, punch and truncate
them, and are killed. Meanwhile looks are taken; when all are still, `explained` must be `used`, to the byte.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import signal
import sys
import time

from realmap.host.shared_segments import look
from realmap.observe import shm

SHM, PAGE = "/dev/shm", mmap.PAGESIZE
PR_SET_PDEATHSIG, PR_SET_DUMPABLE = 1, 4
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
libc = ctypes.CDLL(None, use_errno=True)


def touch(held: list[object], fd: int, length: int) -> None:
    """A map of it, every page touched: so an ordinary user can tell what only a map holds."""
    window = mmap.mmap(fd, length)
    for at in range(0, length, PAGE):
        window[at] = 1
    held.append(window)


def make(draw: random.Random, held: list[object], name: str) -> None:
    """One segment, held in some way, or by nobody but its name."""
    pages = draw.randrange(1, 12)
    if draw.random() < 0.15:
        fd = os.memfd_create(name[-20:])
        os.ftruncate(fd, pages * PAGE)
        touch(held, fd, pages * PAGE)
        return
    fd = os.open(f"{SHM}/{name}", os.O_CREAT | os.O_RDWR, 0o600)
    how = draw.choice(["posix_fallocate", "write", "sparse", "holes"])
    by_map = draw.random() < 0.5
    if how == "posix_fallocate" or by_map:
        os.posix_fallocate(fd, 0, pages * PAGE)
    elif how == "write":
        os.pwrite(fd, b"x" * draw.randrange(1, pages * PAGE), 0)
    else:
        os.ftruncate(fd, pages * PAGE + 5)
        os.pwrite(fd, b"x", draw.randrange(pages) * PAGE)
    if how == "holes" and not by_map:
        libc.fallocate(fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, ctypes.c_long(0), ctypes.c_long(PAGE))
    if by_map:
        touch(held, fd, pages * PAGE)
        os.close(fd)
    elif draw.random() < 0.8:
        held.append(fd)
    else:
        os.close(fd)
    if draw.random() < 0.5:
        os.unlink(f"{SHM}/{name}")
    elif draw.random() < 0.2:
        os.link(f"{SHM}/{name}", f"{SHM}/{name}.2")


def child(seed: int, ready: int) -> None:
    """Makes segments, says so, and waits for its end."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    draw, held = random.Random(seed), []
    folder = f"folder{seed}/"
    os.mkdir(f"{SHM}/{folder}")
    os.symlink("x" * 300, f"{SHM}/{folder}link")  # too long for an inode: it takes a page
    for number in range(draw.randrange(1, 8)):
        name = draw.choice(["", folder]) + draw.choice(["s", "with\nnew line", "bad\udcff (deleted)"])
        make(draw, held, f"{name}{seed}-{number}")
    os.write(ready, b"x")
    signal.pause()


def clear() -> None:
    """Everything that has a name."""
    for folder, _, names in os.walk(SHM, topdown=False):
        for name in names:
            os.unlink(f"{folder}/{name}")
        if folder != SHM:
            os.rmdir(folder)


def settled(what: str) -> None:
    """Waits until all is explained: Linux gives back a while after a death what the dead held."""
    end = time.monotonic() + 20
    while True:
        found = shm.report(shm.look()).dev_shm
        assert found is not None
        if found.unexplained == 0 and found.explained == found.used:
            return
        assert time.monotonic() < end, f"{what}: {found}"


def start_looking() -> int:
    """A process that looks without end while others come and go."""
    if pid := os.fork():
        return pid
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        while True:
            look()
    finally:
        os._exit(1)


def end(pid: int) -> None:
    """Kills a child that has lived until now."""
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "it had failed"


def main(rounds: int, seed: int, uid: int) -> None:
    if uid:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
        libc.prctl(PR_SET_DUMPABLE, 1)  # else its own /proc is not its to read
    draw, living, most = random.Random(seed), [], 0
    for number in range(rounds):
        looker = start_looking() if number % 10 == 5 else 0
        reader, writer = os.pipe()
        made = []
        for at in range(draw.randrange(1, 5)):
            pid = os.fork()
            if not pid:
                try:
                    child(seed * 1_000_000 + number * 10 + at, writer)
                finally:
                    os._exit(1)
            made.append(pid)
        os.close(writer)
        got = 0
        while got < len(made):
            data = os.read(reader, 10)
            assert data, "a child could not"
            got += len(data)
        os.close(reader)
        living += made
        draw.shuffle(living)
        while len(living) > 6 or (living and draw.random() < 0.4):
            end(living.pop())
        if number % 7 == 6:
            clear()
        if looker:
            end(looker)
        settled(f"round {number} of seed {seed}")
        most = max(most, shm.report(shm.look()).dev_shm.used)  # type: ignore[union-attr]
    for pid in living:
        end(pid)
    clear()
    settled("the end")
    print(f"{rounds} rounds, {most} bytes at the most, all explained")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
