"""Closing, whatever close(2) says: Linux has closed the descriptor also where it reports EINTR or EIO."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket


def close(fd: int) -> None:
    """Closes a descriptor. OSError (EBADF) only: it was none, which is a bug of ours."""
    try:
        os.close(fd)
    except OSError as error:
        if error.errno == errno.EBADF:
            raise


def shut(thing: socket.socket | select.epoll) -> None:
    """Closes it. Again: nothing."""
    with contextlib.suppress(OSError):
        thing.close()
