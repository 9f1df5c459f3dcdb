"""Which kernel a command is about."""

from __future__ import annotations

import os
from contextlib import suppress

import click
import psutil

from realmap.ambient import VARIABLE
from realmap.host import runtime
from realmap.observe import words
from realmap.observe.control import Control
from realmap.system import KERNEL

#: What --help says at the end, of every command that asks a running kernel.
BOUND = (
    "The kernel answers within a second, or it is said within two what keeps it (exit status 1); one that is at "
    "something of its own, a large snapshot, say, has 30 seconds."
)
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
            "no kernel of yours runs; start one: realmap kernel (or, if one has a --path PATH, name it: --kernel PATH)"
        )
    if len(running) > 1:
        listed = "".join(f"\n  {path}{_whose(path)}" for path in running)
        raise click.ClickException(f"several kernels run; name one with --kernel:{listed}")
    return running[0]


def _whose(path: str) -> str:
    """Which program booted the kernel, as far as its path tells; it may be gone by now."""
    with suppress(ValueError, psutil.Error):
        if not runtime.is_here(path):
            return ""
        maker = psutil.Process(runtime.stamp_in(path)[1])
        if maker.name() == KERNEL:
            maker = maker.parent() or maker
        return f"  of process {maker.pid}, {words.harmless(words.program(maker.pid))}"
    return ""


def control(path: str | None) -> Control:
    """A connection to it. KernelError: it is not there, lets nobody in, or does not answer (its bounds: `Control`)."""
    return Control(find(path))
