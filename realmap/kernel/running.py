"""`Running`: a call that does not have the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from realmap.kernel.processes import UserProcess
from realmap.serving.registry import Syscall
from realmap.serving.syscalls import Call, failed
from realmap.serving.user_buffer import UserBuffer


@dataclass(eq=False)
class Running:
    """A call that is not at work on the thread that has the loop: on a worker thread, waiting for one, or on a thread
    that it made lose the loop. It is answered once.
    """

    #: Whose request it is.
    client: object
    process: UserProcess
    call: Call
    syscall: Syscall
    #: Of the request.
    id: int
    #: What it works on, pinned.
    buffers: Sequence[UserBuffer]
    send: Callable[[bytes], None]
    #: When its handler began, in seconds of the monotonic clock; None while it waits for its turn. And where.
    began: float | None = None
    thread: int = 0
    #: On the status page.
    place: int = -1
    #: Bytes of its arguments, which its peer has a budget of; None: it began as one on the loop.
    size: int | None = None
    #: Whether it was told of in the log.
    told: bool = False
    answered: bool = False
    #: Whether it is among those that are `GivenUp`, and of a client that is gone.
    given_up: bool = False
    orphan: bool = False

    @property
    def name(self) -> str:
        return self.syscall.name

    @property
    def facts(self) -> dict[str, Any]:
        """What a record of `logging` about it carries."""
        return self.process.facts | {"syscall": self.name}

    def answer(self, answer: bytes | BaseException) -> None:
        """Sends its answer, or the error that takes its place. Again: nothing."""
        if not self.answered:
            self.answered = True
            self.send(failed(self.id, answer, self.name) if isinstance(answer, BaseException) else answer)
