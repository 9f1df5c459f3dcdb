"""Mapping what the kernel answered: descriptors of segments, at the address that it chose, as one window.

answer ──▶ Answer owns the descriptors, and the duty to give the mapping back
  map them ──▶ UserWindow
    tell ──▶ the window has the duty: when it is unmapped, whoever does that, the kernel is told
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from realmap._core import Answer
from realmap.errors import VirtualMemoryExhaustion
from realmap.host import procfs, translate
from realmap.memory.frames import Piece
from realmap.memory.userspace_ptr import register_window
from realmap.rights import MappingAccessRights, prot_of
from realmap.user.buffer import Buffer, UserWindow
from realmap.wire import messages

if TYPE_CHECKING:
    from realmap.user.process import Process

#: Which part of its segment a piece of a mapping is, by its number: (offset, length), in bytes.
PieceAt = Callable[[int], tuple[int, int]]
#: How many places for a mapping may turn out to be taken before there is none.
PLACES = 100
#: Windows of so many bytes, from and to, are faulted in at once: for fewer it does not pay, and a longer one would keep
#: signals waiting (20 ms for 64 MiB).
FAULTED_IN = (32 << 10, 64 << 20)


def map_window(
    process: Process, place: list[int], piece_at: PieceAt, answer: Answer, rights: MappingAccessRights
) -> UserWindow:
    """Maps the segments that came with `answer`; all or nothing. `place`: [address, length, segments, bytes in huge
    pages, serial]; where that is taken, the kernel moves them.

    VirtualMemoryExhaustion: no such place. Else as Linux says, in our words.
    """
    address, span, count, in_huge, serial = place
    prot = prot_of(rights)
    client, duty = process._own_client, answer
    try:
        for _ in range(PLACES):
            try:
                window = _map_segments(process, address, span, count, piece_at, answer.descriptors, prot)
            except OSError as error:
                known = translate.window_error(error, address, span, prot)  # raises on what is a signal handler's
                if error.errno != errno.EEXIST:
                    raise known from None
            else:
                window._serial = serial
                describe(window, process, rights, in_huge)
                window._farewell(client.endpoint, process._farewell(address, span), duty)  # has it from here on
                return window
            start, end = procfs.obstacle(address, span)
            move = messages.Move(client.next_id(), address, start, end)
            address, moved = client.request(move, late=lambda to: process._farewell(to, span))
            duty.take()
            duty = moved
        raise VirtualMemoryExhaustion(span, why=f"at {PLACES} places in UserLand something else is mapped")
    except BaseException:
        duty.refuse()
        raise


def describe(window: UserWindow, process: Process, rights: MappingAccessRights, huge: int, recycles: int = 0) -> None:
    """Whose it is, and what."""
    window.process = process
    window.rights = rights
    window.huge = huge
    window.recycles = recycles
    window.lent_to = ()
    register_window(window)


def fault_in(window: UserWindow) -> None:
    """Of fresh frames whose space is taken: what touching each page would cost is paid at once, and is less so."""
    if FAULTED_IN[0] <= window._span <= FAULTED_IN[1]:
        window._fault_in()


def _map_segments(
    process: Process, address: int, span: int, count: int, piece_at: PieceAt, descriptors: list[int], prot: int
) -> UserWindow:
    """OSError: as mmap(2)."""
    if not count:  # private memory: no frames to share
        return UserWindow._map(address, prot, ((-1, 0, span),), 0, span, 1)

    def pieces(first: int, fds: list[int]) -> Iterator[Piece]:
        for number, fd in enumerate(fds, first):
            yield fd, *piece_at(number)

    expected = min(count, messages.MAX_DESCRIPTORS)
    _require_all(descriptors, expected, span)
    if count == 1:
        return UserWindow._map(address, prot, ((descriptors[0], piece_at(0)[0], span),), 0, span, 1)
    first = sum(piece_at(number)[1] for number in range(expected))
    window = UserWindow._map(address, prot, pieces(0, descriptors), 0, first, 1)
    mapped = len(descriptors)
    client = process._own_client
    while mapped < count:
        _, answer = client.request(messages.More(client.next_id(), address, mapped))
        more = answer.descriptors
        _require_all(more, min(count - mapped, messages.MAX_DESCRIPTORS), span)
        window._extend(pieces(mapped, more))
        mapped += len(more)
    return window


def _require_all(descriptors: list[int], expected: int, span: int) -> None:
    # Linux delivers what it has room for, and cuts off the rest.
    if len(descriptors) < expected:
        raise translate.frames_error(OSError(errno.EMFILE, os.strerror(errno.EMFILE)), span)


def open_segment(buffer: Buffer) -> int:
    """A descriptor of the segment of a mapping in one, opened for the caller alone, who closes it.

    PhysicalMemoryExhaustion: no descriptors. KernelDied, ProcessKilled: no kernel to ask for it.
    """
    window, client = buffer._window, buffer.process._own_client
    _, answer = client.request(messages.More(client.next_id(), window._base, 0))
    _require_all(answer.descriptors, 1, window._span)
    try:
        return os.dup(answer.descriptors[0])
    except OSError as error:
        raise translate.frames_error(error, window._span) from None
