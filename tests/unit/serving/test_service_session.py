"""A session of a service, as the server has it."""

from __future__ import annotations

import os
import socket

import pytest
from conftest import PAGE

from realmap.memory import USER_LAND
from realmap.user.service.session import Session
from realmap.wire.news import Granted, Opened


def test_what_is_unmapped_while_it_is_lent_leaves_no_descriptor() -> None:
    """Of two pieces the first has come."""
    ours, theirs = socket.socketpair()
    session = Session(Opened(1, 2, os.getpid(), 0), [ours.detach()])
    descriptor = os.memfd_create("piece")
    session.enter(Granted(1, 7, USER_LAND.start, 2 * PAGE, 1, 11, [(0, PAGE)], 0, 2), [descriptor])
    session.leave(7)
    with pytest.raises(OSError):
        os.fstat(descriptor)
    session.shut()
    theirs.close()
