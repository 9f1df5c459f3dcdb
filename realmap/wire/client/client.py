"""The connection of a process to its kernel: how it begins, and what its end is called."""

from __future__ import annotations

import os

import msgspec

from realmap._core import CLOSED, DIED, ERRNO, NONSENSE, SAID_BYE, STOLEN
from realmap.errors import InvalidHandle, KernelDied, KernelError, ProcessKilled, SyscallTimeout, VersionMismatch
from realmap.host.signals import pass_on
from realmap.wire import status
from realmap.wire.client import handshake
from realmap.wire.client.requester import Requester
from realmap.wire.messages import UNREADABLE, VERSION


class Client(Requester):
    """A connection, from its handshake to its end. `number` is this process's name in the kernel's books."""

    def __init__(
        self,
        path: str,
        *,
        control: bool = False,
        encoder: msgspec.msgpack.Encoder | None = None,
        timeout: float | None = None,
    ) -> None:
        """Connects and introduces itself, within `timeout` seconds, or else as `Patience` says (SyscallTimeout).

        KernelDied: no kernel listens at `path`. VersionMismatch: it is of another version.
        AccessDenied: it does not let this process in. InvalidHandle: `path` is no socket of a kernel.
        PhysicalMemoryExhaustion: one of the two has no descriptors left, or Linux no memory for it.
        """
        self.path = path
        encoder = encoder or msgspec.msgpack.Encoder()
        endpoint = handshake.open_endpoint(path, timeout)
        super().__init__(endpoint, encoder, endpoint.next_id)
        welcome = handshake.introduce(self.endpoint, path, control, encoder, timeout)
        self.number, self.kernel_pid = welcome.process, welcome.kernel
        #: What its forked children show to the kernel.
        self.secret = welcome.secret

    def unanswered(self, name: str, timeout: float | None) -> SyscallTimeout:
        """What is raised where the kernel has not answered in time."""
        return status.unanswered(self.path, name, timeout)

    def elsewhere(self) -> KernelError:
        """What is raised in a forked child."""
        return InvalidHandle(
            None,
            why=f"this connection belongs to process {self.pid}; a forked child needs its own: "
            f"realmap.connect({self.path!r})",
        )

    def ended(self, unread: bool = False) -> KernelError:
        """Why the connection is of no use any more."""
        end = self.endpoint.end
        if end == SAID_BYE:
            try:
                return self.farewell()
            except UNREADABLE as error:
                pass_on(error)
            end = NONSENSE
        if end == CLOSED:
            return ProcessKilled(self.pid, why="this Process was closed")
        if end == STOLEN:
            why = "the descriptor of this connection was closed by another part of this program (os.closerange?)"
            return ProcessKilled(self.pid, why=f"{why}; connect again: realmap.connect({self.path!r})")
        if end == NONSENSE:
            return VersionMismatch(VERSION, "unknown", why="the kernel said what is no message")
        why = status.why_it_died(self.path)
        return KernelDied(self.path, why=why if end == DIED else f"{why} ({os.strerror(end - ERRNO)})")
