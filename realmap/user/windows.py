"""Mapping what the kernel answered: descriptors of segments, at the address that it chose, as one window."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from realmap.errors import KernelError, VirtualMemoryExhaustion
from realmap.host import procfs, translate
from realmap.memory.frames import Piece
from realmap.memory.userspace_ptr import register_window
from realmap.rights import MappingAccessRights, prot_of
from realmap.user.buffer import UserWindow
from realmap.wire import channel, messages

if TYPE_CHECKING:
    from realmap.user.process import Process

#: Which part of its segment a piece of a mapping is, by its number: (offset, length), in bytes.
PieceAt = Callable[[int], tuple[int, int]]
#: How many places for a mapping may turn out to be taken before there is none.
PLACES = 100


def map_window(
    process: Process, value: list[int], piece_at: PieceAt, descriptors: list[int], rights: MappingAccessRights
) -> UserWindow:
    """Maps the segments at the address in `value`, [address, length, segments, bytes in huge pages], or where the
    kernel moves them if that is taken (it is noted there); all or nothing.

    VirtualMemoryExhaustion: no such place. Else as Linux says, in our words. The descriptors stay the caller's.
    """
    prot = prot_of(rights)
    client = process.client
    for _ in range(PLACES):
        address, span, count, in_huge = value
        try:
            window = _map_segments(process, address, span, count, piece_at, descriptors, prot)
        except OSError as error:
            if error.errno != errno.EEXIST or isinstance(error, KernelError):
                raise translate.window_error(error, address, span, prot) from None
            try:
                start, end = procfs.obstacle(address, span)
            except OSError:  # no descriptor to look with: its own place is avoided
                start, end = 0, 0
            value[0] = client.request(messages.Move(client.next_id(), address, start, end))[0]
        else:
            window.process = process
            window.rights = rights
            window.huge = in_huge
            window.told = False
            process.keep_window(window)
            register_window(window)
            return window
    raise VirtualMemoryExhaustion(value[1], why=f"at {PLACES} places in UserLand something else is mapped")


def _map_segments(
    process: Process, address: int, span: int, count: int, piece_at: PieceAt, descriptors: list[int], prot: int
) -> UserWindow:
    if not count:  # private memory: no frames to share
        return UserWindow._map(address, span, prot, -1, 0, 0, span, 1)

    def pieces(first: int, fds: list[int]) -> Iterator[Piece]:
        for number, fd in enumerate(fds, first):
            yield fd, *piece_at(number)

    expected = min(count, messages.MAX_DESCRIPTORS)
    _require_all(descriptors, expected, span)
    if count == 1:
        return UserWindow._map(address, span, prot, descriptors[0], piece_at(0)[0], 0, span, 1)
    first = sum(piece_at(number)[1] for number in range(expected))
    window = UserWindow._map_pieces(address, prot, pieces(0, descriptors), 0, first, 1)
    mapped = len(descriptors)
    client = process.client
    while mapped < count:
        _, more = client.request(messages.More(client.next_id(), address, mapped))
        try:
            _require_all(more, min(count - mapped, messages.MAX_DESCRIPTORS), span)
            window._extend(pieces(mapped, more))
            mapped += len(more)
        finally:
            channel.close_all(more)
    return window


def _require_all(descriptors: list[int], expected: int, span: int) -> None:
    # Linux delivers what it has room for, and cuts off the rest.
    if len(descriptors) < expected:
        raise translate.frames_error(OSError(errno.EMFILE, os.strerror(errno.EMFILE)), span)
