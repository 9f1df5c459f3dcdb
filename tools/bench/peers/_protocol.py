"""What every peer shares: requests and answers, the clock, partner processes, the work on bytes.

A peer is a program. One request a line on stdin, `OP ARG ...`; one answer a line on stdout: `ok NANOSECONDS`, the wall
time of COUNT operations together, or `no REASON`. It ends, and leaves nothing behind, at the end of stdin.

    LENGTH  bytes, 1 or more            WORK  none, touch (8 words), read (sum of all), write (all)
    COUNT   operations, 1 or more       PIN   1 puts the two processes on two CPUs
    MODE    attach (each time anew) or keep (attached once)

An operation is a Python function; the names of its parameters say which of these it takes, in their order.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import inspect
import itertools
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from typing import Any, NoReturn

PREFIX = f"realmap-bench-{os.getpid()}-"  # of whatever a peer leaves in /dev/shm or the directory for temporary files
SIGNALS = (signal.SIGTERM, signal.SIGINT)  # that ask a peer to end
PR_SET_PDEATHSIG = 1

at_end = contextlib.ExitStack()  # what an operation prepared and kept is given back through this
_partners: dict[tuple[Any, ...], Partner] = {}
_libc = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):
    """This cannot be done here; the text says why, in one line."""


def package(name: str) -> Any:
    """The package, or None: see require()."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def require(*names: str) -> None:
    """Refuses what needs a package that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise Refused(f"{name} is not installed")


class Ended(BaseException):
    """A signal asks this process to end."""


# A peer forks its partners whenever they are first needed: there must be no thread, and numpy would start some.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
numpy = package("numpy")


# ---- requests ----


def _number(word: str) -> int:
    if not (word.isascii() and word.isdigit() and 1 <= int(word) <= 1 << 40):
        raise Refused(f"not a whole number from 1 to {1 << 40}: {word}")
    return int(word)


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(word: str) -> str:
        if word not in choices:
            raise Refused(f"{word} is none of {', '.join(choices)}")
        return word

    return parse


_PARSERS: dict[str, Callable[[str], Any]] = {
    "length": _number,
    "count": _number,
    "work": _one_of("none", "touch", "read", "write"),
    "mode": _one_of("attach", "keep"),
    "pin": lambda word: _one_of("0", "1")(word) == "1",
}


def _run(line: str, operations: dict[str, Callable[..., int]]) -> int:
    name, *words = line.split() or [""]
    if name not in operations:
        raise Refused(f"unknown op {name}" if name else "an empty request")
    takes = list(inspect.signature(operations[name]).parameters)
    if len(words) != len(takes):
        raise Refused(f"{name} takes {' '.join(takes).upper()}")
    return operations[name](*(_PARSERS[kind](word) for kind, word in zip(takes, words, strict=True)))


def _answer(line: str, operations: dict[str, Callable[..., int]]) -> str:
    try:
        return f"ok {_run(line, operations)}"
    except Refused as error:
        return " ".join(f"no {error}".split())
    except Exception as error:
        stop_partners()  # one of them may be anywhere in its part of this
        return " ".join(f"no {type(error).__name__}: {error}".split())


def _end(number: int, _frame: object) -> NoReturn:
    raise Ended(number)


def serve(operations: dict[str, Callable[..., int]], watched: bool = False) -> None:
    """Answers requests until stdin ends. An operation returns the nanoseconds that it took.

    `watched` is for peers that make names (all with PREFIX): they are removed even if this process is killed.
    """
    if watched:
        at_end.callback(_watch())
    # A library that prints must not be taken for an answer.
    answers = os.dup(1)
    os.dup2(2, 1)
    for number in SIGNALS:
        signal.signal(number, _end)
    ended_by = None
    try:
        for line in sys.stdin:
            os.write(answers, f"{_answer(line, operations)}\n".encode())
    except Ended as end:
        ended_by = end.args[0]
    except BrokenPipeError:
        pass  # nobody listens any more
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        stop_partners()
        at_end.close()
    if ended_by is not None:  # ends as it would have without a handler
        signal.signal(ended_by, signal.SIG_DFL)
        signal.raise_signal(ended_by)


def _watch() -> Callable[[], object]:
    """Forks a process that waits until this one and its partners have ended, and removes what they have left."""
    theirs, ours = os.pipe()  # partners inherit our end, so that the other sees its end after theirs
    pid = os.fork()
    if pid == 0:
        try:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            os.dup2(theirs, 0)
            os.close(1)
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # whoever waits for the end of these should not wait for us
            os.read(0, 1)
            _remove_leftovers()
        finally:
            os._exit(0)
    os.close(theirs)

    def end() -> None:
        os.close(ours)
        os.waitpid(pid, 0)

    return end


def _remove_leftovers() -> None:
    for place in ("/dev/shm", tempfile.gettempdir()):
        for entry in os.scandir(place):
            if not entry.name.startswith(PREFIX):
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry, ignore_errors=True)
            else:
                with contextlib.suppress(FileNotFoundError):  # a library may have somebody who tidies up as well
                    os.unlink(entry)


# ---- measuring ----


def timed(operation: Callable[[], object], count: int, warm: int = 1) -> int:
    """Nanoseconds (CLOCK_MONOTONIC) of `count` calls, after `warm` that are not timed. A call itself is some 30 ns."""
    for _ in range(warm):
        operation()
    calls = itertools.repeat(None, count)
    start = time.monotonic_ns()
    for _ in calls:
        operation()
    return time.monotonic_ns() - start


def total(buffer: Any, length: int) -> int:
    """The sum modulo 2**64 of the 64-bit words in the first `length` bytes; of a last, incomplete word nothing."""
    return int(numpy.ndarray((length // 8,), numpy.uint64, buffer).sum())


def worker(work: str, buffer: Any, length: int) -> Callable[[], object]:
    """A function that does WORK on the first `length` bytes of a buffer, which has to outlive it."""
    data = numpy.ndarray((length,), numpy.uint8, buffer)
    words = data[: length // 8 * 8].view(numpy.uint64)
    rest = data[length // 8 * 8 :]
    if work == "touch":
        step = len(words) // 8
        return words[: 8 * step : step].sum if step else data.sum
    if work == "read":
        return (lambda: words.sum() + rest.sum()) if len(rest) else words.sum
    if work == "write":
        values = itertools.cycle(range(256))
        return lambda: data.fill(next(values))
    return lambda: None


@contextlib.contextmanager
def pinned(partner: Partner, pin: bool) -> Iterator[None]:
    """This process on one CPU and the partner on another, where `pin` says so; afterwards as before."""
    before = os.sched_getaffinity(0)
    if not pin:
        yield
        return
    if len(before) < 2:
        raise Refused("only one CPU")
    try:
        for pid, cpu in zip((0, partner.pid), sorted(before), strict=False):
            os.sched_setaffinity(pid, {cpu})
        yield
    finally:
        os.sched_setaffinity(0, before)
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(partner.pid, before)


# ---- partners ----


class Partner:
    """A forked process that runs target(channel, *args); `channel` here is the other end. It blocks between rounds.

    It is killed when this process ends, in whatever way.
    """

    def __init__(self, target: Callable[..., None], args: tuple[Any, ...], pair: Callable[[], Any]) -> None:
        self.channel, theirs = pair()
        parent = os.getpid()
        # A handler that raises in the child would have it go on as if it were the peer.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                for number in SIGNALS:
                    signal.signal(number, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
                if _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) or os.getppid() != parent:
                    os._exit(1)  # the second: it died before the first
                # An end of another partner's channel that stays open here would keep that one from seeing its end.
                for other in (self, *_partners.values()):
                    other.channel.close()
                target(theirs, *args)
            except (EOFError, ConnectionError):
                pass
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        theirs.close()

    def stop(self) -> None:
        """Ends it; what it leaves is given back by this process."""
        self.channel.close()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def partner(target: Callable[..., None], *args: Any, pair: Callable[[], Any] = Pipe) -> Partner:
    """The one partner that runs target(channel, *args), forked at its first use."""
    key = (target, *args)
    if key not in _partners:
        _partners[key] = Partner(target, args, pair)
    return _partners[key]


def stop_partners() -> None:
    """Ends them all."""
    while _partners:
        _partners.popitem()[1].stop()
