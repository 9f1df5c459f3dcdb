"""`realmap trace`: everything that happens in a kernel, into a file that Perfetto and chrome://tracing open."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from realmap.ambient import VARIABLE
from realmap.cli.output import Seconds, require_writable
from realmap.cli.target import find, kernel_option
from realmap.errors import KernelError
from realmap.kernel.events import CAPACITY
from realmap.observe.trace import Trace

#: The kernel and its users come first: what waits meanwhile has its room there.
NICE = 10
#: How often it is looked whether the end has come, in seconds.
LOOK = 0.05
#: How long a command may take to end on SIGTERM, in seconds; then it is killed.
GRACE = 5.0


@click.command()
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
    kernel, or with the COMMAND after --, which runs with $REALMAP_KERNEL set (and gets SIGTERM where it does not end
    first); the exit status is then that of COMMAND.

    Example: realmap trace out.json -- python program.py
    """
    kernel = find(path)
    require_writable(file)
    status = 0
    with _signals() as caught:
        try:
            with Trace(kernel, file, events=events, nice=NICE) as running:
                status = _wait(running, list(command), kernel, seconds, caught)
        except OSError as error:
            if isinstance(error, KernelError):
                raise
            why = "nobody reads this pipe" if error.errno == errno.ENXIO else error.strerror
            raise click.ClickException(f"cannot write {file}: {why}") from None
    lost = f"{running.lost} lost" + (" (the file says where; see --events)" if running.lost else "")
    click.echo(f"realmap: {running.events} events, {lost}, in {running.seconds:.1f} s: {file}", err=bool(command))
    if running.died is not None:
        raise click.ClickException(f"the trace ended before its time: {running.died}; {file} is whole up to there")
    sys.exit(status)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are noted in the list instead of ending this process."""
    caught: list[int] = []
    before: dict[int, Any] = {
        number: signal.signal(number, lambda got, _: caught.append(got)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(running: Trace, command: list[str], kernel: str, seconds: float | None, caught: list[int]) -> int:
    """Until the end, whatever it is; the exit status that comes of it."""
    end = None if seconds is None else time.monotonic() + seconds
    child = _start(command, kernel) if command else None
    try:
        while not running.is_over and (end is None or time.monotonic() < end):
            if child is None:
                if caught:
                    return 0
            elif child.poll() is not None:
                break
            elif signal.SIGTERM in caught:  # is passed on; Ctrl-C on a terminal the command gets by itself
                caught.clear()
                child.terminate()
            time.sleep(LOOK)
    finally:
        if child is not None and child.poll() is None:
            child.terminate()
            try:
                child.wait(GRACE)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
    if child is None:
        return 0
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _start(command: list[str], kernel: str) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(command, env=os.environ | {VARIABLE: kernel})
    except OSError as error:
        raise click.ClickException(f"cannot run {command[0]}: {error.strerror}") from None
