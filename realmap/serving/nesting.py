"""Where a handler of a service is at work: who waits for it, and for whom it waits. So no service waits for itself."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar


class Place:
    """Of one thread, or one task."""

    __slots__ = ("kernel", "seats", "waits")

    def __init__(self, kernel: str, seats: Sequence[int]) -> None:
        #: The path of the kernel that counts these seats.
        self.kernel = kernel
        #: Of the services that wait for what is at work here, in order, its own last. None once that is over.
        self.seats = seats
        #: Its calls to services that have not been answered: [session, id, since when (monotonic, ns)].
        self.waits: dict[tuple[int, int, int], None] = {}


#: None outside of a service's handlers.
here: ContextVar[Place | None] = ContextVar("realmap.place", default=None)


def within(kernel: str) -> Place | None:
    """Where a handler is at work here, of a service of that kernel; None: of none."""
    place = here.get()
    return place if place is not None and place.kernel == kernel else None
