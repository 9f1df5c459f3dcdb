"""A fresh Python interpreter that runs a function of ours.

Not a fork and not multiprocessing: no copies of the booter's threads, locks and descriptors, and
no `if __name__ == "__main__"` guard. The new process gets the booter's sys.path and working
directory, functions by cloudpickle, and a pidfd of the booter that was opened before it starts. What is started is a
Python for certain (`executable`): a frozen program, or one that embeds Python, would start itself. No signal is blocked
there, whatever the booter's thread blocks: a program that waits for its signals by sigwait blocks them all, and a
process that inherits that ignores SIGTERM, and dies of a SIGBUS that it would handle.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import marshal
import math
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import spawn
from typing import Any

from realmap.errors import KernelError
from realmap.host import files, liveness, source
from realmap.host.signals import pass_on

# Only builtin modules are imported before sys.path is the booter's: a file in the working
# directory that is named like one of the standard library must not be picked up. Its own comes behind: a frozen
# program's has nothing for a Python that it named.
_BOOTSTRAP = (
    "import gc, sys, marshal, posix, _signal\n"
    "every = gc.get_threshold(); gc.set_threshold(0)\n"
    "_signal.pthread_sigmask(_signal.SIG_SETMASK, ())\n"
    "fd = int(sys.argv[1]); size = int(sys.argv[2]); data = b''\n"
    "while len(data) < size:\n"
    "    more = posix.read(fd, size - len(data))\n"
    "    if not more: posix._exit(1)\n"
    "    data += more\n"
    "theirs = marshal.loads(data)\n"
    "sys.path[:] = theirs + [each for each in sys.path if each and each not in theirs]\n"
    "from realmap.host.interpreter import _main\n"
    "_main(fd, int(sys.argv[3]), every)\n"
)


#: Whether this process was just started, and reads what it is to run: modules are imported for that.
_is_reading = False
#: Of multiprocessing, unless it is told otherwise.
_at_import = sys.executable or ""
#: Of multiprocessing's locks, queues and barriers.
INHERITED = (
    "; only processes that multiprocessing starts can have these: start the function by multiprocessing.Process, and "
    "realmap.connect(path) there, or else wait for one another in a handler with blocking=True"
)


class Unsendable(TypeError):
    """A function or an argument that cannot be sent to another process; the text names what stands in the way."""


def call_itself(name: str) -> None:
    """Gives this process a name, which ps and top show; Linux takes 15 bytes of it. On its main thread only."""
    with contextlib.suppress(OSError), open("/proc/self/comm", "wb", buffering=0) as file:
        file.write(name.encode()[:15])


def dumps(value: Any, what: str) -> bytes:
    """`value` by cloudpickle. Unsendable: it cannot be; `what` and the culprit among its globals are named.

    KernelError: this process was itself just started, and imports a module that starts one: that would go on for ever.
    """
    if _is_reading:
        raise KernelError(
            why=f"{what} is to run in a process that a module starts while it is imported, and that has to import it "
            "itself; start processes in a function, or have the handlers in a module that imports nothing of that"
        )
    try:
        return source.dumps(value)
    except Exception as error:
        hint = INHERITED if "inheritance" in str(error) else ""
        raise Unsendable(f"{what} cannot be sent to another process: {error}{_culprit(value)}{hint}") from error


def _culprit(value: Any) -> str:
    """Which global or closed-over variable of a function it is that cannot be pickled."""
    code = getattr(value, "__code__", None)
    if code is None:
        return ""
    names = {name: value.__globals__[name] for name in code.co_names if name in value.__globals__}
    cells = zip(code.co_freevars, value.__closure__ or (), strict=False)
    names |= {name: cell.cell_contents for name, cell in cells}
    for name, found in names.items():
        try:
            source.dumps(found)
        except Exception:
            kind = type(found)
            # What has a `__reduce__` has said by itself why it stays here.
            hint = "" if "__reduce__" in vars(kind) else "; make that inside the function"
            return f" (its variable {name!r} holds a {kind.__name__}{hint})"
    return ""


def executable() -> str:
    """The Python that new processes run: the one that multiprocessing was told, this one, or that of its environment.

    KernelError: there is none; `sys.executable` may be empty, or the very program that runs here.
    """
    told = os.fsdecode(spawn.get_executable() or "")
    own = sys.executable or ""
    if told and told not in (own, _at_import):
        return told
    name = f"python{sys.version_info[0]}.{sys.version_info[1]}{sys.abiflags}"
    beside = [os.path.join(prefix, "bin", name) for prefix in (sys.exec_prefix, sys.base_exec_prefix)]
    frozen = {_at_import} if getattr(sys, "frozen", False) else set()
    for path in (told, own, *beside):
        if path not in frozen and _is_python(path):
            return path
    raise no_python(own, "it is this program, frozen" if own in frozen else "it is none")


def _is_python(path: str) -> bool:
    """Whether it is one as far as its name tells: to try would be to start whatever it is."""
    name = os.path.basename(path).lower()
    return ("python" in name or "pypy" in name) and os.access(path, os.X_OK)


def no_python(path: str, why: str) -> KernelError:
    """What to say where `path` is no Python that can be started."""
    return KernelError(
        why=f"cannot start a process: it needs a Python, and {path!r} will not do ({why}); "
        "name one that has realmap by multiprocessing.set_executable(path)"
    )


class Child:
    """A process that this one started and will reap. `report` receives bytes from it until it closes its end."""

    def __init__(self, function: Callable[..., None], *args: Any, silent: bool = False) -> None:
        """Starts `function(report, *args)` in a fresh interpreter; `report` is its end of a stream socket.

        `silent`: it has no stdout and no stderr of ours, whose readers would wait for its end.

        What `dumps` has said nothing against can be sent. KernelError: there is no Python to run it. OSError: no
        process could be started.
        """
        payload = source.dumps((function, args))
        path = marshal.dumps(_search_path())
        #: The Python that runs it.
        self.executable = executable()
        self.report, theirs = socket.socketpair()
        booter = -1
        try:
            booter = os.pidfd_open(os.getpid())
            argv = [self.executable, *_flags(), "-c", _BOOTSTRAP, str(theirs.fileno()), str(len(path)), str(booter)]
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL if silent else None,
                stderr=subprocess.DEVNULL if silent else None,
                pass_fds=(theirs.fileno(), booter),
                process_group=0,  # Ctrl-C in a terminal is for the program, not for what runs under it
            )
        except BaseException as error:
            files.shut(self.report)
            if isinstance(error, OSError):
                pass_on(error)
                if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ENOEXEC):
                    raise no_python(self.executable, str(error.strerror)) from None
            raise
        finally:
            files.shut(theirs)
            if booter >= 0:
                files.close(booter)
        process.returncode = 0  # it is reaped here: else its collection, in a cycle with ours, would warn that it runs
        self.pid = process.pid
        self._owner = os.getpid()
        self._exitcode: int | None = None
        try:
            self.report.sendall(path + struct.pack("=Q", len(payload)) + payload)
        except OSError:  # it died, or will never hear all of it, and ends: whoever waits for its report sees that
            with contextlib.suppress(OSError):
                self.report.shutdown(socket.SHUT_WR)
        except BaseException:
            self.kill()
            self.wait(None)
            raise

    def read_report(self, timeout: float) -> bytes:
        """All that the child reports until it closes its end; what came so far if it dies.

        TimeoutError: it does neither.
        """
        got = b""
        end = time.monotonic() + timeout
        poll = select.poll()  # not select(2): this process may have more than 1024 descriptors
        poll.register(self.report, select.POLLIN)
        while poll.poll(max(0.0, end - time.monotonic()) * 1000):
            try:
                more = self.report.recv(1 << 16)
            except ConnectionResetError:
                more = b""
            if not more:
                files.shut(self.report)
                return got
            got += more
        raise TimeoutError(f"no report from process {self.pid} within {timeout} s")

    @property
    def exitcode(self) -> int | None:
        """None while it runs; then its exit status, or minus the signal that ended it."""
        # Not by `Popen.poll`, nor its `wait`: they have a plain lock, which a signal handler finds taken. Looked at
        # before it is reaped: so nothing is lost where an exception comes in between.
        if self._exitcode is None and self._owner == os.getpid():
            try:
                ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if ended is None:
                    return None
                self._exitcode = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
                os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # somebody else has reaped it: another thread, or who waits for any child
                self._exitcode = self._exitcode or 0
        return self._exitcode

    def wait(self, timeout: float | None) -> int | None:
        """Waits at most `timeout` seconds (None: for ever) and reaps it; its exit code, or None if it still runs."""
        end = math.inf if timeout is None else time.monotonic() + timeout
        pause = 0.0005
        while self.exitcode is None and self._owner == os.getpid() and (left := end - time.monotonic()) > 0:
            if timeout is None:
                with contextlib.suppress(ChildProcessError):
                    os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            else:  # as `Popen.wait` does; a pidfd would be one more descriptor, at an end that must not want any
                time.sleep(min(pause, left))
                pause = min(2 * pause, 0.05)
        return self.exitcode

    def signal(self, number: int) -> None:
        """Sends a signal, unless it was reaped already (its pid may be another's by now)."""
        if self._owner == os.getpid() and self.exitcode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.signal(9)

    def leave(self) -> None:
        """Leaves it to itself: it may outlive this process, which does not wait for it."""
        files.shut(self.report)

    def close(self) -> None:
        """Closes the report and, if the process still runs, kills it and what it has started; reaps it in any case."""
        files.shut(self.report)
        if self._owner == os.getpid():
            if self.exitcode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, 9)
                self.kill()  # it may have left its group
            self.wait(None)


