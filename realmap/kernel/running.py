"""`Running`: a call that does not have the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from realmap.kernel.processes import UserProcess
from realmap.serving.registry import Syscall
from realmap.serving.syscalls import Call, failed
from realmap.serving.user_buffer import UserBuffer

Send: TypeAlias = Callable[[bytes], None]


class Running:
    """A call that is not at work on the thread that has the loop: on a worker thread, waiting for one, or on a thread
    that it made lose the loop. It is answered once.
    """

    def __init__(
        self,
        client: object,
        process: UserProcess,
        call: Call,
        syscall: Syscall,
        id: int,
        buffers: Sequence[UserBuffer],
        send: Send,
    ) -> None:
        #: Whose request it is.
        self.client = client
        self.call = call
        self.process = process
        self.syscall = syscall
        self.name = syscall.name
        #: Of the request.
        self.id = id
        #: What it works on, pinned.
        self.buffers = buffers
        self._send = send
        #: When its handler began, in seconds of the monotonic clock; None while it waits for its turn. And where.
        self.began: float | None = None
        self.thread = 0
        #: On the status page.
        self.place = -1
        #: Bytes of its arguments, which its peer has a budget of; None: it began as one on the loop.
        self.size: int | None = None
        #: Whether it was told of in the log.
        self.told = False
        self.answered = False
        #: Whether it is among those that are `GivenUp`, and of a client that is gone.
        self.given_up = False
        self.orphan = False

    @property
    def facts(self) -> dict[str, Any]:
        """What a record of `logging` about it carries."""
        return self.process.facts | {"syscall": self.name}

    def answer(self, answer: bytes | BaseException) -> None:
        """Sends its answer, or the error that takes its place. Again: nothing."""
        if not self.answered:
            self.answered = True
            self._send(failed(self.id, answer, self.name) if isinstance(answer, BaseException) else answer)
