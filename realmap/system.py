"""boot() and connect(): kernel and user, put together."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import signal
import socket
from collections.abc import Callable, Iterable
from typing import Any, Self, SupportsIndex

from realmap.errors import InvalidHandle, KernelDied, KernelError
from realmap.host import files, forks, interpreter, liveness, outcome, runtime, signals
from realmap.host.interpreter import Child
from realmap.host.signals import Living
from realmap.host.translate import shortage
from realmap.kernel.kernel import Kernel
from realmap.kernel.limits import Limits
from realmap.memory.lands import KERNEL_LAND
from realmap.observe.announce import announce
from realmap.observe.audit import AuditReport
from realmap.observe.control import Control
from realmap.observe.snapshot import Snapshot
from realmap.observe.trace import Trace
from realmap.serving import logs
from realmap.serving.registry import registry
from realmap.serving.user_buffer import UserBuffer
from realmap.user.process import Process
from realmap.user.spawned import SpawnedProcess as SpawnedProcess
from realmap.user.spawned import spawn
from realmap.wire import status
from realmap.wire.records import CAPACITY
from realmap.wire.ring import SPIN, checked_spin

#: What the process of a booted kernel is called.
KERNEL = "realmap-kernel"
#: How long a kernel may take to say that it serves: imports on a loaded machine. Seconds.
START_TIMEOUT = 60.0
#: How long the end may take once the kernel was asked for it, its booter has ended, or its sockets have: a handler may
#: go on, and Linux has kept a process in its end for 2 s. Seconds.
GRACE = 5.0
#: How long threads that a handler left may keep the process of a kernel that has ended. Seconds.
LINGER = 1.0
#: The signal by which its booter ends a kernel. SIGTERM does not: systemd, `docker stop` and the like send that to a
#: whole group, whose programs use their memory once more while they end; the kernel ends with its booter in any case.
END = signal.SIGRTMIN


# ---- in the new processes -----------------------------------------------------------------


def _say(report: socket.socket, path: str | Exception) -> None:
    """Where the kernel serves, or why it does not."""
    where = f"process {os.getpid()}, which was to be a kernel"
    if not isinstance(path, Exception):
        data = outcome.of_value(path, "its path")
    else:  # an option is wrong, say; or the initializer has raised
        data = outcome.of_error(path, "" if isinstance(path, KernelError | TypeError) else where)
    with contextlib.suppress(OSError):  # who wanted to know has died
        report.sendall(data)
    files.shut(report)


def _kernel_main(report: socket.socket, booter: int, options: dict[str, Any], owner: int = 0) -> None:
    with contextlib.suppress(Exception):  # without a stderr
        faulthandler.enable()  # where it was when it crashed
    # Not SIG_IGN, which the programs that a handler starts would inherit.
    signals.on(lambda: None, signal.SIGINT, signal.SIGTERM)
    logs.as_environment_says()
    runtime.raise_descriptor_limit()
    try:
        kernel = Kernel(**options)
    except Exception as error:
        _say(report, error)
        return
    kernel.registration.owner = owner

    signals.on(lambda: kernel.stop(wait=False), END)
    interpreter.end_with(booter, GRACE)
    interpreter.call_itself(KERNEL)
    interpreter.take_short_turns()
    try:
        kernel.serve(ready=lambda: _say(report, kernel.path), booter=booter)
    except Exception as error:
        _say(report, error)
    interpreter.end_within(LINGER)


def _tree_main(report: socket.socket, booter: int, options: dict[str, Any], root: tuple[int, int]) -> None:
    """The kernel of a process tree: it ends with the root of that, not with whoever needed it first."""
    files.close(booter)
    try:
        pidfd = os.pidfd_open(root[0])
    except ProcessLookupError:
        pidfd = -1
    if pidfd < 0 or not liveness.same_process_lives(*root):
        _say(report, KernelDied(options["path"], why="the root of the process tree has ended"))
        return
    _kernel_main(report, pidfd, options)


# ---- in the booter ------------------------------------------------------------------------


class KernelHandle:
    """A kernel in a process of its own, as its booter sees it. Made by `boot`; a context manager (`shutdown`).

    What it is asked it answers within a second; or SyscallTimeout says, within two, that it is stopped, or which
    handler keeps it; at the latest after 30 seconds that it has not answered.
    """

    def __init__(self, child: Child, path: str) -> None:
        self._child = child
        self._owner = os.getpid()
        #: What it was at, if it dies.
        self._page = status.Remembered(path, lambda: _death(child))
        #: Of its socket: what `realmap.connect(path)` and `realmap ps --kernel PATH` want to know.
        self.path = path
        self._spawned: set[Child] = set()
        #: Its connection, once there is one.
        self._controls: dict[str, Control] = {}
        _handles.add(self)
        forks.lose_in_child(self)

    @property
    def has_ended(self) -> bool:
        """Whether its process has ended, as far as its booter can tell."""
        return self._child.exitcode is not None

    @property
    def pid(self) -> int:
        """The pid of the kernel's process."""
        return self._child.pid

    def connect(self) -> Process:
        """This process as a user of the kernel. Errors as `realmap.connect`."""
        process = Process(self.path)
        process.keeper = self
        return process

    def spawn(
        self, function: Callable[..., Any], /, *args: Any, name: str | None = None, **kwargs: Any
    ) -> SpawnedProcess:
        """Runs `function(me, *args, **kwargs)` in a new user process; `me` is its `Process`.

        The function and its arguments travel by cloudpickle: those of a script, a notebook or a shell
        work as well. `name`: what ps and top call the process, by default the function's. What it prints comes out
        here, line by line; what it returns is `SpawnedProcess.result()`. An exception is printed, too, and its exit
        code is 1. TypeError: something cannot be sent (it is named), or the function does not take these arguments.
        KernelDied: the kernel has ended.
        PhysicalMemoryExhaustion: Linux has no descriptors, no memory or no processes for it.
        """
        self._require_life()
        spawned = spawn(self, self.path, function, args, name, kwargs)
        self._spawned.add(spawned.child)
        for other in list(self._spawned):
            if other.exitcode is not None:
                self._spawned.discard(other)
        return spawned

    def register(self, *handlers: Callable[..., Any], replace: bool = False) -> None:
        """Adds handlers while the kernel runs: from now on they are called. Errors of theirs as `boot`.

        `replace`: in the place of those of the same names, whose calls that are at work go on to their end. What they
        keep in globals they share with one another, and not with those that came earlier.

        KernelError: the kernel has one of that name already (then none is added), or cannot import what they need.
        InvalidSize: together they take more than 1 MiB, pickled. KernelDied, SyscallTimeout: as `stats`.
        """
        for name, found in registry(handlers, UserBuffer).items():
            interpreter.dumps(found.function, f"the syscall {name!r}")
        self._asked().register(interpreter.dumps((handlers, replace), "the handlers"))

    def unregister(self, name: str) -> None:
        """Takes the handler of that name away; calls of it that are at work go on to their end.

        UnknownSyscall: there is none. KernelDied, SyscallTimeout: as `stats`.
        """
        self._asked().unregister(name)

    def settle(self, timeout: float | None = None) -> None:
        """Waits until everyone who has died by now (or closed its connection) is reaped: its memory is given back.

        What others hold of it stays: a handler at work, a forked child, who attached a handle. At most `timeout`
        seconds (None: for ever), or TimeoutError. KernelDied, SyscallTimeout: as `stats`.
        """
        self._asked().settle(timeout)

    def _require_life(self) -> None:
        if self._child.exitcode is not None:
            ended = f"the kernel at {self.path!r} has ended"
            raise KernelDied(self.path, why=status.why_it_died(self.path) if self._child.exitcode else ended)

    def _asked(self) -> Control:
        """Its connection. InvalidHandle: this is a forked child, which is not its booter."""
        if self._owner != os.getpid():
            raise InvalidHandle(None, why=f"this kernel was booted by process {self._owner}; connect({self.path!r})")
        self._require_life()
        control = self._controls.get("control")
        if control is None:
            made = Control(self.path)
            control = self._controls.setdefault("control", made)
            if control is not made:  # another thread, or a signal handler, was quicker
                made.close()
        return control

    def stats(self) -> dict[str, int]:
        """Totals: processes, mappings, mirrors, segments, bytes, calls, running, descriptors, threads.

        KernelDied: it has ended. SyscallTimeout: it does not answer.
        """
        return self._asked().stats()

    def snapshot(self) -> Snapshot:
        """The kernel's books at one moment: processes, mappings, mirrors, frames and who holds them."""
        return self._asked().snapshot()

    def audit(self) -> AuditReport:
        """Holds the kernel's books against /proc/PID/maps of every process; true as a bool where they agree."""
        return self._asked().audit()

    def trace(self, path: str | os.PathLike[str], *, events: int = CAPACITY) -> Trace:
        """Writes everything that happens to a file that Perfetto (ui.perfetto.dev) and chrome://tracing open.

        From now on, until the end of a `with` block or `close`. Errors as `Trace`.
        """
        return Trace(self._asked().path, path, events=events)

    def shutdown(self, timeout: float = 10.0) -> None:
        """Ends the kernel, and the user processes that were spawned through this handle. Again: nothing.

        Users that connected keep their memory; their calls raise KernelDied. A kernel that has not ended within
        `timeout` seconds is killed, and the log says what it was at: a handler that does not return, say.
        """
        if self._owner != os.getpid():
            return
        _handles.discard(self)
        for child in list(self._spawned):
            child.close()
            self._spawned.discard(child)
        if self._child.exitcode is None:
            with contextlib.suppress(KernelError, OSError):
                self._child.signal(END)
            if self._child.wait(timeout) is None:
                at = status.look(self.path) or f"kernel {self.pid} does not say what it is at"
                logs.log.warning("it did not end within %s s, and is killed: %s", timeout, at)
        self._child.close()
        self._page.close()
        control = self._controls.pop("control", None)
        if control is not None:
            control.close()

    def _after_fork_in_child(self) -> None:
        """In a forked child: the kernel is the parent's."""
        self._controls = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.shutdown(GRACE)

    def __reduce__(self) -> Any:
        why = f"a spawned function has its Process, me; others connect: realmap.connect({self.path!r})"
        raise TypeError(f"a KernelHandle is its booter's own and cannot be pickled; {why}")

    def _repr_svg_(self) -> str | None:
        """In a notebook, its address space as it is now; None where it cannot answer at once: then the text stands."""
        if self._owner != os.getpid() or self.has_ended:
            return None
        at = status.look(self.path)
        if at is not None and at.is_stuck:
            return None
        with contextlib.suppress(KernelError, OSError):
            return self.snapshot()._repr_svg_()
        return None

    def __repr__(self) -> str:
        state = "ended" if self._child.exitcode is not None else "serving"
        return f"<KernelHandle of pid {self.pid}, {state} at {self.path!r}>"


