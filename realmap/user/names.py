"""Memory by name: what one process of a kernel gives a name, every other one finds by it.

A name ends by `unlink`, or with the kernel. Its maker's end in good order (`leave`) leaves it as it is; a maker that
is killed takes it along, as soon as no process lives that has attached it by that name.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from realmap.errors import KernelError, VirtualMemoryExhaustion
from realmap.memory.lands import USER_LAND
from realmap.pages import align_up, usize
from realmap.rights import MappingAccessRights, MemoryType, u_rw
from realmap.user.buffer import Buffer, part_of
from realmap.user.windows import fault_in, map_window
from realmap.wire import messages
from realmap.wire.messages import NAMED, RECYCLED

if TYPE_CHECKING:
    from realmap.user.process import Process

#: How long the kernel may take to hear that this process ends, in seconds: Linux has been seen to stall one for two.
PATIENCE = 5.0
#: Of a block, for which windows are parked.
KIND = MemoryType.HEAP << 8 | int(u_rw)


def make(
    process: Process,
    size: int,
    name: str,
    *,
    keep: bool = False,
    segment: str | None = None,
    commit: bool = True,
    fresh: bool = False,
) -> Buffer:
    """Memory of `size` bytes with a name. `keep`: that does not end with its maker, whatever way it dies.
    `segment`: its name in /dev/shm, if it is to have one. `fresh`: nobody else can have that name.

    InvalidHandle: a name is taken. LimitReached: too many handles and names. Else as `Process.map`.
    """
    size = usize(size, "size")
    if align_up(size) > USER_LAND.length:
        raise VirtualMemoryExhaustion(size, why=f"UserLand has {USER_LAND.length} bytes in all")
    if fresh and commit and segment is None and size <= RECYCLED:
        again = _make_again(process, size, name, keep)
        if again is not None:
            return again
    client = process._own_client
    number = client.next_id()
    memory = messages.Map(number, size, int(MemoryType.HEAP), int(u_rw), None, segment, commit)
    end = messages.Revoke(0, NAMED + name)

    ended = False

    def give_back(place: Any) -> bytes:
        nonlocal ended
        ended = True
        client.notice(end)
        return process._farewell(place[0], place[1])

    request = messages.Publish(number, memory, name, math.inf if keep else 0.0)
    place, answer = client.request(request, name="map", late=give_back)
    try:
        window = map_window(process, place, lambda _: (0, place[1]), answer, u_rw)
        if commit:
            fault_in(window)
        return part_of(window, window._base, size)
    except BaseException:  # a signal handler's: nobody will ever have it
        if not ended:
            client.notice(end)
        raise


def _make_again(process: Process, size: int, name: str, keep: bool) -> Buffer | None:
    """What is parked, with a name that the kernel is not told: it looks for it when somebody asks. None: nothing is."""
    endpoint = process._own_client.endpoint
    found = process._map_again(size, u_rw, KIND)
    if found is None and process._stocks_up:
        process._stocks_up = False
        process.map(size).unmap()
        found = process._map_again(size, u_rw, KIND)
    if found is None:
        return None
    text = name.encode()
    try:
        if endpoint.name(found._window, text, size, keep):
            return found
        found._unmap_soon()
    except BaseException:  # a signal handler's: nobody will ever have it
        endpoint.end_name(text)
        raise
    return None


def attach(
    process: Process, name: str, rights: MappingAccessRights | None = None, *, timeout: float | None = None
) -> Buffer:
    """The memory of that name, mapped here. InvalidHandle: there is none. SyscallTimeout. Else as `Process.attach`."""
    return process._attached.attach(process, NAMED + name, rights=rights, timeout=timeout)


def unlink(process: Process, name: str, *, timeout: float | None = None) -> None:
    """Ends the name; the memory lives on where it is mapped. InvalidHandle: there is none. SyscallTimeout."""
    client = process._own_client
    if client.endpoint.end_name(name.encode()):
        process._stocks_up = True
        return
    client.request(messages.Revoke(client.next_id(), NAMED + name), timeout=timeout, name="unlink")


def leave(process: Process) -> None:
    """This process is about to end in good order. A kernel that does not hear of it takes it for killed."""
    if process._client.lost_in_child:  # a forked child that has not used it
        return
    client = process._own_client
    try:
        client.request(messages.Leave(client.next_id()), timeout=PATIENCE, name="leave")
    except KernelError:
        pass  # with the kernel, its names have ended