def _search_path() -> list[str]:
    """`sys.path`; "" there means the working directory, which may be gone."""
    here = []
    with contextlib.suppress(FileNotFoundError):
        here = [os.getcwd()]
    return [place for entry in sys.path if isinstance(entry, str) for place in ([entry] if entry else here)]


def _flags() -> list[str]:
    """The interpreter's own options that change what code means: warnings, -X, optimization."""
    flags = ["-" + "O" * sys.flags.optimize] if sys.flags.optimize else []
    flags += [f"-W{option}" for option in sys.warnoptions]
    return flags + [f"-X{name}" if value is True else f"-X{name}={value}" for name, value in sys._xoptions.items()]


def end_with(booter: int, grace: float) -> None:
    """Ends this process when the one of the pidfd `booter` has ended, `grace` seconds later at the latest."""

    def wait() -> None:
        liveness.wait_death(booter, None)
        time.sleep(grace)  # a kernel ends by itself, and cleans up; unless a handler keeps it
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)  # with what its handlers have started
        os._exit(1)

    threading.Thread(target=wait, name="realmap-booter", daemon=True).start()
    held = [booter]

    def after_fork_in_child() -> None:
        while held:  # once: what has its number in a child's child is another's
            files.close(held.pop())

    os.register_at_fork(after_in_child=after_fork_in_child)


