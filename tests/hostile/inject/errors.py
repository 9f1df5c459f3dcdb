"""Part A: each system call of each main path fails, at each of its occurrences, with each errno that is likely."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import served
import strace
from paths import PATHS
from paths import Path as MainPath
from puppet import Cleanup, Order, Outcome, Puppet
from served import Served

from realmap import KernelError

#: What the man pages make likely. A call that is not here is not injected: it cannot fail in a process that is sound
#: (getpid, rt_sigaction with good arguments, …), or waits and does nothing else (futex).
ERRNOS: dict[str, tuple[str, ...]] = {
    "openat": ("EMFILE", "ENFILE", "ENOMEM", "ENOSPC", "EACCES", "EINTR"),
    "ftruncate": ("EINTR", "EFBIG", "EIO", "EPERM"),
    "fallocate": ("ENOSPC", "EINTR", "ENOMEM", "EFBIG"),
    "fstat": ("ENOMEM", "EIO"),
    "newfstatat": ("ENOMEM", "EIO"),
    "lstat": ("ENOMEM",),
    "statfs": ("ENOMEM", "EIO", "EINTR"),
    "rename": ("EIO", "ENOSPC", "ENOMEM"),
    "inotify_init1": ("EMFILE", "ENFILE", "ENOMEM"),
    "inotify_add_watch": ("ENOSPC", "ENOMEM"),
    "unlink": ("EIO", "ENOMEM", "EACCES", "EBUSY"),
    "link": ("ENOSPC", "ENOMEM", "EIO", "EEXIST"),
    "mkdir": ("ENOSPC", "EACCES"),
    "chmod": ("EIO", "ENOMEM"),
    "flock": ("EINTR", "ENOLCK", "EAGAIN"),
    "mmap": ("ENOMEM", "EAGAIN", "EPERM", "EEXIST", "ENFILE"),
    "munmap": ("ENOMEM",),
    "mprotect": ("ENOMEM",),
    "madvise": ("ENOMEM", "EAGAIN", "EFAULT"),
    "close": ("EINTR", "EIO"),
    "socket": ("EMFILE", "ENFILE", "ENOBUFS", "ENOMEM"),
    "socketpair": ("EMFILE", "ENFILE", "ENOMEM"),
    "connect": ("ECONNREFUSED", "EAGAIN", "EACCES", "ENOMEM", "EINTR"),
    "bind": ("EADDRINUSE", "EACCES", "ENOMEM", "ENOSPC"),
    "listen": ("EADDRINUSE",),
    "accept4": ("EMFILE", "ENFILE", "ENOMEM", "ENOBUFS", "ECONNABORTED", "EINTR"),
    "sendmsg": ("EAGAIN", "ENOBUFS", "ENOMEM", "EINTR", "EPIPE", "ETOOMANYREFS"),
    "sendto": ("EAGAIN", "ENOBUFS", "ENOMEM", "EINTR", "EPIPE", "ECONNRESET"),
    "recvmsg": ("EAGAIN", "EINTR", "ENOMEM", "ECONNRESET"),
    "recvfrom": ("EAGAIN", "EINTR", "ENOMEM", "ECONNRESET"),
    "epoll_create1": ("EMFILE", "ENFILE", "ENOMEM"),
    "epoll_ctl": ("ENOMEM", "ENOSPC"),
    "epoll_wait": ("EINTR", "EBADF"),
    "poll": ("EINTR", "ENOMEM"),
    "eventfd2": ("EMFILE", "ENFILE", "ENOMEM"),
    "memfd_create": ("EMFILE", "ENFILE", "ENOMEM"),
    "fcntl": ("EMFILE", "EINTR", "EPERM"),
    "ioctl": ("EINTR", "ENOMEM"),
    "pidfd_open": ("EMFILE", "ENFILE", "ENOMEM", "ESRCH"),
    "getsockopt": ("ENOPROTOOPT", "EMFILE", "ENOBUFS"),
    "setsockopt": ("ENOMEM", "ENOBUFS"),
    "pread64": ("EIO", "EINTR", "ENOMEM"),
    "pwrite64": ("ENOSPC", "EIO", "EINTR", "ENOMEM"),
    "dup": ("EMFILE", "ENOMEM"),
    "clone3": ("EAGAIN", "ENOMEM"),
    "vfork": ("EAGAIN", "ENOMEM"),
    "pipe2": ("EMFILE", "ENFILE"),
    "read": ("EINTR", "EIO"),
    "write": ("EINTR",),  # of the eventfd; EAGAIN would say that it has rung already, which must then be true
    "readlink": ("ENOMEM", "EIO"),
    "getdents64": ("ENOENT",),
    "lseek": ("EINVAL",),
    "wait4": ("EINTR",),
    "pidfd_send_signal": ("EPERM",),
    "kill": ("EPERM",),
}
#: Without this the kernel cannot go on: it ends, and says why.
ESSENTIAL = {("epoll_wait", "EBADF")}
#: Not tried: subprocess.Popen closes a second time what an injected close left open, and what is left open of the
#: report's socket keeps its end from being seen. Linux leaves nothing open.
EXCUSED = {("boot", "close")}
#: Kernels: microseconds of spinning, and bytes of windows that are kept.
CARRIERS = {"ring": (100.0, 0), "socket": (0.0, 0), "kept": (100.0, 1 << 20)}
#: Paths that a kernel with kept windows goes another way in.
KEPT = ("call-twice", "unmap", "close")
#: What the kernel does after the user's act is over (reaping) is given so long. Seconds.
TRAIL = 0.005


@dataclass
class Tally:
    """What came of one call of one path with one errno, over its occurrences."""

    path: str
    carrier: str
    target: str
    call: str
    errno: str
    tried: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)

    @property
    def name(self) -> str:
        """As `--path` and `--only` take it."""
        return f"{self.path} {self.carrier} {self.target} {self.call} {self.errno}"


@dataclass
class Failure:
    """Something that was not rolled back, or went wrong otherwise, and the command that does it again."""

    name: str
    what: list[str]
    replay: str


class Sweep:
    """The attempts, one after another, on kernels and a user that live on from each to the next."""

    def __init__(self, folder: Path, seed: int, every: int, say: Callable[[str], None]) -> None:
        """`every`: of the calls with their errnos only one in so many; which, the `seed` says."""
        self._every, self._turn = every, seed
        self._folder = folder
        self._log = folder / "strace"
        self._seed = seed
        self._say = say
        self._kernels: dict[str, tuple[Served, list[str], dict[str, int]]] = {}
        self._puppet: Puppet | None = None
        self.attempts = 0
        self.seconds = 0.0
        self.tallies: list[Tally] = []
        self.failures: list[Failure] = []
        #: Kernels that ended as they must where a call failed that they cannot do without.
        self.ends: list[str] = []
        #: Calls that were seen and are in no table of ours.
        self.unknown: set[str] = set()

    # ---- the processes ----------------------------------------------------------------------

    def _user(self) -> Puppet:
        if self._puppet is None or self._puppet.ended is not None:
            self._puppet = Puppet(self._folder)
        return self._puppet

    def _kernel(self, carrier: str) -> tuple[Served, list[str], dict[str, int]]:
        if carrier not in self._kernels:
            spin, kept = CARRIERS[carrier]
            kernel = Served(self._folder, spin=spin, lazy_unmap=kept)
            kernel.books()
            self._kernels[carrier] = (kernel, [], {})
            # Once without anything injected: what is made the first time is there from then on.
            for path in ("call-blocking", "call-copy"):
                self._run(PATHS[path], carrier, "", "")
            served.wait_until(lambda: not kernel.books()["processes"])  # it may not have reaped its user yet
            self._kernels[carrier] = (kernel, served.descriptors(kernel.pid), kernel.books())
        return self._kernels[carrier]

    def renew(self, carrier: str) -> None:
        """Ends what a failure may have left in disorder; the next attempt has new processes."""
        pids = []
        if self._puppet is not None:
            pids.append(self._puppet.pid)
            self._puppet.end()
            self._puppet = None
        if carrier in self._kernels:
            kernel = self._kernels.pop(carrier)[0]
            pids.append(kernel.pid)
            kernel.end()
        for name in served.names(*pids):
            Path("/dev/shm", name).unlink(missing_ok=True)

    def end(self) -> None:
        """Ends every process. Again: nothing."""
        for carrier in (*self._kernels, ""):
            self.renew(carrier)

    # ---- one attempt ------------------------------------------------------------------------

    def _run(
        self, path: MainPath, carrier: str, target: str, inject: str, calls: str = "all"
    ) -> tuple[list[strace.Call], Outcome | None, list[str]]:
        """One run of a path: what was called, what came of it, what was wrong. `target`: "" is not traced."""
        user = self._user()
        kernel = None if path.within else self._kernels[carrier][0]
        order = Order(path.name, kernel.path if kernel else "", CARRIERS[carrier][0], self._seed)
        user.prepare(order)
        seen: list[strace.Call] = []
        trace = None
        if target:
            pid = kernel.pid if target == "kernel" and kernel else user.pid
            trace = strace.Trace(pid, self._log, calls=calls, inject=inject, threads=not path.one_thread)
        user.go()
        came = user.acted()
        if trace is not None:
            if target == "kernel":
                time.sleep(TRAIL)
            trace.end()
            seen = trace.calls()
        if not came:
            died = user.ended
            return seen, None, ["it hangs" if died is None else f"the user died ({died})", *self._whereabouts(kernel)]
        left_open = [call.descriptor for call in seen if call.injected and call.name == "close"]
        mine = target == "user"
        report = user.undo(Cleanup(left_open if mine else [], [] if mine else left_open))
        if report is None:
            return (
                seen,
                None,
                [f"giving it back hangs, or the user died at it ({user.ended})", *self._whereabouts(kernel)],
            )
        return seen, report.outcome, list(report.left)

    def _whereabouts(self, kernel: Served | None) -> list[str]:
        pids = [process.pid for process in (kernel, self._puppet) if process is not None]
        return [f"{pid}: {line}" for pid in pids for line in served.whereabouts(self._folder, pid)]

    def attempt(self, path: MainPath, carrier: str, target: str, inject: str, calls: str) -> tuple[bool, str]:
        """One run with a call that fails; whether the call came at all, and what came of it."""
        kernel, open_before, books_before = self._kernel(carrier) if not path.within else (None, [], {})
        seen, outcome, wrong = self._run(path, carrier, target, inject, calls)
        hit = [call for call in seen if call.injected]
        call, errno = calls, inject.split("=")[1].split(":")[0]
        if kernel is not None and hit and (call, errno) in ESSENTIAL:
            served.wait_until(lambda: kernel.ended is not None, 5.0)
        if kernel is not None and kernel.ended is not None:
            self.renew(carrier)
            if hit and (call, errno) in ESSENTIAL:
                self.ends.append(f"{path.name} {carrier}: {call} {errno}: exit status {kernel.ended}")
                return True, "the kernel ended"
            wrong = [f"the kernel died (exit status {kernel.ended})", *wrong]
        elif kernel is not None and not any("hangs" in one for one in wrong):
            wrong += _kernel_is_as_before(kernel, open_before, books_before)
        pids = [process.pid for process in (kernel, self._puppet) if process is not None]
        wrong += [f"a name is left: {name}" for name in served.names(*pids)]
        if outcome is not None:
            wrong += _judged(outcome, path)
        if wrong:
            self.renew(carrier)
            replay = f"tools/inject errors --path {path.name} --carrier {carrier} --target {target} --only {call}"
            what = [*wrong, f"outcome: {outcome}", *(f"{one.name}{one.text}" for one in hit)]
            failure = Failure(f"{path.name} {carrier} {target} {inject}", what, f"{replay} --errno {errno}")
            self.failures.append(failure)
            self._say(f"FAILED {failure.name}: " + "; ".join(what[:4]))
        if outcome is None:
            return bool(hit), "no end"
        return bool(hit), outcome.error + (f"({outcome.inner})" if outcome.inner else "") or "success"

    # ---- all of them ------------------------------------------------------------------------

    def sweep(self, path: MainPath, carrier: str, target: str, only: str = "", errno: str = "") -> None:
        """Every call of a path, in one of the two processes."""
        begun = time.monotonic()
        if not path.within:
            self._kernel(carrier)
        seen, outcome, wrong = self._run(path, carrier, target, "")
        if wrong or outcome is None or not outcome.right:
            name = f"{path.name} {carrier} {target}, nothing injected"
            self.failures.append(Failure(name, [*wrong, str(outcome)], f"tools/inject errors --path {path.name}"))
            self._say(f"FAILED {name}: {wrong} {outcome}")
            self.renew(carrier)
            return
        counts = strace.occurrences(seen)
        self.unknown |= set(counts) - set(ERRNOS)
        for call, count in sorted(counts.items()):
            for error in ERRNOS.get(call, ()):
                if only not in ("", call) or errno not in ("", error) or (path.name, call) in EXCUSED:
                    continue
                self._turn += 1
                if self._turn % self._every == 0:
                    self._each_occurrence(path, carrier, target, Tally(path.name, carrier, target, call, error), count)
        self.seconds += time.monotonic() - begun

    def _each_occurrence(self, path: MainPath, carrier: str, target: str, tally: Tally, count: int) -> None:
        # How often a call comes differs a little from run to run: to the end, and a little beyond.
        if (tally.call, tally.errno) in ESSENTIAL:
            if target != "kernel":
                return
        for number in range(1, count + 4 if (tally.call, tally.errno) not in ESSENTIAL else 2):
            inject = f"{tally.call}:error={tally.errno}:when={number}"
            hit, came = self.attempt(path, carrier, target, inject, tally.call)
            self.attempts += 1
            if hit:
                tally.tried += 1
                tally.outcomes[came] += 1
            elif number >= count:
                break
        self.tallies.append(tally)


def _kernel_is_as_before(kernel: Served, open_before: list[str], books_before: dict[str, int]) -> list[str]:
    """What is not as it was: the books, descriptors, and what Linux says of both; once what is under way has ended."""
    wrong: list[str] = []
    try:
        served.wait_until(lambda: kernel.books() == books_before)
    except KernelError as error:
        return [f"the kernel died: {error}"]
    served.wait_until(lambda: not served.opened_since(open_before, kernel.pid))
    if (books := kernel.books()) != books_before:
        wrong.append(f"kernel's books: {books_before} became {books}")
    if more := served.opened_since(open_before, kernel.pid):
        wrong.append(f"kernel's descriptors: {more} beside {open_before}")
    if not (report := kernel.audit()):
        wrong.append(f"audit: {report}")
    return wrong


def _judged(outcome: Outcome, path: MainPath) -> list[str]:
    """What is wrong with what the path's own process saw."""
    if not outcome.error:
        return [] if outcome.right else ["a wrong result"]
    if outcome.inner:
        # A handler's MemoryError is what it is; that there is no thread is said by a RuntimeError. All else is ours.
        if outcome.inner == "MemoryError" or "can't start new thread" in outcome.text:
            return []
        return [f"a {outcome.inner} where an error of ours is due"]
    if outcome.ours or outcome.error == "MemoryError":
        return []
    return [f"{outcome.error}, which is none of ours: {outcome.text}"]


def plan(paths: list[str], carrier: str, target: str) -> Iterator[tuple[MainPath, str, str]]:
    """The paths to sweep, each with a carrier and the process whose calls fail. Empty: all of them."""
    for each in PATHS.values():
        if paths and each.name not in paths:
            continue
        carriers = ["ring"] if each.within else [*CARRIERS] if each.name in KEPT else ["ring", "socket"]
        for one in carriers:
            for process in ("user",) if each.within else ("kernel", "user"):
                if carrier in ("", one) and target in ("", process):
                    yield each, one, process
