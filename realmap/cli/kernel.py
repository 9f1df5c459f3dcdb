"""`realmap kernel`: a kernel in the foreground, for anyone to join."""

from __future__ import annotations

import importlib
import signal
import sys
from pathlib import Path
from typing import Any

import click

from realmap.host import interpreter, runtime, signals
from realmap.kernel import Kernel
from realmap.serving import logs
from realmap.serving.registry import marked
from realmap.system import LINGER


def handlers_of(name: str) -> list[Any]:
    """The syscalls that a module has. ClickException: it cannot be imported, or has none."""
    if name.endswith(".py"):
        raise click.ClickException(f"a module is named as `import` names it: {Path(name).stem!r}, not {name!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise click.ClickException(f"cannot import {name!r}: {error}") from None
    found = marked(vars(module).values())
    if not found:
        raise click.ClickException(f"{name!r} has no function that is marked @realmap.syscall")
    return found


@click.command()
@click.option("--path", help="Where its socket is to be. By default in a private directory; it is printed.")
@click.option("--memory-limit", type=int, help="Bytes of memory that all processes may have together.")
@click.option("--process-limit", type=int, help="Bytes of memory that each process may have.")
@click.option(
    "--syscalls", "modules", metavar="MODULE", multiple=True, help="Its handlers: @realmap.syscall functions."
)
@click.option(
    "--log", "level", type=click.Choice(logs.LEVELS), default="warning", show_default=True, help="What goes to stderr."
)
def kernel(
    path: str | None, memory_limit: int | None, process_limit: int | None, modules: tuple[str, ...], level: str
) -> None:
    """Run a kernel in the foreground, until Ctrl-C or SIGTERM.

    A MODULE is found as `import` finds it, in the current directory, too; every function in it that is marked
    @realmap.syscall becomes a syscall.

    Example: realmap kernel --path /tmp/my.sock, and elsewhere: realmap.connect("/tmp/my.sock")
    """
    logs.to_stderr(level)
    runtime.raise_descriptor_limit()
    handlers = [handler for name in modules for handler in handlers_of(name)]
    serving = Kernel(path=path, memory_limit=memory_limit, process_limit=process_limit, syscalls=handlers)
    signals.on(lambda: serving.stop(wait=False), signal.SIGINT, signal.SIGTERM)
    interpreter.take_short_turns()
    serving.serve(ready=lambda: click.echo(f"realmap: ready at {serving.path}"))
    interpreter.end_within(LINGER)
