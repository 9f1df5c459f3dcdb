"""The status page: what a kernel is at, told without its help, for whoever gets no answer.

    kernel   writes a word or two at each turn of its loop, and around each short handler
    reader   PATH.lock names the kernel and its page ──▶ /proc/PID/fd/N ──▶ `Status`, a sentence

The page is a sealed memfd: the kernel alone can write to it, and nobody can cut it short, so that no write of the
kernel ever hits memory that is gone. It has a name only in the lock file beside the socket, and ends with the kernel.
It is written before each handler, not when one is late: one that keeps the GIL in C lets no thread write then.

    word  0      magic, with the version of this layout
          1      when the loop took up what it is at, in nanoseconds of the monotonic clock; 0: it sleeps
          2      the pid that the short handler works for which it is in; 0: it is in none
          3-10   the name of that handler, or of the last one: UTF-8, cut at a whole letter, padded with NULs
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import time

import msgspec

from realmap._core import read_file
from realmap.errors import SyscallTimeout
from realmap.host import files, procfs, runtime
from realmap.host.signals import pass_on

MAGIC = b"realmap\x01"
LONGEST_NAME = 64
TURN, CALLER, _NAME = 1, 2, 3 * 8
_LAYOUT = struct.Struct(f"=8s2Q{LONGEST_NAME}s")
#: What Linux shows as the target of the page's descriptor.
_MEMFD = "realmap-status"
#: fcntl(2): nobody may write but by a mapping that is there already. (Since Linux 5.1; in Python's fcntl since 3.13.)
_SEAL_FUTURE_WRITE = 0x0010
#: After so many seconds without an answer it is looked whether there can be one; and then again and again.
LATE = 1.0
#: So many seconds an answer is waited for at most, where the kernel is at work but not stuck (on a large snapshot).
BOUND = 30.0


def label(name: str) -> bytes:
    """A handler's name as the page has it."""
    whole = name.encode(errors="replace")
    short = whole if len(whole) <= LONGEST_NAME else whole[:LONGEST_NAME].decode(errors="ignore").encode()
    return short.ljust(LONGEST_NAME, b"\0")


class Page:
    """The kernel's end. Nobody sees it before `open`. For one thread at a time: whoever has the loop."""

    def __init__(self) -> None:
        self._fd = -1
        self._take(bytearray(_LAYOUT.size))

    def _take(self, memory: bytearray | mmap.mmap) -> None:
        view = memoryview(memory)
        #: Written to where calling a method would cost more than the store: TURN, and CALLER around a handler. Nobody
        #: keeps it: a forked child has to get rid of it.
        self.words = view[:_NAME].cast("Q")
        self._name = view[_NAME : _NAME + LONGEST_NAME]
        #: The label that is there.
        self.named = b""

    def open(self) -> int:
        """Lets others see it: the descriptor by which they find it, or -1 where Linux gives none."""
        try:
            self._fd = os.memfd_create(_MEMFD, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self._fd, mmap.PAGESIZE)
            memory = mmap.mmap(self._fd, mmap.PAGESIZE)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL | _SEAL_FUTURE_WRITE
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, seals)
        except OSError:
            self.close()
        else:
            self._take(memory)
            memory[: len(MAGIC)] = MAGIC
        return self._fd

    def close(self) -> None:
        """Nobody sees it any more. Again: nothing."""
        fd, self._fd = self._fd, -1
        self._take(bytearray(_LAYOUT.size))
        if fd >= 0:
            files.close(fd)

    def turn(self) -> None:
        """The loop takes up something."""
        self.words[TURN] = time.monotonic_ns()

    def rest(self) -> None:
        """It sleeps until there is something to do."""
        self.words[TURN] = 0

    def name(self, label: bytes) -> None:
        """A handler of this `label` is about to begin."""
        self._name[:] = label
        self.named = label


