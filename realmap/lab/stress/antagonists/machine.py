"""Antagonists that have the machine move pages by itself: compaction, NUMA, a memory cgroup, KSM."""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import time
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

from realmap.host import files, paging
from realmap.host.procfs import maps
from realmap.lab.stress.actor import WrongBytes
from realmap.lab.stress.antagonists.antagonist import Antagonist, InCgroup, OnUsers, Target
from realmap.lab.stress.board import Held
from realmap.lab.workload import pattern
from realmap.memory.lands import USER_LAND
from realmap.pages import PAGE_SIZE

COMPACT = Path("/proc/sys/vm/compact_memory")
NODES = Path("/sys/devices/system/node")
KSM = Path("/sys/kernel/mm/ksm")


class Compaction(Antagonist):
    """Has Linux compact all of memory: pages that are mapped move to other frames."""

    name = "compaction"
    rest = 0.5

    def available(self) -> str | None:
        """Whether it can be asked for. (That is no setting: it is done, and over.)"""
        if not COMPACT.exists():
            return "Linux has no compaction here: needs CONFIG_COMPACTION"
        return None if os.access(COMPACT, os.W_OK) else f"{COMPACT} cannot be written to: be root"

    def step(self, rng: random.Random) -> bool:
        COMPACT.write_text("1")
        return True


class Numa(OnUsers):
    """Moves users' pages from one NUMA node to another."""

    name = "numa"
    rest = 0.02

    def available(self) -> str | None:
        """Whether there are several nodes, and pages may be moved."""
        self._nodes = _nodes_with_memory()
        if len(self._nodes) < 2:
            return "one NUMA node only: boot Linux with numa=fake=2 (x86), or a virtual machine with two nodes"
        try:
            paging.move_pages(self.target.kernel, [], self._nodes[0])
        except OSError as error:
            return f"move_pages says {error.strerror}: be root (CAP_SYS_NICE), under Linux with CONFIG_MIGRATION"
        return None

    def work_on(self, user: Held, rng: random.Random) -> bool:
        entries = maps(user.pid, USER_LAND.start, USER_LAND.end)
        if not entries:
            return False
        entry = rng.choice(entries)
        places = list(range(entry.start, entry.end, PAGE_SIZE))[:256]
        return any(node >= 0 for node in paging.move_pages(user.pid, places, rng.choice(self._nodes)))


class Reclaim(InCgroup):
    """Has Linux reclaim what users (and a kernel of the run's own) take, in a memory cgroup of theirs."""

    name = "reclaim"
    rest = 0.02

    def begin(self, rng: random.Random) -> None:
        if self.target.own:  # who takes the space of frames is who they are counted for
            self.group.enter(self.target.kernel)

    def step(self, rng: random.Random) -> bool:
        with self.target.board.held(rng) as user, suppress(ProcessLookupError):
            if user is not None and not self.target.board.is_doomed(user.user, user.pid):
                self.group.enter(user.pid)
        self.group.reclaim(rng.randint(1, 64) << 20)
        return True


class Ksm(Antagonist):
    """Lets Linux merge private copies of the same bytes, and writes to them."""

    name = "ksm"
    COPIES, LENGTH = 4, 64 * PAGE_SIZE
    #: Its settings meanwhile. What they were is put back in the other order.
    FASTER: ClassVar = {"pages_to_scan": 4000, "sleep_millisecs": 20, "run": 1}

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self._lock = -1
        self._before: dict[str, str] = {}

    def available(self) -> str | None:
        """Notes its settings; another run must not change them meanwhile."""
        try:
            self._lock = os.open(KSM / "run", os.O_RDWR | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._before = {name: (KSM / name).read_text() for name in self.FASTER}
        except FileNotFoundError:
            return "Linux has no KSM here: needs CONFIG_KSM"
        except PermissionError:
            return f"{KSM} cannot be written to: be root"
        except BlockingIOError:
            return "another run uses KSM now: wait for its end"
        return None

    def begin(self, rng: random.Random) -> None:
        for name, value in self.FASTER.items():
            (KSM / name).write_text(str(value))
        data = pattern(rng.getrandbits(32), self.LENGTH)
        self._expected = [bytearray(data) for _ in range(self.COPIES)]
        self._copies = [mmap.mmap(-1, self.LENGTH, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(self.COPIES)]
        for copy in self._copies:
            copy.madvise(mmap.MADV_MERGEABLE)
            copy[:] = data

    def step(self, rng: random.Random) -> bool:
        time.sleep(rng.random() / 50)  # the scanner may come by
        number = rng.randrange(self.COPIES)
        copy, expected = self._copies[number], self._expected[number]
        place = rng.randrange(self.LENGTH)
        copy[place] = expected[place] = rng.randrange(256)
        if not rng.randrange(8):  # they are the same again
            for copy, expected in zip(self._copies, self._expected, strict=True):
                copy[:] = expected[:] = bytes(self._expected[number])
        for which, (copy, expected) in enumerate(zip(self._copies, self._expected, strict=True)):
            if copy[:] != expected:
                raise WrongBytes(f"wrong bytes in private copy {which} after {number} was written to")
        return True

    def close(self) -> None:
        while self._before:
            name, value = self._before.popitem()
            (KSM / name).write_text(value)
        if self._lock >= 0:
            files.close(self._lock)
            self._lock = -1


def _nodes_with_memory() -> list[int]:
    text = ""
    with suppress(FileNotFoundError):
        text = (NODES / "has_memory").read_text().strip()
    nodes: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        nodes += range(int(first), int(last or first) + 1)
    return nodes
