"""The command `realmap`: thin, over what the library does; a command is a module, imported when it is run."""

from __future__ import annotations

import importlib
import io
import sys

import click

from realmap.errors import KernelError
from realmap.observe.words import harmless

#: Each is `NAME` in `realmap.cli.NAME`, and what `realmap --help` says of it: to list them, none is imported.
GROUPS = {
    "To begin with": {
        "demo": "Watch a kernel mirror files out of real processes.",
        "doctor": "What this machine allows, and what to change.",
        "kernel": "Run a kernel in the foreground.",
        "call": "Call a syscall of a running kernel.",
    },
    "To look at a running kernel": {
        "top": "Processes, segments and the address space, live.",
        "ps": "Its user processes.",
        "maps": "What a process has mapped: of a user in the books, too.",
        "segments": "Every segment, and everyone who holds it.",
        "stats": "Totals, limits and rates; how long handlers took.",
        "snapshot": "Everything at one moment, in words, as JSON or as a picture.",
        "trace": "Everything that happens, into a file for Perfetto.",
    },
    "To look at this machine": {
        "shm": "Every shared-memory segment, who holds it; reclaim what nobody needs.",
        "peek": "The memory of any process, as hex, numbers or text.",
        "poke": "Write into the memory of any process.",
    },
    "To see that it holds": {
        "audit": "Hold a kernel's books against /proc.",
        "stress": "Users that map, call, fork and are killed; every byte verified.",
        "bench": "Measure it on this machine, beside a C program and the peers.",
        "campaign": "Stress or bench on many machines; what became slower or faster.",
        "gc": "Sweep what killed kernels left.",
    },
}
COMMANDS = [name for group in GROUPS.values() for name in group]


class Commands(click.Group):
    """Imports a command when it is needed: most of them need little of what the others do."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return COMMANDS

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        found: click.Command = getattr(importlib.import_module(f"realmap.cli.{cmd_name}"), cmd_name)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """A line for each, beside those that it belongs to."""
        for title, group in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl(list(group.items()))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="realmap")
def command() -> None:
    """Cross-process mapping with real processes, real pages and a kernel that mirrors them."""


def main() -> None:
    """Runs the command; an error of ours is one line on stderr, and exit status 1.

    What the output's encoding has no letter for (an arrow, in ASCII) is written as an escape.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        command()
    except (KernelError, OSError) as error:
        if isinstance(error, BrokenPipeError) and not isinstance(error, KernelError):
            sys.stderr.close()  # nobody reads our output any more: no traceback about it at exit
            sys.exit(1)
        click.echo(f"Error: {harmless(error)}", err=True)  # as click says those of its own
        sys.exit(1)
