"""Who is at the other end of a socket, and when a process dies."""

from __future__ import annotations

import os
import select
import socket
import struct
from typing import NamedTuple

from realmap.errors import AccessDenied
from realmap.host import files, procfs

SO_PEERPIDFD = 77  # include/uapi/asm-generic/socket.h, since Linux 6.5


class Peer(NamedTuple):
    """A process at the other end of a Unix socket: kernel-checked pid and uid, and a pidfd that is the caller's."""

    pid: int
    uid: int
    pidfd: int


def is_dead(pidfd: int) -> bool:
    """Whether the process of `pidfd` has ended (a zombie has)."""
    return wait_death(pidfd, 0)


def wait_death(pidfd: int, timeout: float | None) -> bool:
    """Waits until the process of `pidfd` has ended, at most `timeout` seconds; whether it has."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(None if timeout is None else max(0, int(timeout * 1000))))


def is_ending(pidfd: int, pid: int) -> bool:
    """Whether the process of `pidfd`, which is `pid`, has ended or is about to: its sockets close before it has."""
    return is_dead(pidfd) or procfs.is_exiting(pid) or is_dead(pidfd)


def credentials(sock: socket.socket) -> tuple[int, int]:
    """(pid, uid) of who connected: SO_PEERCRED, as Linux noted them then.

    The pid is 0 if it is not visible from here.
    """
    pid, uid, _ = struct.unpack("=iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


def peer(sock: socket.socket, claimed_pid: int, claimed_start: int) -> Peer:
    """Identifies who connected, and refuses whom it cannot name without doubt.

    The peer says its own pid and start time (as it sees them); both must be what Linux says of it from here.

    AccessDenied: the peer lives in another pid namespace, or its pid now belongs to another process.
    ProcessLookupError: it has died.
    """
    pid, uid = credentials(sock)
    if not pid or pid != claimed_pid:
        raise AccessDenied(why=f"a peer of another pid namespace (it says pid {claimed_pid}, seen from here as {pid})")
    try:
        # Names the very process that connected. getsockopt(int) is how a descriptor comes back.
        pidfd = sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError:  # before Linux 6.5; the start time below tells a reused pid
        pidfd = os.pidfd_open(pid)
    try:
        os.set_inheritable(pidfd, False)
        # Read while the pidfd is held and its process lives: the pid cannot change hands in between.
        start = procfs.start_time(pid)
        if is_dead(pidfd):
            raise ProcessLookupError(f"process {pid} has ended")
        if start != claimed_start:
            raise AccessDenied(why=f"pid {pid} was reused: it started at {start}, the peer says {claimed_start}")
    except BaseException:
        files.close(pidfd)
        raise
    return Peer(pid, uid, pidfd)


def same_process_lives(pid: int, start: int) -> bool:
    """Whether `pid` is still the process that started at `start` (clock ticks since boot)."""
    try:
        return procfs.start_time(pid) == start
    except ProcessLookupError:
        return False
