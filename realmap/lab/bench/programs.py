"""The C floor and the peers: programs of a checkout's `tools/bench/`, each a process that takes requests by the line.

── OP ARG … ──▶  ◀── ok NANOSECONDS  |  no REASON ──      the end of its stdin ends it

An installed package has none, and no limits that it is held to: what it measures is realmap's own, and nothing is said
of the others.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import msgspec

from realmap.host import forks
from realmap.lab.bench.measure import Absent, Batch
from realmap.lab.bench.report import Limit

#: Where a checkout keeps them.
TOOLS = Path(__file__).resolve().parents[3] / "tools" / "bench"
FLAGS = ["-O2", "-std=c11", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE"]
#: How long one of them may take to end, in seconds.
PATIENCE = 5.0
#: And for one answer: the longest batch takes seconds.
LIMIT = 120.0


class Program:
    """A running floor or peer. Where it cannot be had, every request to it is `Absent`."""

    def __init__(self, command: list[str] | None, why: str = "") -> None:
        """`command` None: it is not to be had, because of `why`; without a `why`, it was never meant to be here."""
        self._why = why
        self._process: subprocess.Popen[str] | None = None
        if command is not None:
            try:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
                )
            except OSError as error:
                self._why = f"it does not start: {error.strerror}"
        forks.lose_in_child(self)

    def ask(self, *words: object) -> int:
        """Nanoseconds for the operations asked for. Absent: it cannot do that here, or has died."""
        process = self._process
        if process is None:
            raise Absent(self._why)
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(" ".join(map(str, words)) + "\n")
            process.stdin.flush()
            there, _, _ = select.select([process.stdout], [], [], LIMIT)
            if not there:
                process.kill()
            answer = process.stdout.readline() if there else ""
        except OSError:
            answer = ""
        said, _, rest = answer.strip().partition(" ")
        if said == "ok":
            return int(rest)
        raise Absent(rest if said == "no" else f"it ended (exit code {process.poll()})")

    def batch(self, operation: str, *before: object, after: tuple[object, ...] = ()) -> Batch:
        """Runs `operation`, with its count between the arguments `before` and `after`."""
        return lambda count: self.ask(operation, *before, count, *after)

    def close(self) -> None:
        """Ends it. Again: nothing."""
        process, self._process, self._why = self._process, None, "it was ended"
        if process is None:
            return
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def _after_fork_in_child(self) -> None:
        """In a forked child: it is the parent's, which could not end it while a child holds its stdin."""
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            with contextlib.suppress(OSError):
                os.close(process.stdin.fileno())


def limits() -> list[Limit]:
    """What the project holds itself to."""
    try:
        text = (TOOLS / "limits.toml").read_text()
    except FileNotFoundError:
        return []
    return msgspec.toml.decode(text, type=dict[str, list[Limit]])["limits"]


def peer(name: str) -> Program:
    """The peer of that name (`tools/bench/peers/peer_NAME.py`), started."""
    script = TOOLS / "peers" / f"peer_{name}.py"
    return Program([sys.executable, "-B", str(script)] if script.exists() else None)


def crowd(clients: int, address: str, server: str | None = None) -> Program:
    """So many users of the kernel at `address`, or clients of that `server` (`tools/bench/peers/crowd_SERVER.py`)."""
    command = [sys.executable, "-m", "realmap.lab.bench.crowd", str(clients)]
    if server is None:
        return Program([*command, address])
    script = TOOLS / "peers" / f"crowd_{server}.py"
    return Program([*command, f"realmap-bench-{uuid.uuid4()}", str(script)] if script.exists() else None)


def floor() -> Program:
    sources = sorted(map(str, (TOOLS / "floor").glob("*.c")))
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if not sources:
        return Program(None)
    if compiler is None:
        return Program(None, "no C compiler (cc)")
    with tempfile.TemporaryDirectory(prefix="realmap-bench-") as folder:  # not needed any more once it runs
        target = os.path.join(folder, "floor")
        built = subprocess.run([compiler, *FLAGS, *sources, "-o", target], capture_output=True, text=True)
        if not built.returncode:
            return Program([target])
    return Program(None, f"it does not build: {(built.stderr.strip().splitlines() or ['the compiler was killed'])[0]}")
