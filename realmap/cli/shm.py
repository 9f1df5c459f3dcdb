"""`realmap shm`: every segment of shared memory of the machine, who holds it, and what of it nobody needs any more."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from realmap.cli.output import (
    Column,
    Seconds,
    json_option,
    plain,
    show_json,
    table,
    until_interrupted,
    watch_option,
)
from realmap.host import SHM
from realmap.host.shared_segments import ANONYMOUS, MEMFD, POSIX, SYSV, UNLINKED
from realmap.observe import shm as observe
from realmap.observe import words
from realmap.observe.shm import ORPHAN, Report, SegmentRow
from realmap.observe.words import harmless

if TYPE_CHECKING:
    from rich.console import Group

    from realmap.host.reclaim import Named

MOUNTS = [
    Column("of", "bytes"),
    Column("used", "bytes"),
    Column("explained", "bytes"),
    Column("unexplained", "bytes"),
    Column("named", "bytes", spare=2),
    Column("unlinked", "bytes", spare=2),
    Column("other", "bytes", spare=3),
    Column("path"),
]
SEGMENTS = [
    Column("kind"),
    Column("size", "bytes", spare=2),
    Column("resident", "bytes"),
    Column("age", spare=4),
    Column("family", spare=5),
    Column("maker", optional=True, spare=3),
    Column("name"),
    Column("holders", "lines"),
]
ORPHANS = [Column("kind"), Column("resident", "bytes"), Column("name"), Column("why")]
#: By which the rows can be sorted: the largest, the oldest, the most of them first.
SORTS: dict[str, Callable[[SegmentRow], Any]] = {
    "resident": lambda row: -row.resident,
    "size": lambda row: -row.size,
    "age": lambda row: -(row.age or 0),
    "holders": lambda row: -len(row.holders),
    "name": lambda row: row.name,
}
older_option = click.option(
    "--older", type=Seconds(min=0), default=observe.OLDER, show_default=True, metavar="SECONDS",
    help="Where a name does not tell its maker: for how long nothing of it must have changed.",
)  # fmt: skip


@click.group(invoke_without_command=True)
@click.option(
    "--orphans", is_flag=True, help="Only what nobody has, and whose maker is gone: `reclaim` takes the posix ones."
)
@click.option("--kind", "kinds", multiple=True, type=click.Choice([POSIX, UNLINKED, MEMFD, SYSV, ANONYMOUS]),
              help="Only of this kind (or of several).")  # fmt: skip
@click.option("--pid", type=int, help="Only what this process has.")
@click.option("--name", metavar="PATTERN", help="Only names like this, as a shell matches them: 'psm_*'.")
@click.option("--sort", type=click.Choice(list(SORTS)), default="resident", show_default=True, help="What is first.")
@watch_option("1", ", until Ctrl-C.")
@older_option
@json_option
@click.pass_context
def shm(
    ctx: click.Context, orphans: bool, kinds: tuple[str, ...], pid: int | None, name: str | None, sort: str,
    watch: float | None, older: float, as_json: bool,
) -> None:  # fmt: skip
    """Show every segment of shared memory of this machine: POSIX, unlinked but still held, memfd, System V, anonymous.

    resident: what it takes, swapped pages too; age: since anything of it last changed; maker: as far as its name tells,
    or Linux; holders: who has mapped it, or has it open. Above, each /dev/shm: what is used of it, as its file system
    says, and how much of that the segments explain. What this user cannot see is said on stderr.

    \b
    Example: realmap shm --sort age
             realmap shm --orphans
             realmap shm reclaim --dry-run
    """
    if ctx.invoked_subcommand is not None:
        return

    from fnmatch import fnmatchcase

    if pid is not None:
        from realmap.memory import ForeignProcess

        with ForeignProcess(pid) as process:
            process.mappings()  # KernelError: there is none, or it may not be looked into

    def chosen(row: SegmentRow) -> bool:
        return (
            (not orphans or row.state == ORPHAN)
            and (not kinds or row.kind in kinds)
            and (pid is None or any(holder.pid == pid for holder in row.holders))
            and (name is None or fnmatchcase(row.name, name))
        )

    def look() -> tuple[Report, list[SegmentRow]]:
        found = observe.report(observe.look(), older)
        return found, sorted(filter(chosen, found.segments), key=SORTS[sort])

    if watch is not None:
        _watch(look, watch, orphans, as_json)
        return
    found, rows = look()
    if as_json:
        show_json(_as_json(found, rows))
        return
    for spot in found.blind:
        click.echo(f"Note: {spot}", err=True)
    if sys.stdout.isatty():
        from rich.console import Console

        console = Console(highlight=False)
        console.print(_screen(found, rows, orphans, console.width))
    else:
        columns, cells = _cells(rows, orphans)
        click.echo(plain(MOUNTS, _mounts(found)) + "\n\n" + plain(columns, cells))


def _watch(look: Callable[[], tuple[Report, list[SegmentRow]]], interval: float, orphans: bool, as_json: bool) -> None:
    with until_interrupted() as is_over:
        if sys.stdout.isatty() and not as_json:
            from rich.console import Console
            from rich.live import Live

            console = Console(highlight=False)
            with Live(
                _screen(*look(), orphans, console.width), console=console, auto_refresh=False, screen=True
            ) as live:
                while not is_over(interval):
                    live.update(_screen(*look(), orphans, console.width), refresh=True)
            return
        while True:
            found, rows = look()
            if as_json:
                show_json(_as_json(found, rows), line=True)
            else:
                columns, cells = _cells(rows, orphans)
                click.echo(f"{found.time:.3f}\n{plain(columns, cells)}\n")
            if is_over(interval):
                return


def _as_json(found: Report, rows: list[SegmentRow]) -> dict[str, Any]:
    dev_shm = found.dev_shm and found.dev_shm._asdict()
    elsewhere = [each._asdict() for each in found.elsewhere]
    totals = {kind: total._asdict() for kind, total in found.totals.items()}
    return found._asdict() | {
        "dev_shm": dev_shm, "elsewhere": elsewhere, "totals": totals, "segments": [_row_as_json(row) for row in rows]
    }  # fmt: skip


def _row_as_json(row: SegmentRow) -> dict[str, Any]:
    return row._asdict() | {"holders": [holder._asdict() for holder in row.holders]}


def _mounts(found: Report) -> list[list[Any]]:
    return [
        [each.size, each.used, each.explained, each.unexplained, each.named, each.unlinked, each.other,
         each.path if not each.through else f"{each.path} of process {each.through}"]
        for each in ([found.dev_shm] if found.dev_shm else []) + found.elsewhere
    ]  # fmt: skip


def _cells(rows: list[SegmentRow], orphans: bool, in_words: bool = False) -> tuple[list[Column], list[list[Any]]]:
    if orphans:
        return ORPHANS, [[row.kind, row.resident, row.name, row.why] for row in rows]
    return SEGMENTS, [
        [
            row.kind,
            row.size,
            row.resident,
            "" if row.age is None else words.lapse(row.age) if in_words else f"{row.age:.0f}",
            row.family,
            f"{row.maker}{' ' if in_words else ':'}{row.maker_program}" if row.maker else "",
            row.name,
            [str(holder) for holder in row.holders],
        ]
        for row in rows
    ]


def _screen(found: Report, rows: list[SegmentRow], orphans: bool, width: int) -> Group:
    from rich.console import Group
    from rich.text import Text

    columns, cells = _cells(rows, orphans, True)
    said = f"{words.counted(len(rows), 'segment')} of {words.size(sum(row.resident for row in rows))}"
    tables = [table(columns, cells, width)] if rows else []
    return Group(table(MOUNTS, _mounts(found), width), Text(), Text(said), *tables)


@shm.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--force", is_flag=True, help="Also where makers may live: unseen ones, or that of a NAME.")
@older_option
@json_option
def reclaim(names: tuple[str, ...], dry_run: bool, yes: bool, force: bool, older: float, as_json: bool) -> None:
    """Unlink the names in /dev/shm that nobody has mapped or open and whose makers are gone; asks first.

    Without a NAME: all that `realmap shm --orphans` lists there. A NAME is taken also where it cannot be told who made
    it (exit status 1 where one stays). What anybody uses never goes, whoever and wherever that is: Linux is asked right
    before the unlink, and whoever comes meanwhile finds it in place. `realmap gc` sweeps realmap's sockets, too.

    Example: realmap shm reclaim --dry-run
    """
    from realmap.host.reclaim import unlink_unused

    may, stay = _choose(names, older, force or dry_run)
    if may and not yes and not dry_run:
        click.echo(plain(*_cells([row for row, _ in may], True)), err=True)
    if dry_run:
        gone = [row for row, _ in may]
    else:
        if may and not yes:
            click.confirm("Unlink them?", abort=True, err=True)
            asked = {file for _, file in may}
            may, stay = _choose(names, older, force)  # the answer may have taken its time
            may = [(row, file) for row, file in may if file in asked]
        gone = []
        rows = {file: row for row, file in may}
        for file, why in unlink_unused(SHM, list(rows)):
            if why:
                stay.append((rows[file].name, why))
            else:
                gone.append(rows[file])
    if as_json:
        show_json(
            {
                "gone": [_row_as_json(row) for row in gone],
                "stay": [{"name": observe.shown(name), "why": why} for name, why in stay],
            }
        )
    else:
        for row in gone:
            click.echo(f"{'would remove' if dry_run else 'removed'} {harmless(row.name)}, {words.size(row.resident)}")
        for name, why in stay:
            click.echo(f"{harmless(observe.shown(name))} stays: {harmless(why)}", err=True)
        if not gone and not stay:
            click.echo("nothing to reclaim")
    sys.exit(1 if names and stay else 0)


def _choose(
    names: tuple[str, ...], older: float, force: bool
) -> tuple[list[tuple[SegmentRow, Named]], list[tuple[str, str]]]:
    """What may go, and what was named and may not. ClickException: who lives cannot be told, without --force."""
    machine = observe.look()
    found = observe.report(machine, older)
    spot = observe.cannot_tell_makers(found)
    if spot and not force:
        raise click.ClickException(f"{spot}, and may still need what nobody has; if you know better: --force")
    return observe.reclaimable(machine, found, names, force)
