"""Word of each kernel that is booted, for who waits for it: `realmap trace` of a command that boots its own.

    realmap trace ── $REALMAP_ANNOUNCE names its socket ──▶ the command's boot() ── its kernel's path ──▶ realmap trace
                                                            which returns only when that has answered

So nothing happens in the kernel before it is being looked at.
"""

from __future__ import annotations

import os
import select
import socket
from contextlib import suppress

from realmap.host import files, liveness

#: The abstract address (unix(7)) of who waits, as hex.
VARIABLE = "REALMAP_ANNOUNCE"
#: How long a boot waits for an answer, in seconds; then it goes on without.
PATIENCE = 5.0


def announce(path: str) -> None:
    """Says that a kernel serves at `path`, and returns when whoever waits has looked; at once where nobody does."""
    where = os.environ.get(VARIABLE)
    if not where:
        return
    with suppress(OSError, ValueError), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(bytes.fromhex(where))
        sock.send(path.encode())
        sock.recv(1)


class Announced:
    """Kernels that are booted by who has `environment`, until `close`."""

    def __init__(self) -> None:
        """OSError: no socket can be had."""
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            self._listening.bind("")  # Linux chooses an abstract address: no file, which nobody would remove
            self._listening.listen()
        except OSError:
            self._listening.close()
            raise

    @property
    def environment(self) -> dict[str, str]:
        """What is to be in the environment of who boots."""
        address = self._listening.getsockname()
        return {VARIABLE: address.hex()}

    def next(self, seconds: float) -> tuple[str, socket.socket] | None:
        """The path of the next one, and a socket: its boot returns when that is closed. None: none within the time."""
        if not select.select([self._listening], [], [], seconds)[0]:
            return None
        with suppress(OSError):
            sock, _ = self._listening.accept()
            try:
                sock.settimeout(PATIENCE)
                if liveness.credentials(sock)[1] == os.geteuid() and (path := sock.recv(4096)):
                    return path.decode(), sock
            except (OSError, ValueError):
                pass
            files.shut(sock)
        return None

    def close(self) -> None:
        """Boots are no longer waited for. Again: nothing."""
        files.shut(self._listening)
