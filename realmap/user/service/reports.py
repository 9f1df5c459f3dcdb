"""What a server reports of itself to the kernel: what runs, what waits, what is lent, and how long calls took."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import NamedTuple

from realmap.memory.cross_process import CrossProcessMapping
from realmap.memory.kernel_memory import KernelMemory
from realmap.serving.loop import Loop
from realmap.serving.nesting import Place
from realmap.serving.registry import Syscall
from realmap.serving.syscalls import code_of
from realmap.serving.user_buffer import UserBuffer
from realmap.user.service.seat import Seat
from realmap.user.service.session import Work
from realmap.wire.news import Served, Worked

#: So many calls, windows, and names with their durations are reported at most; fewer where a message has no room.
MOST = 500
#: And, while somebody traces it, which calls have ended: after so many seconds, or so many calls.
TRACE, AT_ONCE = 0.01, 64


class Beside(NamedTuple):
    """A call at work, but not on the thread that has the loop; since when, in seconds (monotonic); and where."""

    work: Work
    since: float
    place: Place


def served(
    handlers: dict[str, Syscall],
    beside: Iterable[Beside],
    waiting: Iterable[Work],
    land: KernelMemory,
    most: int = MOST,
) -> Served:
    """As it is now. `beside`: calls at work; `waiting`: those that wait.

    `most`: so many calls, windows and waits are reported, and of so many names how long their calls took.
    """
    running: list[tuple[int, int, str, float | None]] = [
        (work.session.number, work.request.id, work.syscall.name, since) for work, since, _ in beside
    ]
    running += [(work.session.number, work.request.id, work.syscall.name, None) for work in waiting]
    waits = [
        (work.session.number, work.request.id, not work.syscall.is_async, *wait)
        for work, _, place in beside
        for wait in list(place.waits)
    ]
    names = {name: (each.calls, each.failed, each.durations.counts()) for name, each in handlers.items()}
    for name in list(names)[most:]:
        names[name] = (*names[name][:2], [0])
    lent = [_window(mirror) for mirror in land.mirrors() if isinstance(mirror, CrossProcessMapping)]
    kept = [(window.base, window.span) for window in land.kept_windows()]
    return Served(names, running[:most], lent[:most], kept[:most], waits[:most])


def _window(mirror: CrossProcessMapping) -> tuple[int, int, int, int, int]:
    caller = mirror._caller
    number = caller.process.number if isinstance(caller, UserBuffer) and not caller.has_ended else 0
    return number, mirror.mapping.address + mirror.offset, len(mirror), mirror.address, int(mirror.rights)


class Trace:
    """Reports calls that have ended to who traces the kernel, several at once. Only on the service's loop."""

    def __init__(self, seat: Seat, loop: Loop) -> None:
        self._seat, self._loop = seat, loop
        #: As in `Worked`.
        self._ended: list[tuple[int, int, str, int, int, int, int]] = []

    def note(self, work: Work, began: int, answer: bytes) -> None:
        """This one has ended now, with that answer; its handler `began` then (monotonic, ns)."""
        caller, name, now = work.session.caller.number, work.syscall.name, time.monotonic_ns()
        self._ended.append((caller, work.request.id, name, work.came, began, now, code_of(answer)))
        if len(self._ended) == 1:
            self._loop.after(TRACE, self.tell)
        elif len(self._ended) == AT_ONCE:
            self.tell()

    def tell(self) -> None:
        """Sends what has not been sent yet."""
        ended, self._ended = self._ended, []
        if ended:
            self._seat.tell(Worked(ended))
