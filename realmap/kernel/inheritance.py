"""What a process that had forked leaves: its children map it, too, and may not have said a word yet.

    fork            the parent tells the kernel that it has forked; the child says nothing, and costs nothing
    first use       the child connects, and adopts what it inherited: it is a process of its own from then on
    parent dies     what it had stays in the books while anybody who is not in them maps it (`heirs`); then it goes

Whoever adopts shows the secret that its parent was given: nobody else can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from realmap.kernel.processes import ProcessTable, UserProcess
from realmap.memory.frames import OwnedFrames, SharedFrames
from realmap.memory.mapping import Mapping
from realmap.pages import USIZE_MAX


def _nobody(dead: UserProcess, pid: int) -> None:
    """Nobody looks for heirs."""


class Inheritance:
    """The ended processes whose memory stays."""

    def __init__(self) -> None:
        self._dead: list[UserProcess] = []
        #: came(dead, pid): told of each child that has adopted what it wants from `dead`.
        self.came: Callable[[UserProcess, int], None] = _nobody

    def __len__(self) -> int:
        return len(self._dead)

    def __iter__(self) -> Iterator[UserProcess]:
        return iter(list(self._dead))

    def mappings(self) -> list[Mapping]:
        """Everything that is in them."""
        return [mapping for dead in self._dead for mapping in dead.memory]

    def add(self, dead: UserProcess) -> None:
        """What it has stays."""
        self._dead.append(dead)

    def end(self, dead: UserProcess) -> None:
        """Nobody comes for it any more: it goes."""
        self._dead.remove(dead)
        dead.user.give_back("estates")
        dead.memory.release_all()

    def adopt(
        self, process: UserProcess, secret: str, places: Sequence[tuple[int, int]], processes: ProcessTable, most: int
    ) -> list[bool]:
        """Enters what a forked child inherited into its own books, at the same addresses; which of it there was.

        `processes`: its parent may live. `most`: how many mappings it may have.
        """
        donors = [each for each in (*processes, *self._dead) if each.secret == secret]
        if not donors or not secret:
            return [False] * len(places)
        donor = donors[0]
        found = [len(process.memory) < most and _adopt(process, donor, *place) for place in places]
        if donor in self._dead:
            self.came(donor, process.pid)
        return found


def _adopt(process: UserProcess, donor: UserProcess, address: int, length: int) -> bool:
    if not 0 <= address <= USIZE_MAX:
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
