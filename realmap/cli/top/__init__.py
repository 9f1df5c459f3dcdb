"""`realmap top`: a kernel live, in a terminal or in a browser.

feed     asks the kernel, in a thread
view     what is shown, made of a snapshot
paint    lanes of the picture as cells
rows     the table
screens  everything, a process, a segment
app      all of it together
web      the same in a browser
demo     the demo under it

Textual is imported only when it is run: it is an extra, and takes its time.
"""

from __future__ import annotations

import os
import sys

import click

from realmap.cli.output import Seconds
from realmap.cli.target import BOUND, find, kernel_option, named
from realmap.cli.top.feed import FLOOR
from realmap.observe.control import Control

NEEDS = "realmap top needs Textual: pip install 'realmap[top]'"


@click.command(epilog=BOUND)
@kernel_option
@click.option(
    "--interval",
    type=Seconds(FLOOR, 86_400),
    default=1.0,
    show_default=True,
    help="Seconds between snapshots.",
)
@click.option("--web", is_flag=True, help="In a browser, in place of this terminal.")
@click.option("--host", help="With --web: the address to listen at. By default 127.0.0.1: this machine only.")
@click.option("--port", type=click.IntRange(0, 65535), help="With --web: 8765 by default; 0 for any that is free.")
@click.option("--wait", is_flag=True, help="Where no kernel runs yet, wait for one.")
@click.option("--machine", is_flag=True, help="In place of a kernel: any processes of this machine that share memory.")
@click.option("--any", "others", is_flag=True, hidden=True)  # what a page is told of a kernel that nobody named
def top(
    path: str | None, interval: float, web: bool, host: str | None, port: int | None, wait: bool, machine: bool,
    others: bool,
) -> None:  # fmt: skip
    """Watch a kernel live: its processes, their address spaces drawn, mirrors while they live, segments and rates.

    Keys: 1, 2, 3 choose processes, segments or syscalls, s sorts, / filters, p pauses, Enter shows one in detail, Esc
    goes back, ? helps, q quits. When the kernel ends, the next one that runs is shown; where one was named, the next at
    that path. With --machine, each segment that several processes have mapped is lit in all of them.

    Example: realmap top --wait
    """
    if not web and (host is not None or port is not None):
        raise click.UsageError("--host and --port go with --web")
    if machine and (path is not None or wait):
        raise click.UsageError("--machine asks no kernel: it goes with neither --kernel nor --wait")
    if not web:
        require_terminal()
    require_textual(web)
    given = named(path)
    others = others or given is None
    found = given or ""
    if not wait and not machine:
        found = find(given)
        Control(found).close()  # what is wrong with it is said before the screen is taken
    if web:
        from realmap.cli.top.web import serve

        kernel = ["--machine"] if machine else ["--wait", *(["--kernel", found] if found else []), *["--any"] * others]
        options = [*kernel, "--interval", repr(interval)]
        serve(options, host or "127.0.0.1", 8765 if port is None else port)
    else:
        from realmap.cli.top.app import Top

        app = Top(found, interval, others=others, machine=machine)
        app.run()
        sys.exit(app.return_code or 0)


def require_terminal() -> None:
    """ClickException: a pipe or a file is no terminal. (Textual draws on stderr; a browser's driver needs none.)"""
    if (
        not all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr))
        and "TEXTUAL_DRIVER" not in os.environ
    ):
        raise click.ClickException("top needs a terminal; in a pipe use: realmap ps, or realmap snapshot --json")


def require_textual(web: bool = False) -> None:
    """ClickException: it is not installed."""
    try:
        import textual  # noqa: F401

        if web:
            import textual_serve  # noqa: F401
    except ImportError:
        raise click.ClickException(NEEDS) from None
