"""What a process that had forked leaves: its children map it, too, and may not have said a word yet.

    fork            the parent tells the kernel that it has forked; the child says nothing, and costs nothing
    first use       the child connects, and adopts what it inherited: it is a process of its own from then on
    parent dies     what it had stays in the books while anybody maps it beside its own books (`heirs`); then it goes

Whoever adopts shows the secret that its parent was given: nobody else can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from realmap.kernel.processes import ProcessTable, UserProcess
from realmap.memory.frames import OwnedFrames, SharedFrames
from realmap.memory.mapping import Mapping
from realmap.pages import USIZE_MAX
from realmap.wire import messages


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
        return [mapping for dead in self._dead for mapping in dead.memory]

    def add(self, dead: UserProcess) -> None:
        """From now on what it has stays, for its forked children."""
        self._dead.append(dead)

    def end(self, dead: UserProcess) -> None:
        """No child will come for it any more: it is given back."""
        self._dead.remove(dead)
        dead.user.give_back("inheritances")
        dead.memory.release_all()

    def adopt(self, process: UserProcess, request: messages.Adopt, processes: ProcessTable, most: int) -> list[bool]:
        """Enters what a forked child inherited into its own books, at the same addresses; which of it there is still.

        What its parent has put in the place of something since the fork is not what it inherited: each is known by its
        serial. `processes`: its parent may live. `most`: how many mappings it may have.
        """
        donors = [each for each in (*processes, *self._dead) if each.secret == request.secret]
        if not donors or not request.secret:
            return [False] * len(request.places)
        donor = donors[0]
        process.memory.stock.give_up()  # which may come back without asking
        most -= process.coming + process.memory.stock.count
        found = [len(process.memory) < most and _adopt(process, donor, *place) for place in request.places]
        if donor in self._dead and not request.more:
            self.came(donor, process.pid)
        return found


def _adopt(process: UserProcess, donor: UserProcess, address: int, length: int, serial: int) -> bool:
    if not 0 <= address <= USIZE_MAX:
        return False
    mapping = donor.memory.mapping_at(address)
    if mapping is None or (mapping.address, mapping.length, mapping.serial) != (address, length, serial):
        return False
    memory = process.memory
    if not memory.is_vacant(address, length):  # said twice, or the child has mapped something there since
        return False
    if isinstance(mapping.frames, SharedFrames):
        adopted = memory.map_partial_shared_mapping(
            mapping.frames, address, mapping.phys_offset, length, mapping.type, mapping.rights
        )
    else:  # private memory: the child has a copy of its own
        adopted = memory.create_regular_mapping(
            address, length, mapping.type, mapping.rights, frames=mapping.frames and OwnedFrames(length)
        )
    adopted.serial = serial  # by which children of its own know it, too
    return True
