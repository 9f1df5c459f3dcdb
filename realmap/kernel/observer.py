"""What an observer is told of. `Books.observer` is None while nobody looks, and asked where a thing happens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from realmap.kernel.processes import UserProcess
from realmap.serving.caller import Copies
from realmap.wire.messages import Place, Request


class Observer(Copies, Protocol):
    """One method for each event. `client`: whose request it is, a process or not, to tell one from another."""

    def connected(self, process: UserProcess) -> None:
        """A process was taken into the books."""

    def disconnected(self, process: UserProcess, died: bool) -> None:
        """Its connection has ended (`died`: because it has); what it has is given back after this."""

    def reaped(self, process: UserProcess) -> None:
        """What it had was given back; all of it, but where its forked children may still come for it."""

    def called(self, client: object, process: UserProcess | None, request: Request, buffers: Sequence[Place]) -> None:
        """A request has arrived; of a call, with its buffers."""

    def done(self, client: object, process: UserProcess | None, request: Request) -> None:
        """The kernel's thread is done with it; it may be answered later."""

    def answered(self, client: object, process: UserProcess | None, id: int, message: bytes) -> None:
        """Request `id` was answered."""

    def began(self, process: UserProcess, name: str, id: int, thread: int) -> None:
        """A blocking handler begins, or another one has lost the loop; and the thread that runs it."""

    def ended(self, process: UserProcess, name: str, id: int, answer: bytes) -> None:
        """A handler that was told by `began` has ended. Called on its thread."""

    def served(
        self, server: UserProcess, caller: int, id: int, name: str, times: tuple[int, int, int], code: int
    ) -> None:
        """`server` says that it has answered a call of process number `caller`, which came, began and ended then
        (monotonic, ns); `code`: the error's, or 0.
        """
