"""Which services wait for the handler that is at work here: what it calls is told, so that none waits for itself."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar

#: Their seats, in order; none outside of a service's handlers, nor in what an `async` one has left behind.
seats: ContextVar[Sequence[int]] = ContextVar("realmap.seats", default=())
