"""How long a key takes in `realmap top`, with few mappings and with many.

    .venv/bin/python tools/top_fluid.py [MAPPINGS] [PROCESSES] [ROUNDS]     by default 10000 in 64, 60 times

A real `realmap top` in a pseudo-terminal of 140x45, a snapshot as often as it takes them. `?` opens a box whose text
is nowhere else on the screen: from the key to the last of that text it takes so long to come through all that the
screen's thread does meanwhile. The key comes at random moments.
"""

from __future__ import annotations

import fcntl
import os
import pty
import random
import select
import signal
import statistics
import struct
import subprocess
import sys
import termios
import time

from snapshot_pause import user

import realmap

#: Seconds.
PATIENCE = 30.0
#: The last line of the help.
LAST = b"quit"
#: How one gets there from the first screen, and back.
VIEWS = {"processes": ("", ""), "segments": ("2", "1"), "a process": ("\r", "\x1b")}


class Top:
    """`realmap top` on a terminal of its own."""

    def __init__(self, path: str) -> None:
        self._leader, follower = pty.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 45, 140, 0, 0))
        command = [sys.executable, "-m", "realmap", "top", "--interval", "0.1", "--kernel", path]
        environment = {**os.environ, "TERM": "xterm-256color"}
        self._child = subprocess.Popen(
            command, stdin=follower, stdout=follower, stderr=follower, env=environment, start_new_session=True
        )
        os.close(follower)
        self.until(b"UserLand")

    def until(self, text: bytes) -> None:
        """Reads until that was written."""
        seen, end = b"", time.perf_counter() + PATIENCE
        while text not in seen:
            left = end - time.perf_counter()
            if left < 0 or not select.select([self._leader], [], [], left)[0]:
                raise SystemExit(f"{text!r} did not come within {PATIENCE:.0f} s; the last that came: {seen[-500:]!r}")
            seen += os.read(self._leader, 1 << 16)

    def rest(self, seconds: float) -> None:
        """Reads whatever comes."""
        end = time.perf_counter() + seconds
        while (left := end - time.perf_counter()) > 0:
            if select.select([self._leader], [], [], left)[0]:
                os.read(self._leader, 1 << 16)

    def answer(self, seconds: float) -> None:
        """Reads what comes of a key, however late that is, and whatever comes so long after."""
        select.select([self._leader], [], [], PATIENCE)
        self.rest(seconds)

    def press(self, keys: str) -> None:
        """Types them."""
        os.write(self._leader, keys.encode())

    def key(self) -> float:
        """Seconds from `?` to its box."""
        self.rest(random.uniform(0.05, 0.3))
        start = time.perf_counter()
        self.press("?")
        self.until(LAST)
        took = time.perf_counter() - start
        self.press("?")
        self.answer(0.05)  # two at once would change nothing on the screen
        return took

    def close(self) -> None:
        """Ends it."""
        self.press("q")
        while True:  # what nobody reads would keep it
            try:
                os.read(self._leader, 1 << 16)
            except OSError:  # its end has gone
                break
        self._child.wait(PATIENCE)
        os.close(self._leader)


def measure(mappings: int, processes: int, rounds: int) -> None:
    """Prints a line for each view."""
    with realmap.boot() as kernel:
        users = [user(kernel.path, mappings // processes) for _ in range(processes)]
        top = Top(kernel.path)
        try:
            for name, (there, back) in VIEWS.items():
                top.press(there)
                top.rest(1.0)
                found = [top.key() for _ in range(rounds)]
                if back:
                    top.press(back)
                    top.answer(0.5)  # Esc and a key at once would be another key
                median, most = statistics.median(found), statistics.quantiles(found, n=10)[-1]
                print(
                    f"{mappings:6} mappings of {processes:2} processes, {name:10} median {median * 1e3:6.1f} ms  "
                    f"90 % below {most * 1e3:6.1f} ms  worst {max(found) * 1e3:6.1f} ms"
                )
        finally:
            top.close()
            for each in users:
                os.kill(each, signal.SIGKILL)
                os.waitpid(each, 0)


def main() -> None:
    """Few, then many."""
    mappings, processes, rounds = (int(text) for text in [*sys.argv[1:], *"10000 64 60".split()[len(sys.argv) - 1 :]])
    measure(10, 2, rounds)
    measure(mappings // processes * processes, processes, rounds)
    measure(mappings, 1, rounds)


if __name__ == "__main__":
    main()
