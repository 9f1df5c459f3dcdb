"""`realmap gc`: sweeps what killed kernels left."""

from __future__ import annotations

import sys

import click

from realmap.cli.output import show_json
from realmap.cli.target import control, kernel_option
from realmap.errors import KernelError
from realmap.host import runtime


@click.command()
@click.argument("paths", nargs=-1, metavar="[PATH]...", type=click.Path())
@click.option("--orphans", is_flag=True, help="And, of the kernel that runs, handles whose makers have ended.")
@kernel_option
@click.option("--json", "as_json", is_flag=True, help="The names of what went, as JSON.")
def gc(paths: tuple[str, ...], orphans: bool, path: str | None, as_json: bool) -> None:
    """Remove what kernels left that were killed: sockets, named segments, empty names in /dev/shm.

    Never what a living kernel or process owns. Each kernel does the same when it starts. A PATH is a socket
    outside of the private directory to look at, too; where somebody serves it, it stays (exit status 1). No kernel is
    asked, so that this waits for none.
    With --orphans, the living kernels are asked to give back what was shared to outlive its maker, too, where it has no
    name; `realmap snapshot --json` lists it before.

    Example: realmap gc /tmp/my.sock
    """
    gone = runtime.sweep()
    stayed: list[str] = []
    for each in paths:
        try:
            gone += runtime.sweep_socket(each)
        except KernelError as error:
            stayed.append(str(error))
    if orphans:
        with control(path) as kernel:
            gone += [f"the handle {label}" for label in kernel.revoke_orphans()]
    if as_json:
        show_json(gone, line=True)
    elif gone:
        click.echo("\n".join(f"removed {name}" for name in gone))
    elif not stayed:
        click.echo("nothing was left over")
    for why in stayed:
        click.echo(f"Error: {why}", err=True)
    sys.exit(1 if stayed else 0)