class Status(msgspec.Struct, frozen=True):
    """What a kernel is at; `str` says it in a sentence.

    `pid`: its process; `stopped`: whether that is (SIGSTOP). `handler`: the short handler that has its loop, or None;
    `caller`: the pid that this works for. `seconds`: how long the loop is at what it is at; None where it sleeps, or
    does not say.
    """

    pid: int
    stopped: bool = False
    handler: str | None = None
    caller: int = 0
    seconds: float | None = None

    @property
    def is_stuck(self) -> bool:
        """Whether it is of no use to wait for it: it is stopped, or has been in one handler for a second or more."""
        return self.stopped or (self.handler is not None and self.seconds is not None and self.seconds >= LATE)

    def __str__(self) -> str:
        if self.stopped:
            return f"kernel {self.pid} is stopped (SIGSTOP)"
        if self.seconds is None:
            return f"kernel {self.pid} runs, and is in no handler"
        seconds = f"{self.seconds:.0f} s" if self.seconds >= 10 else f"{self.seconds:.1f} s"
        if self.handler is None:
            return f"kernel {self.pid} has not come round for {seconds}"
        return f"kernel {self.pid} is in handler {self.handler!r} of process {self.caller} since {seconds}"


def look(path: str) -> Status | None:
    """What the kernel at `path` (its socket) is at. None: none lives there, or none that says. Never waits."""
    try:
        pid, number = runtime.kernel_at(path)
        stopped = procfs.is_stopped(pid)
    except (OSError, ValueError) as error:
        pass_on(error)
        return None
    try:
        before, (turn, caller, name) = _read(pid, number), _read(pid, number)
    except (OSError, ValueError) as error:
        pass_on(error)
        return Status(pid, stopped)
    # The same call before and after: what is told of it belongs together. One that matters began a second ago, and what
    # was written then has long arrived, in whichever order.
    if not turn or (turn, caller) != before[:2]:
        return Status(pid, stopped)
    seconds = max(0, time.monotonic_ns() - turn) / 1e9
    if not caller:
        return Status(pid, stopped, seconds=seconds)
    return Status(pid, stopped, name.rstrip(b"\0").decode(errors="replace"), caller, seconds)


def _read(pid: int, number: int) -> tuple[int, int, bytes]:
    """What is in the page: turn, caller, name. It is not mapped: in the end it is somebody else's file.

    ValueError, OSError: there is no such page.
    """
    place = f"/proc/{pid}/fd/{number}"
    if not os.readlink(place).startswith(f"/memfd:{_MEMFD}"):  # before it is opened: it may be anything
        raise ValueError(f"{place} is no status page")
    data = read_file(place.encode(), _LAYOUT.size)
    if len(data) < _LAYOUT.size or not data.startswith(MAGIC):
        raise ValueError(f"{place} is no status page that this version reads")
    _, turn, caller, name = _LAYOUT.unpack(data)
    return turn, caller, name


def unanswered(path: str, what: str, seconds: float | None) -> SyscallTimeout:
    """For who got no answer to `what` from the kernel at `path` within so many seconds: with what that is at."""
    return _unanswered(look(path), what, seconds)


def _unanswered(status: Status | None, what: str, seconds: float | None) -> SyscallTimeout:
    if status is not None and status.is_stuck:
        return SyscallTimeout(what, seconds, why=str(status))
    said = f": {status}" if status is not None and (status.handler or (status.seconds or 0) >= LATE) else ""
    return SyscallTimeout(what, seconds, why=f"no answer to {what!r} within {seconds} s{said}")


class Patience:
    """How long an answer is waited for where nobody said: asked at first, and whenever that is over, for how many
    seconds (more).

    After `LATE` seconds a kernel that cannot answer ends it, else `BOUND` seconds do: SyscallTimeout, whose text says
    what the kernel is at.
    """

    def __init__(self, path: str, what: str) -> None:
        self._path, self._what = path, what
        self._began: float | None = None

    def __call__(self) -> float:
        """Seconds (more). SyscallTimeout: it has been long enough."""
        now = time.monotonic()
        if self._began is None:
            self._began = now
            return LATE
        waited = now - self._began
        status = look(self._path)
        if waited >= BOUND or (status is not None and status.is_stuck):
            raise _unanswered(status, self._what, round(waited, 1))
        return min(LATE, BOUND - waited)
