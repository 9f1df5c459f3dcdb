"""Where a handler of a service is at work: who waits for it, and for whom it waits. So no service waits for itself."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar


class Place:
    """Of one thread, or one task."""

    __slots__ = ("seats", "waits")

    def __init__(self, seats: Sequence[int]) -> None:
        #: Of the services that wait for what is at work here, in order, its own last. None once that is over.
        self.seats = seats
        #: Its calls to services that have not been answered: [session, id, since when (monotonic, ns)].
        self.waits: dict[tuple[int, int, int], None] = {}


#: None outside of a service's handlers.
here: ContextVar[Place | None] = ContextVar("realmap.place", default=None)


def seats() -> Sequence[int]:
    """Those that wait for the handler at work here; none outside of one, nor in what an `async` one has left."""
    place = here.get()
    return () if place is None else place.seats
