"""The status page: what a kernel is at, told without its help, for whoever gets no answer.

    kernel   writes a word or two at each turn of its loop, and around each short handler
    reader   PATH.lock names the kernel and its page ──▶ /proc/PID/fd/N ──▶ `Status`, a sentence

The page is a sealed memfd: the kernel alone can write to it, and nobody can cut it short, so that no write of the
kernel ever hits memory that is gone. It has a name only in the lock file beside the socket, and ends with the kernel.
It is written before each handler, not when one is late: one that keeps the GIL in C lets no thread write then.

    word  0      magic, with the version of this layout
          1      when the loop took up what it is at, or fell asleep, in nanoseconds of the monotonic clock
          2      whether it is asleep
          3      the pid that the short handler works for which it is in; 0: it is in none
          4-11   the name of that handler, or of the last one: UTF-8, cut at a whole letter, padded with NULs
          then, for each of the first handlers that are at work on other threads (any of them may keep the GIL, too):
          0      when it began; 0: nobody is here
          1      the pid that it works for
          2-9    its name
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import mmap
import os
import struct
import time
from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakValueDictionary

import msgspec

from realmap._core import read_file
from realmap.errors import SyscallTimeout
from realmap.host import files, procfs, runtime
from realmap.host.signals import pass_on

MAGIC = b"realmap\x03"
LONGEST_NAME = 64
TURN, ASLEEP, CALLER = 1, 2, 3
_LAYOUT = struct.Struct(f"=8s3Q{LONGEST_NAME}s")
_BESIDE = struct.Struct(f"=2Q{LONGEST_NAME}s")
#: How many handlers on other threads it has room for.
PLACES = 16
_SIZE = _LAYOUT.size + PLACES * _BESIDE.size
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
        self._take(bytearray(_SIZE))

    def _take(self, memory: bytearray | mmap.mmap) -> None:
        self._view = memoryview(memory)
        #: Written to where calling a method would cost more than the store: TURN, and CALLER around a handler. Nobody
        #: keeps it: a forked child has to get rid of it.
        self.words = self._view[: _LAYOUT.size].cast("Q")
        #: When the loop took up what it is at: exactly, and here alone.
        self.now = 0
        #: The label that is there.
        self.named = b""
        self._free = list(range(PLACES))

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
        self._take(bytearray(_SIZE))
        if fd >= 0:
            files.close(fd)

    def turn(self) -> None:
        """The loop begins to work on something."""
        self.words[TURN] = self.now = time.monotonic_ns()
        self.words[ASLEEP] = 0

    def rest(self) -> None:
        """The loop sleeps until there is something to do."""
        self.words[TURN] = time.monotonic_ns()
        self.words[ASLEEP] = 1

    def name(self, label: bytes) -> None:
        """A handler of this `label` is about to begin."""
        self._view[_LAYOUT.size - LONGEST_NAME : _LAYOUT.size] = label
        self.named = label

    def begin(self, caller: int, label: bytes, since: float) -> int:
        """A handler is on another thread from now on, at work since then (monotonic, in seconds): its place, for `end`;
        -1: there is none for it. From any thread.
        """
        try:
            place = self._free.pop()
        except IndexError:
            return -1
        _BESIDE.pack_into(self._view, _LAYOUT.size + place * _BESIDE.size, int(since * 1e9), caller, label)
        return place

    def end(self, place: int) -> None:
        if place >= 0:
            _BESIDE.pack_into(self._view, _LAYOUT.size + place * _BESIDE.size, 0, 0, b"")
            self._free.append(place)


class Work(NamedTuple):
    """A handler at work, of the process of that pid, for so many seconds."""

    handler: str
    caller: int
    seconds: float

    def __str__(self) -> str:
        return f"handler {self.handler!r} of process {self.caller} since {_in_words(self.seconds)}"


def _in_words(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


class Status(msgspec.Struct, frozen=True):
    """What a kernel is at; `str` says it in a sentence.

    `pid`: its process; `stopped`: whether that is (SIGSTOP). `work`: the short handler that has its loop; `beside`:
    those on other threads, the latest first. `seconds`: how long the loop is at what it is at, or `asleep`; None: it
    does not say.
    """

    pid: int
    stopped: bool = False
    work: Work | None = None
    beside: tuple[Work, ...] = ()
    seconds: float | None = None
    asleep: bool = False

    @property
    def is_stuck(self) -> bool:
        """Whether it is of no use to wait for it: it is stopped, or has been in one handler for a second or more."""
        return self.stopped or (self.work is not None and self.work.seconds >= LATE)

    def __str__(self) -> str:
        if self.stopped:
            return f"kernel {self.pid} is stopped (SIGSTOP)"
        if self.work is not None:
            return f"kernel {self.pid} is in {self.work}"
        if self.seconds is None:
            return f"kernel {self.pid} runs, and does not say what it is at"
        fact = "does not wake up" if self.asleep else f"has not come round for {_in_words(self.seconds)}"
        others = f", and {len(self.beside) - 1} more" if len(self.beside) > 1 else ""
        threads = f"; on another thread it is in {self.beside[0]}{others}" if self.beside else ""
        return f"kernel {self.pid} {fact}{threads}"


def look(path: str) -> Status | None:
    """What the kernel at `path` (its socket) is at. None: none lives there, or none that says. Never waits."""
    try:
        pid, number = runtime.kernel_at(path)
        stopped = procfs.is_stopped(pid)
    except (OSError, ValueError) as error:
        pass_on(error)
        return None
    try:
        before, data = _read(pid, number), _read(pid, number)
    except (OSError, ValueError) as error:
        pass_on(error)
        return Status(pid, stopped)
    _, turn, asleep, caller, name = _LAYOUT.unpack_from(data)
    # The same call before and after: what is told of it belongs together. One that matters began a second ago, and what
    # was written then has long arrived, in whichever order.
    if data[: _LAYOUT.size] != before[: _LAYOUT.size]:
        return Status(pid, stopped)
    now = time.monotonic_ns()
    work = _work(turn, caller, name, now) if caller else None
    places = sorted(_BESIDE.iter_unpack(data[_LAYOUT.size :]), reverse=True)
    beside = tuple(_work(began, caller, name, now) for began, caller, name in places if began)
    return Status(pid, stopped, work, beside, max(0, now - turn) / 1e9 if turn else None, bool(asleep))


def _work(began: int, caller: int, name: bytes, now: int) -> Work:
    return Work(name.rstrip(b"\0").decode(errors="replace"), caller, max(0, now - began) / 1e9)


def _read(pid: int, number: int) -> bytes:
    """What is in the page. It is not mapped: in the end it is somebody else's file.

    ValueError, OSError: there is no such page.
    """
    place = f"/proc/{pid}/fd/{number}"
    if not os.readlink(place).startswith(f"/memfd:{_MEMFD}"):  # before it is opened: it may be anything
        raise ValueError(f"{place} is no status page")
    data = read_file(place.encode(), _SIZE)
    if len(data) < _SIZE or not data.startswith(MAGIC):
        raise ValueError(f"{place} is no status page that this version reads")
    return data


def unanswered(path: str, what: str, seconds: float | None) -> SyscallTimeout:
    """For who got no answer to `what` from the kernel at `path` within so many seconds: with what that is at."""
    status = look(path)
    return _unanswered(status, what, seconds, status is not None and status.is_stuck)


def _unanswered(
    status: Status | None, what: str, seconds: float | None, stuck: bool, starves: bool = False
) -> SyscallTimeout:
    if stuck and not starves:
        return SyscallTimeout(what, seconds, why=str(status))
    busy = status is not None and not status.asleep and (status.work or (status.seconds or 0) >= LATE)
    said = ": its kernel gets no CPU, or Linux keeps it" if starves else f": {status}" if busy else ""
    return SyscallTimeout(what, seconds, why=f"no answer to {what!r} within {seconds} s{said}")


class Patience:
    """How long an answer is waited for where nobody said: asked at first, and whenever that is over, for how many
    seconds (more).

    After `LATE` seconds a kernel that cannot answer ends it, after twice that one of which another thread seems to keep
    the GIL, else `BOUND` seconds do: SyscallTimeout, whose text says what the kernel is at. One that has had no CPU
    since then, or that Linux keeps within a system call (to close a page of tmpfs has taken 2 s), may still answer.
    """

    def __init__(self, path: str, what: str) -> None:
        self._path, self._what = path, what
        self._began: float | None = None

    def __call__(self) -> float:
        """Seconds (more). SyscallTimeout: it has been long enough."""
        if self._began is None:
            self._began, self._had = time.monotonic(), _user_time(self._path)
            return LATE
        status = look(self._path)
        waited = time.monotonic() - self._began
        stuck = status is not None and (status.is_stuck or (waited >= 2 * LATE and _is_kept(status, waited)))
        starves = status is not None and stuck and not status.stopped and self._starves(status.pid)
        if waited >= BOUND or (stuck and not starves):
            raise _unanswered(status, self._what, round(waited, 1), stuck, starves)
        return min(LATE, BOUND - waited)

    def _starves(self, pid: int) -> bool:
        """Whether it would run, and has not had a CPU of its own for half of `LATE` seconds since it was asked."""
        try:
            return procfs.user_time(pid) - self._had < LATE / 2 and procfs.would_run(pid)
        except OSError as error:
            pass_on(error)
            return False


def _user_time(path: str) -> float:
    """`procfs.user_time` of the kernel at `path`; -inf: nobody can say."""
    try:
        return procfs.user_time(runtime.kernel_at(path)[0])
    except (OSError, ValueError) as error:
        pass_on(error)
        return -math.inf


def _is_kept(status: Status, seconds: float) -> bool:
    """Whether it has done nothing for so long, though asked, and not for a large snapshot's sake."""
    idle = status.seconds is not None and status.seconds > seconds
    return idle and (status.asleep or bool(status.beside))


