"""`realmap kernel`: a kernel in the foreground, for anyone to join."""

from __future__ import annotations

import signal

import click

from realmap.host import runtime
from realmap.kernel import Kernel


@click.command()
@click.option("--path", help="Where its socket is to be. By default in a private directory; it is printed.")
@click.option("--memory-limit", type=int, help="Bytes of frames in all.")
@click.option("--process-limit", type=int, help="Bytes of frames for each process.")
def kernel(path: str | None, memory_limit: int | None, process_limit: int | None) -> None:
    """Run a kernel in the foreground, until Ctrl-C or SIGTERM.

    Example: realmap kernel --path /tmp/my.sock, and elsewhere: realmap.connect("/tmp/my.sock")
    """
    runtime.raise_descriptor_limit()
    serving = Kernel(path=path, memory_limit=memory_limit, process_limit=process_limit)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: serving.stop(wait=False))
    serving.serve(ready=lambda: click.echo(f"realmap: ready at {serving.path}"))
