"""What a server tells the kernel of itself: what runs, what waits, what is lent, and how long calls took."""

from __future__ import annotations

from collections.abc import Iterable

from realmap.memory.cross_process import CrossProcessMapping
from realmap.memory.kernel_memory import KernelMemory
from realmap.serving.registry import Syscall
from realmap.serving.user_buffer import UserBuffer
from realmap.user.service.session import Work
from realmap.wire.news import Served

#: Calls, and windows, that are told of at most: a message has an end.
MOST = 500


def served(
    handlers: dict[str, Syscall],
    beside: Iterable[tuple[Work, float]],
    waiting: Iterable[Work],
    land: KernelMemory,
) -> Served:
    """As it is now. `beside`: calls at work, and since when; `waiting`: those that wait."""
    running: list[tuple[int, int, str, float | None]] = [
        (work.session.number, work.request.id, work.syscall.name, since) for work, since in beside
    ]
    running += [(work.session.number, work.request.id, work.syscall.name, None) for work in waiting]
    names = {name: (each.calls, each.failed, each.durations.counts()) for name, each in handlers.items()}
    lent = [_window(mirror) for mirror in land.mirrors() if isinstance(mirror, CrossProcessMapping)]
    kept = [(window.base, window.span) for window in land.kept.windows()] if land.kept is not None else []
    return Served(names, running[:MOST], lent[:MOST], kept[:MOST])


def _window(mirror: CrossProcessMapping) -> tuple[int, int, int, int, int]:
    caller = mirror._caller
    number = caller.process.number if isinstance(caller, UserBuffer) and not caller.has_ended else 0
    return number, mirror.mapping.address + mirror.offset, len(mirror), mirror.address, int(mirror.rights)
