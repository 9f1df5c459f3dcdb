"""strace on a running process: what it calls, and calls of it that fail or kill it instead.

An injected call is not executed at all: Linux sees a call without a number, the process the error.
`when` counts from the attaching on, in each thread anew.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple, Self

#: How long strace may take to attach, and to let go. Seconds.
PATIENCE = 30.0
_LINE = re.compile(r"^(\d+) +(?:<\.\.\. )?(\w+)(.*)$")


class Call(NamedTuple):
    """One system call as strace saw it: its thread, its name, its arguments and its result as text."""

    thread: int
    name: str
    text: str

    @property
    def injected(self) -> bool:
        """Whether it failed on purpose."""
        return self.text.endswith("(INJECTED)")

    @property
    def descriptor(self) -> int:
        """Its first argument as a number; -1 where that is none."""
        found = re.match(r"\((\d+)", self.text)
        return int(found[1]) if found else -1


class Trace:
    """strace, attached to a process (all its threads, and those to come) until `end` or the end of the `with` block."""

    def __init__(self, pid: int, log: Path, *, calls: str = "all", inject: str = "", threads: bool = True) -> None:
        """`calls`: what is traced, as `-e trace=` takes it. `inject`: as `--inject=` does.

        RuntimeError: strace did not attach; its own words are in the text.
        """
        self._log = log
        what = ["-e", f"trace={calls}", *([f"--inject={inject}"] if inject else [])]
        follow = ["-f"] if threads else []
        self._strace = subprocess.Popen(
            ["strace", *follow, "-s", "64", "-o", str(log), *what, "-p", str(pid)],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert self._strace.stderr is not None
        said, end = b"", time.monotonic() + PATIENCE
        while b"attached" not in said:
            ready, _, _ = select.select([self._strace.stderr], [], [], max(0.0, end - time.monotonic()))
            more = os.read(self._strace.stderr.fileno(), 4096) if ready else b""
            said += more
            if not more:
                self.end()
                raise RuntimeError(f"strace did not attach to {pid}: {said.decode(errors='replace')}")

    def end(self) -> None:
        """Lets the process go. Again: nothing."""
        if self._strace.poll() is None:
            self._strace.send_signal(signal.SIGTERM)
            try:
                self._strace.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self._strace.kill()
                self._strace.wait()
        assert self._strace.stderr is not None
        self._strace.stderr.close()

    def calls(self) -> list[Call]:
        """What was seen, each call as a whole: one that another thread's came into is put together."""
        found: list[Call] = []
        begun: dict[tuple[int, str], str] = {}
        for line in self._log.read_text(errors="replace").splitlines():
            match = _LINE.match(line if line[:1].isdigit() else "0 " + line)  # without -f there is no number
            if match is None:
                continue
            thread, name, text = int(match[1]), match[2], match[3]
            if text.endswith("<unfinished ...>"):
                begun[thread, name] = text.removesuffix("<unfinished ...>")
                continue
            text = begun.pop((thread, name), "") + text.removeprefix(" resumed>")
            found.append(Call(thread, name, text))
        # A call that its process died in is the last of its thread, and has no result.
        found += [Call(thread, name, text) for (thread, name), text in begun.items()]
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def occurrences(calls: list[Call]) -> Counter[str]:
    """How often each call occurs, in the thread where it occurs most: what `when` counts up to."""
    found: Counter[str] = Counter()
    for (_, name), count in Counter((call.thread, call.name) for call in calls).items():
        found[name] = max(found[name], count)
    return found


def hindrance(folder: Path) -> str:
    """Why nothing can be injected here; empty where it can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    child = os.fork()
    if not child:
        signal.pause()
        os._exit(0)
    try:
        with Trace(child, folder / "hindrance", inject="dup:error=EMFILE:when=1"):
            return ""
    except RuntimeError as error:
        return str(error)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
