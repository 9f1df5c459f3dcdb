"""Who may still come for an inheritance: whoever maps some of it that is not in its books. Looked for, and watched."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from functools import partial

from realmap.host import files, procfs
from realmap.kernel.books import Books
from realmap.kernel.processes import UserProcess
from realmap.memory.frames import SharedFrames
from realmap.memory.lands import OWN_LAND
from realmap.serving.loop import Loop
from realmap.serving.workers import Workers

#: After a search nobody searches for so many times as long as it took, and for so many seconds at most: it takes the
#: interpreter from whoever has the loop. After one that Linux had no descriptor or thread for, for as many.
REST, LONGEST_REST = 10, 1.0
#: Segments by device and inode; and what somebody maps of them, with an address each.
Files = set[tuple[int, int]]
Mapped = dict[tuple[int, int], int]


class Heirs:
    """The heirs of each ended process whose memory stays. On the loop, but for the search: one at a time, of all /proc,
    for everybody who has ended by then.
    """

    def __init__(self, books: Books, loop: Loop, workers: Workers) -> None:
        self._books = books
        self._loop = loop
        self._workers = workers
        #: Those that were found: {pid: pidfd}.
        self._of: dict[UserProcess, dict[int, int]] = {}
        #: Those whose heirs the next search looks for, and whether one goes on.
        self._wanted: set[UserProcess] = set()
        self._searching = False
        books.inheritance.came = self._leave

    def search(self, dead: UserProcess) -> None:
        """Looks for them, elsewhere; where there are none, its memory goes."""
        self._of.setdefault(dead, {})
        self._wanted.add(dead)
        self._start()

    def _start(self) -> None:
        if self._searching or not self._wanted:
            return
        wanted, self._wanted = self._wanted, set()
        has = {dead: _files_of(dead) for dead in wanted}
        every: Files = set().union(*has.values())
        known = {process.pid for process in self._books.processes}

        def look() -> None:
            pidfds: dict[int, int] = {}
            maps: dict[int, Mapped] = {}
            rest, is_whole = LONGEST_REST, False
            try:
                for pid in procfs.who_maps(every, OWN_LAND.start, OWN_LAND.end, {os.getpid()}):
                    with contextlib.suppress(ProcessLookupError):
                        if pid not in known:  # who is cannot end unseen
                            pidfds[pid] = os.pidfd_open(pid)
                        # Asked again: the pid may have been used anew. From now on it is this one, or its end is seen.
                        maps[pid] = procfs.which_it_maps(pid, every, OWN_LAND.start, OWN_LAND.end)
                rest, is_whole = min(rest, REST * (time.monotonic() - began)), True
            except Exception:  # no descriptor is left to look with, say
                pass
            self._loop.post(lambda: self._end_search(has, pidfds, maps, is_whole))
            time.sleep(rest)
            self._loop.post(self._go_on)

        self._searching, began = True, time.monotonic()
        try:
            self._workers.submit(look)
        except RuntimeError:  # no thread to look on
            self._wanted |= wanted
            self._loop.after(LONGEST_REST, self._go_on)

    def _go_on(self) -> None:
        self._searching = False
        self._start()

    def _end_search(
        self, has: dict[UserProcess, Files], pidfds: dict[int, int], maps: dict[int, Mapped], is_whole: bool
    ) -> None:
        """`pidfds`: of who was in no books then. `is_whole`: whether nobody can have been missed."""
        inside: dict[int, list[UserProcess]] = {}
        for process in self._books.processes:
            inside.setdefault(process.pid, []).append(process)
        for dead, its_files in has.items():
            heirs = self._of.get(dead)
            if heirs is None:  # the kernel has ended meanwhile
                continue
            found = [
                pid
                for pid, mapped in maps.items()
                if any(
                    not _is_its_own(pid, inside.get(pid, ()), pid not in pidfds, each, mapped[each])
                    for each in its_files & mapped.keys()
                )
            ]
            for pid in found:
                with contextlib.suppress(OSError):  # no descriptor is left
                    own = os.dup(pidfds[pid]) if pid in pidfds else os.pidfd_open(pid)
                    try:
                        self._loop.watch(own, partial(self._on_death, dead, pid))
                        heirs[pid] = own
                    except OSError:
                        files.close(own)
            if not heirs and (found or not is_whole):
                self._wanted.add(dead)
            elif not heirs:
                self._end(dead)
        for pidfd in pidfds.values():
            files.close(pidfd)

    def _on_death(self, dead: UserProcess, pid: int, _: int) -> None:
        self._leave(dead, pid)

    def _leave(self, dead: UserProcess, pid: int) -> None:
        """An heir has died, or adopted what it wants. Forks of its own may be left, so it is looked again."""
        heirs = self._of[dead]
        pidfd = heirs.pop(pid, None)
        if pidfd is not None:
            self._loop.unwatch(pidfd)
            files.close(pidfd)
            if not heirs:
                self.search(dead)

    def _end(self, dead: UserProcess) -> None:
        del self._of[dead]
        self._books.inheritance.end(dead)
        if self._books.observer is not None:
            self._books.observer.reaped(dead)

    @property
    def searches(self) -> int:
        """How many ended processes it is being searched for, whose heirs are not known yet."""
        return sum(not heirs for heirs in self._of.values())

    def after_fork_in_child(self) -> None:
        for heirs in self._of.values():
            for pidfd in heirs.values():
                files.close(pidfd)
        self._of.clear()

    def clear(self) -> None:
        self._wanted.clear()
        for dead, heirs in list(self._of.items()):
            for pidfd in heirs.values():
                files.close(pidfd)
            self._end(dead)


def _is_its_own(pid: int, inside: Sequence[UserProcess], known: bool, file: tuple[int, int], address: int) -> bool:
    """Whether it has that by its own books: attached, adopted, parked. Or, if it was `known` at the look, no more.

    Who unmaps tells of it later, or has left meanwhile.
    """
    if not all(process.memory.is_vacant(address, 1) for process in inside):
        return True
    try:
        return known and not procfs.which_it_maps(pid, {file}, address, address + 1)
    except OSError:  # no descriptor is left to look with
        return False


def _files_of(dead: UserProcess) -> Files:
    return {
        (segment.device, segment.inode)
        for mapping in dead.memory
        if isinstance(mapping.frames, SharedFrames)
        for segment in mapping.frames.segments
    }
