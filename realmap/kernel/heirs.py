"""Who may still come for an inheritance: whoever maps some of it, and is in no books. Looked for, and watched."""

from __future__ import annotations

import contextlib
import os
import time
from functools import partial

from realmap.host import files, liveness, procfs
from realmap.kernel.books import Books
from realmap.kernel.processes import UserProcess
from realmap.memory.frames import SharedFrames
from realmap.memory.lands import OWN_LAND
from realmap.serving.loop import Loop
from realmap.serving.workers import Workers

#: After a search nobody searches for so many times as long as it took, and for so many seconds at most: it takes the
#: interpreter from whoever has the loop.
REST, LONGEST_REST = 10, 1.0
#: Segments by device and inode.
Files = set[tuple[int, int]]


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
        known = {process.pid for process in self._books.processes} | {os.getpid()}

        def look() -> None:
            found: dict[int, tuple[int, Files]] = {}
            try:
                for pid in procfs.who_maps(every, OWN_LAND.start, OWN_LAND.end, known):
                    with contextlib.suppress(OSError):
                        pidfd = os.pidfd_open(pid)
                        # Asked again, now that it cannot be another one: its pid may have been used anew.
                        maps = procfs.which_it_maps(pid, every, OWN_LAND.start, OWN_LAND.end)
                        if not maps or liveness.is_dead(pidfd):
                            files.close(pidfd)
                        else:
                            found[pid] = pidfd, maps
            finally:
                self._loop.post(lambda: self._end_search(has, found))
            time.sleep(min(LONGEST_REST, REST * (time.monotonic() - began)))
            self._loop.post(self._go_on)

        self._searching, began = True, time.monotonic()
        try:
            self._workers.submit(look)
        except RuntimeError:  # no thread: nobody is looked for
            self._end_search(has, {})
            self._searching = False

    def _go_on(self) -> None:
        self._searching = False
        self._start()

    def _end_search(self, has: dict[UserProcess, Files], found: dict[int, tuple[int, Files]]) -> None:
        for dead, its_files in has.items():
            if dead in self._of:  # else the kernel has ended meanwhile
                self._enter(dead, {pid: pidfd for pid, (pidfd, maps) in found.items() if maps & its_files})
        for pidfd, _ in found.values():
            files.close(pidfd)

    def _enter(self, dead: UserProcess, found: dict[int, int]) -> None:
        heirs = self._of[dead]
        for pid, pidfd in found.items():
            with contextlib.suppress(OSError):  # no descriptor is left
                own = os.dup(pidfd)
                try:
                    self._loop.watch(own, partial(self._on_death, dead, pid))
                    heirs[pid] = own
                except OSError:
                    files.close(own)
        if not heirs:
            self._end(dead)

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


def _files_of(dead: UserProcess) -> Files:
    return {
        (segment.device, segment.inode)
        for mapping in dead.memory
        if isinstance(mapping.frames, SharedFrames)
        for segment in mapping.frames.segments
    }
