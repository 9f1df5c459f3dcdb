"""Which services wait for the handler that is at work here: what it calls is told, so that none waits for itself."""

from __future__ import annotations

from contextvars import ContextVar

#: Their seats, in order; none outside of a service's handlers.
seats: ContextVar[tuple[int, ...]] = ContextVar("realmap.seats", default=())
