"""A connection to a running kernel that asks and looks, without being one of its processes."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import Any, Self

from realmap.observe.audit import AuditReport, audit
from realmap.observe.snapshot import Snapshot
from realmap.wire import messages
from realmap.wire.client import Client
from realmap.wire.status import Patience


class Control:
    """What can be asked of the kernel at `path`. A context manager; safe for threads."""

    def __init__(self, path: str | os.PathLike[str], *, timeout: float | None = None) -> None:
        """Connects. `timeout`: how long each answer may take, in seconds. By default it is looked every second what the
        kernel is at: where it is stopped, or a handler keeps it, that is the error; else 30 seconds is the most.

        KernelDied: no kernel listens there. AccessDenied, InvalidHandle, VersionMismatch: as `connect`.
        SyscallTimeout: no answer in that time; its text says what the kernel is at. So for each question.
        """
        self.timeout = timeout
        self._client = Client(os.fspath(path), control=True, timeout=timeout)

    @property
    def path(self) -> str:
        return self._client.path

    @property
    def pid(self) -> int:
        return self._client.kernel_pid

    def _ask(self, what: str, about: int | bytes = 0, *, late: Callable[[Any], object] | None = None) -> Any:
        ask = messages.Ask(self._client.next_id(), what, about)
        bound = Patience(self.path, what) if self.timeout is None else self.timeout
        value, answer = self._client.request(ask, timeout=bound, name=what, late=late)
        answer.take()
        return value

    def stats(self) -> dict[str, int]:
        """Totals by name; bytes are bytes. KernelDied: it has ended."""
        found = self._ask("stats")
        assert isinstance(found, dict)
        return found

    def snapshot(self) -> Snapshot:
        """The kernel's books at one moment. KernelDied: it has ended."""
        return Snapshot.ask(self._client, self.timeout)

    def revoke_orphans(self) -> list[str]:
        """Ends the handles without a name whose makers have ended; what was attached by them stays. Their labels.

        KernelDied: it has ended.
        """
        labels = [each.name for each in self.snapshot().handles if each.maker is None and not each.is_named]
        return [label for label in labels if self._ask("revoke-orphans", int(label[:8], 16))]

    def audit(self) -> AuditReport:
        """Holds the books against Linux; true as a bool where they agree. KernelDied: it has ended."""
        return audit(self.snapshot)

    def settle(self, timeout: float | None) -> None:
        """Waits until everyone who has died is reaped. TimeoutError: not within so many seconds."""
        end = math.inf if timeout is None else time.monotonic() + timeout
        pause = 0.0005
        while left := self._ask("unreaped"):
            if time.monotonic() >= end:
                raise TimeoutError(f"the kernel at {self.path!r} still has to reap {left} after {timeout} s")
            time.sleep(pause)
            pause = min(2 * pause, 0.05)

    def register(self, handlers: bytes) -> None:
        """Adds handlers, and whether they replace others, by cloudpickle. AccessDenied: this is not its booter."""
        self._ask("register", handlers)

    def unregister(self, name: str) -> None:
        """Takes one away. AccessDenied: this is not its booter. UnknownSyscall: there is none of that name."""
        self._ask("unregister", name.encode())

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
