"""What a process that had forked leaves: its children map it, too, and may not have said a word yet.

    fork            the parent tells the kernel that it has forked; the child says nothing, and costs nothing
    first use       the child connects, and adopts what it inherited: it is a process of its own from then on
    parent dies     what it had stays in the books while anybody who is not in them maps it; then it goes

Whoever adopts shows the secret that its parent was given: nobody else can.
"""

from __future__ import annotations

import contextlib
import os
from functools import partial
from typing import TYPE_CHECKING

from realmap.host import files, liveness, procfs
from realmap.memory.frames import OwnedFrames, SharedFrames
from realmap.memory.lands import USER_LAND
from realmap.memory.mapping import Mapping
from realmap.pages import USIZE_MAX

if TYPE_CHECKING:
    from realmap.kernel.kernel import Kernel
    from realmap.kernel.processes import UserProcess
    from realmap.wire import messages


class Estate:
    """What one dead process had, and who may still come for it: {pid: pidfd}."""

    def __init__(self, process: UserProcess) -> None:
        self.process = process
        self.heirs: dict[int, int] = {}


class Inheritance:
    """The estates of a kernel. Only on the kernel's thread, but for the search for heirs."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._estates: list[Estate] = []

    def __len__(self) -> int:
        return len(self._estates)

    def mappings(self) -> list[Mapping]:
        """Everything that is in them."""
        return [mapping for estate in self._estates for mapping in estate.process.memory]

    def processes(self) -> list[UserProcess]:
        """Whose they are."""
        return [estate.process for estate in self._estates]

    def open(self, process: UserProcess) -> None:
        """A process that had forked has ended: its memory stays until it is known that nobody comes for it."""
        if not any(isinstance(mapping.frames, SharedFrames) for mapping in process.memory):
            process.memory.release_all()
            return
        estate = Estate(process)
        self._estates.append(estate)
        self._search(estate)

    def _search(self, estate: Estate) -> None:
        wanted = {
            (segment.device, segment.inode)
            for mapping in estate.process.memory
            if isinstance(mapping.frames, SharedFrames)
            for segment in mapping.frames.segments
        }
        known = {process.pid for process in self._kernel.processes} | {os.getpid()}

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
                self._kernel.post(lambda: self._enter(estate, found))

        try:
            self._kernel.workers.submit(look)
        except RuntimeError:  # no thread: nobody is looked for
            self._end(estate)

    def _enter(self, estate: Estate, found: dict[int, int]) -> None:
        if estate not in self._estates:  # the kernel has ended meanwhile
            for pidfd in found.values():
                files.close(pidfd)
            return
        for pid, pidfd in found.items():
            try:
                self._kernel.watch(pidfd, partial(self._on_death, estate, pid))
                estate.heirs[pid] = pidfd
            except OSError:
                files.close(pidfd)
        if not estate.heirs:
            self._end(estate)

    def _on_death(self, estate: Estate, pid: int, _: int) -> None:
        self._leave(estate, pid)

    def _leave(self, estate: Estate, pid: int) -> None:
        """An heir has died, or adopted what it wants. Forks of its own may be left, so it is looked again."""
        pidfd = estate.heirs.pop(pid, None)
        if pidfd is not None:
            self._kernel.unwatch(pidfd)
            files.close(pidfd)
            if not estate.heirs:
                self._search(estate)

    def _end(self, estate: Estate) -> None:
        self._estates.remove(estate)
        estate.process.memory.release_all()
        if self._kernel.tracing.events is not None:
            self._kernel.tracing.reaped(estate.process)

    def clear(self) -> None:
        """The kernel ends."""
        for estate in list(self._estates):
            for pidfd in estate.heirs.values():
                files.close(pidfd)
            self._end(estate)

    def adopt(self, process: UserProcess, request: messages.Adopt) -> list[bool]:
        """Enters what a forked child inherited into its own books, at the same addresses; which of it there was."""
        donors = [each for each in self._kernel.processes if each.secret == request.secret]
        donors += [estate.process for estate in self._estates if estate.process.secret == request.secret]
        if not donors or not request.secret:
            return [False] * len(request.places)
        found = [self._adopt(process, donors[0], address, length) for address, length in request.places]
        for estate in self._estates:
            if estate.process is donors[0]:
                self._leave(estate, process.pid)
        return found

    def _adopt(self, process: UserProcess, donor: UserProcess, address: int, length: int) -> bool:
        if not 0 <= address <= USIZE_MAX or len(process.memory) >= self._kernel.limits.mappings:
            return False
        mapping = donor.memory.mapping_at(address)
        if mapping is None or (mapping.address, mapping.length) != (address, length):
            return False
        memory = process.memory
        if memory.mapping_at(address) is not None:  # said twice
            return False
        if isinstance(mapping.frames, SharedFrames):
            memory.map_partial_shared_mapping(
                mapping.frames, address, mapping.phys_offset, length, mapping.type, mapping.rights
            )
        else:  # private memory: the child has a copy of its own
            memory.create_regular_mapping(
                address, length, mapping.type, mapping.rights, frames=mapping.frames and OwnedFrames(length)
            )
        return True
