"""A service's end of a session, by itself: what its caller lends comes in parts."""

from __future__ import annotations

import os
import socket

import pytest
from conftest import PAGE

import realmap
from realmap import LimitReached
from realmap.memory import USER_LAND
from realmap.memory.frames import FrameAllocator
from realmap.rights import MemoryType
from realmap.user.service.session import Session
from realmap.wire.news import Granted, Opened


def part(serial: int, first: int, count: int) -> Granted:
    """A page of a mapping of `count` of them."""
    rights, kind = int(realmap.u_rw), int(MemoryType.HEAP)
    return Granted(1, serial, USER_LAND.start, count * PAGE, kind, rights, [(0, PAGE)], first, count)


def page(letter: bytes) -> list[int]:
    """A descriptor of one."""
    fd = os.memfd_create("page", os.MFD_CLOEXEC)
    os.write(fd, letter * PAGE)
    return [fd]


def test_what_is_revoked_before_all_of_it_has_come_leaves_nothing() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    session = Session(Opened(1, 2, os.getpid(), os.geteuid()), [ours.detach()], FrameAllocator(segments=9))
    before = len(os.listdir("/proc/self/fd"))
    session.enter(part(7, 0, 2), page(b"x"))
    assert session.caller.memory.mapping_at(USER_LAND.start) is None
    session.leave(7)
    assert len(os.listdir("/proc/self/fd")) == before
    session.enter(part(7, 0, 2), page(b"y"))  # lent anew
    session.enter(part(7, 1, 2), page(b"z"))
    mapping = session.caller.memory.mapping_at(USER_LAND.start)
    assert mapping is not None
    assert mapping.frames.read(PAGE - 1, 2, mapping.address) == b"yz"
    session.leave(7)
    assert session.caller.memory.mapping_at(USER_LAND.start) is None
    session.enter(part(8, 0, 2), page(b"x"))  # and its end
    session.shut()
    theirs.close()
    assert len(os.listdir("/proc/self/fd")) == before - 2


def test_a_caller_that_lends_more_descriptors_than_it_may_is_refused_before_all_of_it_is_there() -> None:
    """Counted over all its sessions, with what a call holds that was unmapped."""
    held = FrameAllocator(segments=3)
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
    first, second = [Session(Opened(1, 2, os.getpid(), os.geteuid()), [ours.detach()], held) for ours, _ in pairs]
    before = len(os.listdir("/proc/self/fd"))
    first.enter(part(7, 0, 1), page(b"x"))
    second.enter(part(7, 0, 1), page(b"x"))
    mapping = first.caller.memory.mapping_at(USER_LAND.start)
    assert mapping is not None
    mapping.pin()
    first.leave(7)
    second.enter(part(8, 0, 9), page(b"x"))
    with pytest.raises(LimitReached, match="2 descriptors are in use") as caught:
        second.enter(part(8, 1, 9), page(b"x"))
    assert (caught.value.what, caught.value.limit) == ("descriptors", 3)
    second.shut()
    mapping.unpin()
    assert len(os.listdir("/proc/self/fd")) == before - 1  # the socket of the second one
    first.enter(part(9, 0, 1), page(b"x"))
    first.shut()
    for _, theirs in pairs:
        theirs.close()
