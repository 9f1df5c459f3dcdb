"""`realmap audit`: the books of a running kernel, held against Linux."""

from __future__ import annotations

import sys

import click

from realmap.cli.output import show_json
from realmap.cli.target import BOUND, control, kernel_option
from realmap.observe.audit import AuditReport
from realmap.observe.words import harmless


@click.command(epilog=BOUND)
@kernel_option
@click.option("--json", "as_json", is_flag=True, help="The report as JSON.")
def audit(path: str | None, as_json: bool) -> None:
    """Hold a kernel's books against /proc: maps by inode and offset, references, descriptors, names in /dev/shm.

    While the kernel is at work a difference counts only where several looks in a row find it. Exit status 1
    if there is any.

    Example: realmap audit --kernel /tmp/my.sock
    """
    with control(path) as kernel:
        report = kernel.audit()
    if as_json:
        show_json(report)
    else:
        render(report)
    sys.exit(0 if report else 1)


def render(report: AuditReport) -> None:
    """A line for what was compared, one for each difference, and what else is worth knowing."""
    for line in str(report).split("\n"):
        click.echo(harmless(line))
    for found in report.faulted:
        click.echo(
            f"{harmless(found.where)} at {found.address:#x}: {found.length} bytes are zeros: a segment was truncated"
        )
    for kept in report.withheld:
        click.echo(f"pid {kept.pid} keeps {kept.length} bytes at {kept.address:#x} that it was lent: {kept.why}")
    if report.unregistered:
        pids = ", ".join(map(str, report.unregistered))
        click.echo(f"mapped outside of the books, by forks that never connected: pid {pids}")
