"""A kernel in a forked process, cheap enough to make one for every kill; and what must hold of it."""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import os
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import realmap
from realmap import Call, UserBuffer, syscall
from realmap.host import procfs, runtime
from realmap.kernel import Kernel
from realmap.memory import KERNEL_LAND, USER_LAND
from realmap.observe.audit import AuditReport, audit
from realmap.observe.snapshot import Snapshot
from realmap.serving import workers
from realmap.wire import messages
from realmap.wire.client import Client

#: A bound on everything: what takes longer hangs. Seconds.
BOUND = 20.0
#: What the kernel's books must say after an attempt as they did before it.
KEYS = ("processes", "mappings", "mirrors", "segments", "bytes", "running", "seats", "sessions", "grants")


@syscall
def digest(call: Call, data: UserBuffer, populate: bool = False) -> str:
    """Digests in place."""
    with data.mirror(realmap.k_r, populate=populate) as mirror:
        return hashlib.sha256(mirror).hexdigest()


@syscall(blocking=True)
def slow_digest(call: Call, data: UserBuffer) -> str:
    """The same on a worker thread, after a moment in which its caller sleeps."""
    with data.mirror(realmap.k_r) as mirror:
        time.sleep(0.01)
        return hashlib.sha256(mirror).hexdigest()


@syscall
def copy(call: Call, source: UserBuffer, target: UserBuffer) -> int:
    """Copies one buffer into another, without mapping either."""
    target.copy_out(source.copy_in())
    return len(source)


@syscall
def echo(call: Call, value: Any) -> Any:
    """The argument again."""
    return value


@syscall
def shut(call: Call, descriptors: list[int]) -> list[int]:
    """Closes what an injected close left open; those that were not open any more."""
    return shut_all(descriptors)


HANDLERS = [digest, slow_digest, copy, echo, shut]


def shut_all(descriptors: list[int]) -> list[int]:
    """Closes descriptors of this process; those that were closed already, by a second close of the same one."""
    wrong = []
    for descriptor in descriptors:
        try:
            os.close(descriptor)
        except OSError:
            wrong.append(descriptor)
    return wrong


def wait_until(holds: Callable[[], object], seconds: float = BOUND) -> bool:
    """Waits for an event; whether it came within the bound."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.0005)
    return True


def descriptors(pid: int) -> list[str]:
    """What a process has open, in words, without the numbers that Linux gives to sockets."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            name = os.readlink(f"/proc/{pid}/fd/{fd}")
        except FileNotFoundError:  # the one that the listing itself was open by
            continue
        found.append(name.partition(":[")[0] if name.startswith(("socket:", "pipe:")) else name)
    return sorted(name for name in found if not name.startswith(f"/proc/{pid}/fd"))


def opened_since(opened: list[str], pid: int) -> list[str]:
    """What a process has open beyond these: when they were looked at, a connection may have been about to close."""
    return list((Counter(descriptors(pid)) - Counter(opened)).elements())


def names(*pids: int) -> list[str]:
    """Names in /dev/shm of segments that these processes made. Others may be at work on the same machine."""
    found = [name for name in os.listdir("/dev/shm") if name.startswith(runtime.SEGMENT_PREFIX)]
    return [name for name in found if name.removeprefix(runtime.SEGMENT_PREFIX).split(".")[1] in map(str, pids)]


def land_maps() -> list[str]:
    """What this process has mapped in the two lands, but anchors."""
    return [
        f"{entry.start:#x} {entry.perms}"
        for entry in procfs.maps("self", USER_LAND.start, KERNEL_LAND.end)
        if entry.perms != "---p" or entry.end % (1 << 39)
    ]


def divert(file: Path) -> None:
    """What this process says on its stderr goes into a file: logs of what was done to it are no news.

    So does where its threads are, on SIGUSR1.
    """
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.dup2(fd, 2)
    os.close(fd)
    faulthandler.register(signal.SIGUSR1, all_threads=True)


def whereabouts(folder: Path, pid: int) -> list[str]:
    """Where the threads of a process that diverted its stderr are; and what it said before."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGUSR1)
        time.sleep(0.2)
    return [line for file in folder.glob(f"*.{pid}") for line in file.read_text().splitlines()[-60:]]


class Reaped:
    """A forked process that is reaped by being asked for its end."""

    pid: int
    _status: int | None = None

    @property
    def ended(self) -> int | None:
        """None while it runs; then its exit status, or minus the signal that ended it. It is reaped by that."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status


class Served(Reaped):
    """A kernel in a forked process of its own, as the harness sees it."""

    def __init__(
        self, folder: Path, *, spin: float, lazy_unmap: int = 0, prepare: Callable[[], None] = lambda: None
    ) -> None:
        """`prepare`: called in its process, before it serves."""
        ours, theirs = socket.socketpair()
        self.pid = os.fork()
        if not self.pid:
            status = 1
            try:
                ours.close()
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                divert(folder / f"kernel.{os.getpid()}")
                prepare()
                # Where Linux has no memory for a thread as it begins, threading waits for ever: none begins anew.
                workers.IDLE = 1e6
                kernel = Kernel(syscalls=HANDLERS, spin=spin, lazy_unmap=lazy_unmap)
                signal.signal(signal.SIGTERM, lambda *_: kernel.stop(wait=False))
                kernel.serve(ready=lambda: (theirs.sendall(kernel.path.encode()), theirs.close()) and None)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        theirs.close()
        with ours:
            ours.settimeout(BOUND)
            self.path = ours.recv(4096).decode()
        self._control = Client(self.path, control=True)

    def ask(self, what: str) -> Any:
        """A service of the kernel. KernelError: it is gone, or does not answer in time."""
        return self._control.request(messages.Ask(self._control.next_id(), what), timeout=BOUND)[0]

    def books(self) -> dict[str, int]:
        """The totals that an attempt must leave as they were."""
        stats = self.ask("stats")
        return {key: stats[key] for key in KEYS}

    def audit(self) -> AuditReport:
        """The books held against /proc, of the processes in the books alone.

        Who else maps something of the kernel's is no difference; and to look at every process of the machine would
        take longer than all the rest of an attempt.
        """
        sys.modules[audit.__module__]._unregistered = lambda *_: []  # type: ignore[attr-defined]
        return audit(lambda: Snapshot.ask(self._control, BOUND))

    def end(self) -> None:
        """Ends it, whatever state it is in. Again: nothing."""
        self._control.close()
        if self.ended is None:
            os.kill(self.pid, signal.SIGTERM)
            if not wait_until(lambda: self.ended is not None, 3.0):
                os.kill(self.pid, signal.SIGKILL)
                wait_until(lambda: self.ended is not None)