class Remembered:
    """The page of a kernel that this process has booted, held beyond its death: what it was at then."""

    def __init__(self, path: str, death: Callable[[], str | None]) -> None:
        """`death`: says how it ended, or None if it is not known."""
        self._fd = -1
        self.death = death
        with contextlib.suppress(OSError, ValueError):
            pid, number = runtime.kernel_at(path)
            self._fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDONLY | os.O_CLOEXEC)
        _remembered[path] = self

    def handlers(self) -> list[str]:
        """The handlers that it was in."""
        data = os.pread(self._fd, _SIZE, 0) if self._fd >= 0 else b""
        if len(data) < _SIZE:
            return []
        _, turn, _, caller, name = _LAYOUT.unpack_from(data)
        at = [(turn, caller, name)] if caller else []
        at += [each for each in _BESIDE.iter_unpack(data[_LAYOUT.size :]) if each[0]]
        return [f"handler {_work(*each, each[0]).handler!r} of process {each[1]}" for each in at]

    def close(self) -> None:
        """Again: nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            files.close(fd)

    def __del__(self) -> None:
        self.close()


#: By the path of the kernel; whoever has booted it holds them.
_remembered: WeakValueDictionary[str, Remembered] = WeakValueDictionary()


def why_it_died(path: str) -> str:
    """What to say of the kernel at `path`, which has died: for its booter with how, and in which handler."""
    said = f"the kernel at {path!r} has died"
    ours = _remembered.get(path)
    how = ours.death() if ours is not None else None
    if ours is None or how is None:
        return said
    handlers = " and ".join(ours.handlers())
    return f"{said}: it {how}" + (f" in {handlers}" if handlers else "")
