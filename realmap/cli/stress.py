"""`realmap stress`: runs it, shows how it goes, and what came of it."""

from __future__ import annotations

import os
import secrets
import shutil
import sys

import click
import msgspec
from rich.console import Console
from rich.markup import escape

from realmap.cli.output import Column, Seconds, print_table, progress, require_writable, write_files
from realmap.lab import stress as lab
from realmap.lab.stress.antagonists import ALL as ANTAGONISTS
from realmap.lab.stress.report import DEFAULTS, Kind
from realmap.observe import words

#: Set in the run whose /dev/shm is a small one of its own.
INSIDE = "REALMAP_STRESS_FULL"
SMALL = "1m"
KINDS = [
    Column("step"),
    Column("count", "number"),
    Column("per second", "number", spare=1),
    Column("p50", "seconds"),
    Column("p99", "seconds"),
    Column("longest", "seconds"),
]


@click.command()
@click.argument("mix", default="quick", type=click.Choice(sorted(DEFAULTS)))
@click.option("--users", type=click.IntRange(1, 256), help="User processes at a time.")
@click.option("--seconds", type=Seconds(0.1), help="How long.")
@click.option(
    "--ops",
    multiple=True,
    metavar="N|MODULE.py",
    help="A number: steps in all, instead of a time. A file: operations of your own, in the mix (see above).",
)
@click.option("--seed", type=click.IntRange(0), help="Decides every choice; by default a new one, which is printed.")
@click.option("--kill", type=click.FloatRange(0, 1), metavar="RATE", help="Share of steps at which a user is killed.")
@click.option(
    "--truncate", type=click.FloatRange(0, 1), metavar="RATE", help="Share of steps at which a segment is truncated."
)
@click.option("--full", is_flag=True, help=f"With a /dev/shm of {SMALL}, which runs full (in a mount namespace).")
@click.option("--kernel", metavar="PATH", help="A running kernel's socket, in place of a kernel of its own.")
@click.option(
    "--antagonists",
    metavar="all|NAME,…",
    callback=lambda _, __, text: tuple(text.split(",")) if text else None,
    help=f"What works on the users and their pages meanwhile: {', '.join(ANTAGONISTS)}.",
)
@click.option("--json", "json_path", metavar="FILE", help="The report, as JSON.")
@click.option("--junit", "junit_path", metavar="FILE", help="The report, as JUnit's XML.")
def stress(mix: str, ops: tuple[str, ...], json_path: str | None, junit_path: str | None, **given: object) -> None:
    """Let user processes map, write, call, fork and die, and hold every byte and every book against what is right.

    MIX is quick (10 s), soak (10 min, gentle) or storm (a minute of kills and truncations). Exit status 1 on any
    wrong byte, leak, audit difference or death that was not asked for; then the command that replays it is printed.

    An operation of your own is a function of a user and a random.Random, marked with @realmap.lab.stress.operation();
    it raises, or returns (got, expected). pydoc realmap.lab.stress.operations has an example.

    Example: realmap stress storm --seconds 20 --seed 1 --antagonists all
    """
    given |= _counts_and_modules(ops)
    if given["full"] and given["kernel"]:
        raise click.UsageError("--full needs a kernel of its own: leave out --kernel")
    if given["full"] and INSIDE not in os.environ:
        _in_small_shm()
    values = {**DEFAULTS[mix], **{name: value for name, value in given.items() if value is not None}}
    if given["ops"] is not None:
        values["seconds"] = given["seconds"]
    values.setdefault("seed", secrets.randbits(32))
    options = msgspec.convert({"mix": mix, **values}, lab.Options)
    try:
        lab.check(options)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    require_writable(json_path, junit_path)
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    console.print(escape(options.command()))
    with progress() as say:
        report = lab.run(options, say)
    try:
        render(console, report)
    finally:  # also where nobody reads it to its end
        failed = write_files(
            (json_path, lambda: msgspec.json.format(msgspec.json.encode(report))),
            (junit_path, lambda: lab.junit(report)),
        )
    sys.exit(0 if report.ok and not failed else 1)


def _counts_and_modules(ops: tuple[str, ...]) -> dict[str, object]:
    """What --ops said: `ops`, `operations`."""
    counts = [text for text in ops if text.isdecimal()]
    modules = [text for text in ops if not text.isdecimal()]
    if len(counts) > 1 or len(modules) > 1 or "0" in counts:
        raise click.UsageError("--ops takes one number of steps, above 0, and one file of operations")
    return {"ops": int(counts[0]) if counts else None, "operations": modules[0] if modules else None}


def _in_small_shm() -> None:
    """Starts anew where /dev/shm is small and nobody else's."""
    unshare = shutil.which("unshare")
    if unshare is None:
        raise click.ClickException("--full needs `unshare` (util-linux), for a /dev/shm of its own")
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    shell = f'mount -t tmpfs -o size={SMALL} realmap /dev/shm && exec "$@"'
    os.environ[INSIDE] = "1"
    os.execv(
        unshare,
        [unshare, *as_root, "--mount", "sh", "-c", shell, "sh", sys.executable, "-m", "realmap", *sys.argv[1:]],
    )


def print_kinds(console: Console, kinds: dict[str, Kind]) -> None:
    """How often each kind of step was done, and how long it took."""
    rows = [
        [name, kind.count, words.count(kind.per_second), kind.p50, kind.p99, kind.longest]
        for name, kind in kinds.items()
    ]
    print_table(console, KINDS, rows)


def render(console: Console, report: lab.Report) -> None:
    """For people: a table of the kinds, then what was injected, how the kernel fared, and what failed."""
    print_kinds(console, report.kinds)
    injected = ", ".join(f"{count} {name}" for name, count in report.injected.items())
    console.print(f"{report.steps} steps in {report.seconds:.1f} s, {report.bytes_verified} bytes verified; {injected}")
    for name, slope in report.slopes.items():
        console.print(f"{'[bold red]no[/]' if slope.grows(name) else 'ok'}: {slope.in_words(name)}")
    console.print(f"audits: {report.audits}")
    for name, antagonist in report.antagonists.items():
        why = f" ({antagonist.why})" if antagonist.why else ""
        console.print(f"antagonist {name}: {antagonist.count} times{escape(why)}")
    for name, done in report.operations.items():
        console.print(f"operation {name}: {done.count} times, {done.failures} failed, {done.longest:.3g} s at most")
    for name, why in report.skipped.items():
        console.print(f"{name}: not here: {escape(why)}")
    for failure in report.failures:
        console.print(f"[bold red]failed[/]: {escape(failure)}")
    if report.ok:
        console.print("[green]ok[/]: every byte right, nothing left, no death that was not asked for")
    else:
        console.print(f"replay: {escape(report.replay)}")
