"""Which kernel a command is about."""

from __future__ import annotations

import os

import click

from realmap.ambient import VARIABLE
from realmap.host import runtime
from realmap.observe.control import Control

#: How long a command waits for an answer of the kernel, in seconds.
PATIENCE = 10.0

#: The option of every command that asks a running kernel.
kernel_option = click.option(
    "--kernel", "path", metavar="PATH", help=f"Its socket. By default ${VARIABLE}, or the only one that runs."
)


def named(path: str | None) -> str | None:
    """The socket path that was given, by option or environment; None: whichever runs is meant."""
    return path or os.environ.get(VARIABLE) or None


def find(path: str | None) -> str:
    """The socket path of the kernel that is meant. ClickException: none runs, or several do (they are listed)."""
    given = named(path)
    if given is not None:
        return given
    running = runtime.sockets()
    if not running:
        raise click.ClickException(
            "no kernel of yours runs; start one: realmap kernel (or name the socket of one: --kernel PATH)"
        )
    if len(running) > 1:
        raise click.ClickException("several kernels run; name one with --kernel:\n  " + "\n  ".join(running))
    return running[0]


def control(path: str | None) -> Control:
    """A connection to it. KernelError: it is not there, lets nobody in, or does not answer."""
    return Control(find(path), timeout=PATIENCE)
