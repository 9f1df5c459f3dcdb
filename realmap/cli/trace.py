"""`realmap trace`: everything that happens in a kernel, into a file that Perfetto and chrome://tracing open."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, closing

import click

from realmap.ambient import VARIABLE
from realmap.cli.output import Seconds, require_writable
from realmap.cli.target import BOUND, find, kernel_option, named
from realmap.errors import KernelError
from realmap.host import signals
from realmap.host.runtime import sockets
from realmap.observe.announce import Announced
from realmap.observe.trace import Trace
from realmap.wire.records import CAPACITY

#: The kernel and its users come first: what waits meanwhile has its room there.
NICE = 10
#: How often it is looked whether the end has come, in seconds.
LOOK = 0.05
#: How long a command may take to end on SIGTERM, in seconds; then it is killed.
GRACE = 5.0


@click.command(epilog=BOUND)
@click.argument("file", type=click.Path(dir_okay=False))
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@kernel_option
@click.option("--seconds", type=Seconds(min=0, min_open=True), help="End after so long.")
@click.option(
    "--events",
    type=click.IntRange(0, 1 << 32),
    default=CAPACITY,
    show_default=True,
    help="How many may wait in the kernel, 64 bytes each.",
)
def trace(file: str, command: tuple[str, ...], path: str | None, seconds: float | None, events: int) -> None:
    """Write every syscall, map, unmap, mirror, drop, copy, death and reap of a kernel to FILE.

    Open it in https://ui.perfetto.dev or chrome://tracing. It ends on Ctrl-C, on SIGTERM, after --seconds, with the
    kernel, or with the COMMAND after -- (which gets SIGTERM where it does not end first); the exit status is then
    that of COMMAND. Of a COMMAND that boots a kernel, that kernel is traced, from its first moment; else the one that
    runs already, or --kernel, and COMMAND has it as $REALMAP_KERNEL. At the end, a kernel that cannot answer is waited
    for 10 seconds more: what it has told until then would be lost.

    Example: realmap trace out.json -- python program.py
    """
    kernel = _running() if command and named(path) is None else find(path)
    require_writable(file)
    status = 0
    recorder = Recorder(file, events)
    caught: list[int] = []
    with signals.handled(lambda number, _: caught.append(number), signal.SIGINT, signal.SIGTERM):
        try:
            with closing(recorder):
                if kernel is not None:
                    recorder.begin(kernel)
                status = _wait(recorder, list(command), kernel, named(path) is None, seconds, caught)
        except OSError as error:
            if isinstance(error, KernelError):
                raise
            why = "nobody reads this pipe" if error.errno == errno.ENXIO else error.strerror
            raise click.ClickException(f"cannot write {file}: {why}") from None
    try:
        recorder.report(bool(command))
    except click.ClickException as error:
        if not status:
            raise
        error.show()
    sys.exit(status)


def _running() -> str | None:
    """The kernel that runs, if there is just one."""
    running = sockets()
    return running[0] if len(running) == 1 else None


class Recorder:
    """The trace of one kernel, and then of another one in its place."""

    def __init__(self, file: str, events: int) -> None:
        self._file, self._events = file, events
        self._trace: Trace | None = None
        #: Kernels that the command booted; the first of them is traced.
        self.booted = 0

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come, of a kernel that was there before the command."""
        return self._trace is not None and self._trace.is_over and not self.booted

    def begin(self, kernel: str) -> None:
        """Traces this one. Errors as `Trace`."""
        self.close()
        self._trace = Trace(kernel, self._file, events=self._events, nice=NICE)

    def hear(self, kernel: str) -> None:
        """The command has booted this one."""
        self.booted += 1
        if self.booted == 1:
            self.begin(kernel)

    def close(self) -> None:
        """Ends what is traced. OSError: the file cannot be written."""
        if self._trace is not None:
            self._trace.close()

    def report(self, err: bool) -> None:
        """Says what there is now. ClickException: nothing, or not all of it."""
        found = self._trace
        if found is None:
            raise click.ClickException("no kernel runs, and the command has booted none: there is nothing to trace")
        lost = f"{found.lost} lost" + (" (the file says where; see --events)" if found.lost else "")
        more = f" (of the first of {self.booted} kernels that the command booted)" if self.booted > 1 else ""
        click.echo(f"realmap: {found.events} events, {lost}, in {found.seconds:.1f} s: {self._file}{more}", err=err)
        if found.died is not None and not self.booted:
            why = f"the trace ended before its time: {found.died}; {self._file} is whole up to there"
            raise click.ClickException(why)


def _wait(
    recorder: Recorder,
    command: list[str],
    kernel: str | None,
    any_kernel: bool,
    seconds: float | None,
    caught: list[int],
) -> int:
    """Until the end, whatever it is; the exit status that comes of it."""
    end = None if seconds is None else time.monotonic() + seconds
    with ExitStack() as stack:
        announced = stack.enter_context(closing(Announced())) if command and any_kernel else None
        child = _start(command, kernel, announced.environment if announced else {}) if command else None
        if child is not None:
            stack.callback(_end, child)
        while not recorder.is_over and (end is None or time.monotonic() < end):
            if child is None:
                if caught:
                    return 0
            elif child.poll() is not None:
                break
            elif signal.SIGTERM in caught:  # is passed on; Ctrl-C on a terminal the command gets by itself
                caught.clear()
                child.terminate()
            if announced is None:
                time.sleep(LOOK)
            elif (word := announced.next(LOOK)) is not None:
                with word[1]:
                    recorder.hear(word[0])
    if child is None:
        return 0
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _start(command: list[str], kernel: str | None, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    if kernel is not None:
        environment = environment | {VARIABLE: kernel}
    try:
        return subprocess.Popen(command, env=os.environ | environment)
    except OSError as error:
        raise click.ClickException(f"cannot run {command[0]}: {error.strerror}") from None
