"""A command on a terminal."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys

from conftest import BOUND


def on_a_terminal(words: list[str], variables: dict[str, str], stop: int | None = None) -> str:
    """What a command shows there; with `stop` it gets a Ctrl-C after so many bytes. It ends well."""
    leader, follower = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "realmap", *words],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=os.environ | {"TERM": "xterm-256color"} | variables,
    )
    os.close(follower)
    out = b""
    while True:
        try:
            more = os.read(leader, 65536)
        except OSError:
            break
        out += more
        if stop is not None and len(out) > stop:
            child.send_signal(signal.SIGINT)
            stop = None
    os.close(leader)
    assert child.wait(BOUND) == 0, out.decode()
    return out.decode()
