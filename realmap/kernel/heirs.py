"""Who may still come for an inheritance: whoever maps some of it, and is in no books. Looked for, and watched."""

from __future__ import annotations

import contextlib
import os
from functools import partial

from realmap.host import files, liveness, procfs
from realmap.kernel.books import Books
from realmap.kernel.loop import Loop
from realmap.kernel.processes import UserProcess
from realmap.kernel.workers import Workers
from realmap.memory.frames import SharedFrames
from realmap.memory.lands import USER_LAND


class Heirs:
    """The heirs of each ended process whose memory stays. On the loop, but for the search."""

    def __init__(self, books: Books, loop: Loop, workers: Workers) -> None:
        self._books = books
        self._loop = loop
        self._workers = workers
        #: Those that were found: {pid: pidfd}.
        self._of: dict[UserProcess, dict[int, int]] = {}
        books.inheritance.came = self._leave

    def search(self, dead: UserProcess) -> None:
        """Looks for them, elsewhere; where there are none, its memory goes."""
        self._of.setdefault(dead, {})
        wanted = {
            (segment.device, segment.inode)
            for mapping in dead.memory
            if isinstance(mapping.frames, SharedFrames)
            for segment in mapping.frames.segments
        }
        known = {process.pid for process in self._books.processes} | {os.getpid()}

        def look() -> None:
            found: dict[int, int] = {}
            try:
                for pid in procfs.who_maps(wanted, USER_LAND.start, USER_LAND.end, known):
                    with contextlib.suppress(OSError):
                        pidfd = os.pidfd_open(pid)
                        # Asked again, now that it cannot be another one: its pid may have been used anew.
                        if liveness.is_dead(pidfd) or not procfs.maps_any(pid, wanted, USER_LAND.start, USER_LAND.end):
                            files.close(pidfd)
                        else:
                            found[pid] = pidfd
            finally:
                self._loop.post(lambda: self._enter(dead, found))

        try:
            self._workers.submit(look)
        except RuntimeError:  # no thread: nobody is looked for
            self._end(dead)

    def _enter(self, dead: UserProcess, found: dict[int, int]) -> None:
        heirs = self._of.get(dead)
        if heirs is None:  # the kernel has ended meanwhile
            for pidfd in found.values():
                files.close(pidfd)
            return
        for pid, pidfd in found.items():
            try:
                self._loop.watch(pidfd, partial(self._on_death, dead, pid))
                heirs[pid] = pidfd
            except OSError:
                files.close(pidfd)
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
        """Of how many it is not known yet whether they have any."""
        return sum(not heirs for heirs in self._of.values())

    def after_fork_in_child(self) -> None:
        """They are the parent's alone."""
        for heirs in self._of.values():
            for pidfd in heirs.values():
                files.close(pidfd)
        self._of.clear()

    def clear(self) -> None:
        """The kernel ends."""
        for dead, heirs in list(self._of.items()):
            for pidfd in heirs.values():
                files.close(pidfd)
            self._end(dead)
