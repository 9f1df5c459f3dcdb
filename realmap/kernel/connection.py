"""One client of the kernel: its line, and what it is to the books."""

from __future__ import annotations

import socket
import time

from realmap.host import files
from realmap.kernel.budgets import Peer
from realmap.kernel.processes import UserProcess
from realmap.serving.line import Line
from realmap.serving.workers import Share, Workers


class Connection(Line):
    """Only for the kernel's thread."""

    __slots__ = ("calls", "control", "maps", "pidfd", "process", "since")
    peer: Peer
    #: What runs of a process on worker threads: its calls, and the taking of large frames, one after the other.
    calls: Share
    maps: Share

    def __init__(self, sock: socket.socket, peer: Peer) -> None:
        """LimitReached: the peer has as many connections as it may."""
        super().__init__(sock, peer)
        peer.take("connections")
        self.process: UserProcess | None = None
        self.pidfd = -1
        self.control = False
        #: When it came; seconds of the monotonic clock.
        self.since = time.monotonic()

    def enter(self, process: UserProcess, pidfd: int, workers: Workers, running: int) -> None:
        """It is this process's; its pidfd is ours from now on. `running`: its share of the workers."""
        self.process, self.pidfd = process, pidfd
        self.calls = Share(workers, running, self.peer.calls)
        self.maps = Share(workers, 1, self.peer.maps)

    def close(self) -> None:
        """Closes the socket; what waits, to be sent or to run, is lost. Again: nothing."""
        if not self.closed:
            self.peer.give_back("connections")
        super().close()
        if self.pidfd >= 0:
            self.calls.cancel()
            self.maps.cancel()
            self._forget_pid()

    def _forget_pid(self) -> None:
        files.close(self.pidfd)
        self.pidfd = -1

    def after_fork_in_child(self) -> None:
        super().after_fork_in_child()
        if self.pidfd >= 0:
            self._forget_pid()