_handles: Living[KernelHandle] = Living()


def _death(child: Child) -> str | None:
    """How the process of a kernel ended, in words. Its sockets close just before it has."""
    exitcode = child.wait(GRACE)
    return None if exitcode is None else outcome.ended(exitcode)


def _shutdown_all() -> None:
    for handle in _handles.all():
        with contextlib.suppress(Exception):
            handle.shutdown(GRACE)


atexit.register(_shutdown_all)


def boot(
    *,
    syscalls: Iterable[Callable[..., Any]] = (),
    memory_limit: SupportsIndex | None = None,
    process_limit: SupportsIndex | None = None,
    kernel_land: SupportsIndex = KERNEL_LAND.length,
    lazy_unmap: SupportsIndex = 0,
    path: str | os.PathLike[str] | None = None,
    spin: float = SPIN,
    limits: Limits | None = None,
    initializer: Callable[[], object] | None = None,
) -> KernelHandle:
    """Starts a kernel in a process of its own, and returns once users can connect to it.

    `syscalls`: the handlers, functions of a script, a notebook or a shell included. `memory_limit`,
    `process_limit`: bytes of frames in all, and for each process. `kernel_land`: bytes of KernelLand.
    `lazy_unmap`: bytes of dropped mirrors that are kept mapped for their next use (by default none).
    `path`: of its socket, by default in a private directory. `spin`: microseconds that both sides of a
    call look for the next message before they sleep; 0 sends everything by the socket. `limits`: what each
    process may have at a time. `initializer`: called there first, without arguments, within the minute that the kernel
    may take to start: what it puts into globals the handlers find; an exception of it is raised here. What handlers
    print and log (by that process's own `logging`: the initializer may set it up) comes out here, line by line; a
    crash says on stderr where it was. The kernel ends with
    `shutdown`, with the `with` block, when nobody refers to the handle (or to what it made by `connect`
    and `spawn`) any more, or with this process, whatever way that dies.

    InvalidSize, InvalidAddress, InvalidHandle, AccessDenied: an option, as `Kernel` says. TypeError: a
    syscall that cannot be sent (it is named), or is no function. ValueError: two of the same name.
    KernelDied: its process ended before it served. PhysicalMemoryExhaustion: Linux has no descriptors, no
    memory or no processes for it. KernelError: it does not start for another reason, or not in time.
    """
    if initializer is not None:
        interpreter.dumps(initializer, "the initializer")
    functions = syscalls if callable(syscalls) else list(syscalls)
    for name, found in registry(functions, UserBuffer).items():
        interpreter.dumps(found.function, f"the syscall {name!r}")
    options: dict[str, Any] = {
        "syscalls": functions,
        "memory_limit": memory_limit,
        "process_limit": process_limit,
        "kernel_land": kernel_land,
        "lazy_unmap": lazy_unmap,
        "path": None if path is None else os.path.abspath(os.fspath(path)),
        "spin": checked_spin(spin),
        "limits": limits,
        "initializer": initializer,
    }
    return KernelHandle(*_start(_kernel_main, options, os.getpid()))


def boot_for(path: str, root: tuple[int, int]) -> None:
    """Starts a kernel at `path` that ends with the process of this pid and start time, and not with this one.

    Errors as `boot`. KernelDied: that process has ended.
    """
    _start(_tree_main, {"path": path}, root, silent=True)[0].leave()


def _start(main: Callable[..., None], *args: Any, silent: bool = False) -> tuple[Child, str]:
    try:
        child = Child(main, *args, silent=silent)
    except OSError as error:
        raise shortage(error, "cannot start a kernel") from None
    try:
        data = child.read_report(START_TIMEOUT)
        if not data:
            how = f"exit code {child.wait(GRACE)} of {child.executable!r}"
            raise KernelDied("", why=f"the kernel's process ended before it served ({how})")
        said: str = outcome.read(data)
        announce(said)
    except BaseException as error:
        child.close()
        if isinstance(error, OSError):
            raise shortage(error, "cannot start a kernel") from None
        raise
    return child, said
