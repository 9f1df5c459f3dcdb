"""Memory by name: what one process of a kernel gives a name, every other one finds by it.

A name ends by `unlink`, or with the kernel. Its maker's end in good order (`leave`) leaves it as it is; a maker that
is killed takes it along, as soon as no process lives that has attached it by that name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from realmap.errors import KernelError
from realmap.rights import MappingAccessRights
from realmap.user.buffer import Buffer
from realmap.wire import messages
from realmap.wire.messages import NAMED

if TYPE_CHECKING:
    from realmap.user.process import Process

#: How long the kernel may take to hear that this process ends, in seconds.
PATIENCE = 2.0


def publish(process: Process, buffer: Buffer, name: str, *, keep: bool = False) -> None:
    """Gives the bytes of a buffer a name. `keep`: it does not end with its maker, whatever way that dies.

    InvalidHandle: the name is taken. LimitReached: too many handles and names. Else as `Process.share`.
    """
    buffer.check()
    process._share(buffer, buffer.rights, None, None, keep, name)


def attach(
    process: Process, name: str, rights: MappingAccessRights | None = None, *, timeout: float | None = None
) -> Buffer:
    """The memory of that name, mapped here. InvalidHandle: there is none. SyscallTimeout. Else as `Process.attach`."""
    return process._attach(NAMED + name, rights=rights, timeout=timeout)


def unlink(process: Process, name: str, *, timeout: float | None = None) -> None:
    """Ends the name; the memory lives on where it is mapped. InvalidHandle: there is none. SyscallTimeout."""
    client = process._own_client
    client.request(messages.Revoke(client.next_id(), NAMED + name), timeout=timeout, name="unlink")


def leave(process: Process) -> None:
    """This process is about to end in good order. A kernel that does not hear of it takes it for killed."""
    if process._is_lost:  # a forked child that has not used it
        return
    try:
        process._own_client.request(messages.Leave(process._own_client.next_id()), timeout=PATIENCE, name="leave")
    except KernelError:
        pass  # with the kernel, its names have ended
