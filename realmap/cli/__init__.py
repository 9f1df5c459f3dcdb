"""The command `realmap`: thin, over what the library does; each command has a module of its own."""

from __future__ import annotations

import sys

import click

from realmap import __version__
from realmap.cli.audit import audit
from realmap.cli.bench import bench
from realmap.cli.call import call
from realmap.cli.demo import demo
from realmap.cli.doctor import doctor
from realmap.cli.gc import gc
from realmap.cli.kernel import kernel
from realmap.cli.maps import maps
from realmap.cli.output import harmless
from realmap.cli.ps import ps
from realmap.cli.segments import segments
from realmap.cli.stats import stats
from realmap.cli.stress import stress
from realmap.cli.trace import trace
from realmap.errors import KernelError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def command() -> None:
    """Cross-process mapping with real processes, real pages and a kernel that mirrors them."""


command.add_command(audit)
command.add_command(bench)
command.add_command(call)
command.add_command(demo)
command.add_command(doctor)
command.add_command(gc)
command.add_command(kernel)
command.add_command(maps)
command.add_command(ps)
command.add_command(segments)
command.add_command(stats)
command.add_command(stress)
command.add_command(trace)


def main() -> None:
    """Runs the command; an error of ours is one line on stderr, and exit status 1."""
    try:
        command()
    except (KernelError, OSError) as error:
        if isinstance(error, BrokenPipeError) and not isinstance(error, KernelError):
            sys.stderr.close()  # nobody reads our output any more: no traceback about it at exit
            sys.exit(1)
        click.echo(f"realmap: {harmless(error)}", err=True)
        sys.exit(1)