def take_short_turns() -> None:
    """A handler that spins in Python gives others their turn after 0.5 ms, not 5: for the process of a kernel."""
    sys.setswitchinterval(0.0005)


def end_within(seconds: float) -> None:
    """Its work done, this process ends in so many seconds at the latest, whatever threads are left in it, and what they
    have started with it.
    """

    def end() -> None:
        time.sleep(seconds)
        with contextlib.suppress(Exception):  # it ends, whatever becomes of them
            import psutil  # here: it takes a while to import

            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    child.kill()
        os._exit(0)

    threading.Thread(target=end, name="realmap-end", daemon=True).start()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def _main(fd: int, booter: int, every: tuple[int, int, int]) -> None:
    """In the child: reads what is to be run, and runs it."""
    os.set_inheritable(fd, False)
    os.set_inheritable(booter, False)
    report = socket.socket(fileno=fd)

    def exactly(size: int) -> bytes:
        got = bytearray()
        while len(got) < size:
            more = report.recv(min(1 << 20, size - len(got)))
            if not more:
                os._exit(1)  # the booter died before it had said what to run
            got += more
        return bytes(got)

    for stream in (sys.stdout, sys.stderr):  # what a handler prints is not kept until the end
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    payload = exactly(struct.unpack("=Q", exactly(8))[0])
    sys.argv = ["realmap"]
    global _is_reading
    _is_reading = True
    try:
        function, args = pickle.loads(payload)
    except Exception as error:
        why = f"what was sent cannot be read there: {type(error).__name__}: {error}"
        report.sendall(pickle.dumps((False, Unsendable(why), "")))  # as `outcome` has it
        os._exit(1)
    _is_reading = False
    # What was imported stays: no collection looks through it, now or while somebody waits for an answer.
    gc.freeze()
    if not gc.get_threshold()[0]:  # nobody has set another
        gc.set_threshold(*every)
    function(report, booter, *args)
