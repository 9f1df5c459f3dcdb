"""Where a handler of a service is at work: who waits for it, and for whom it waits. So no service waits for itself."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from threading import get_ident
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyncio import Task


class Place:
    """Of one thread, or one task."""

    __slots__ = ("_task", "_thread", "kernel", "seats", "waits")

    def __init__(self, kernel: str, seats: Sequence[int]) -> None:
        #: The path of the kernel that counts these seats.
        self.kernel = kernel
        #: Of the services that wait for what is at work here, in order, its own last. None once that is over.
        self.seats = seats
        #: Its calls to services that have not been answered: [session, id, since when (monotonic, ns)].
        self.waits: dict[tuple[int, int, int], None] = {}

    def enter(self, task: Task[Any] | None = None) -> None:
        """A handler begins here, on this thread; as this task, if it is `async`."""
        self._thread, self._task = get_ident(), task
        here.set(self)

    @property
    def is_handler(self) -> bool:
        """Whether it is the handler itself that asks: no thread or task that it started, for which it may not wait."""
        if self._task is None or self._thread != get_ident():
            return self._thread == get_ident()
        from asyncio import current_task

        return current_task() is self._task


#: None outside of a service's handlers.
here: ContextVar[Place | None] = ContextVar("realmap.place", default=None)


def within(kernel: str) -> Place | None:
    """Where a handler is at work here, of a service of that kernel; None: of none."""
    place = here.get()
    return place if place is not None and place.kernel == kernel else None
