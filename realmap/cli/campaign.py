"""`realmap campaign`: stress or bench on many machines, and what two such campaigns tell apart."""

from __future__ import annotations

import logging
import secrets
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial

import click
import msgspec
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from realmap.cli.bench import bench
from realmap.cli.output import (
    Column,
    Seconds,
    json_option,
    print_table,
    require_matplotlib,
    require_writable,
    show,
    show_json,
    write_files,
)
from realmap.cli.stress import print_kinds, stress
from realmap.lab.campaign import compare as lab
from realmap.lab.campaign.cluster import Cluster
from realmap.lab.campaign.here import Here
from realmap.lab.campaign.plan import Plan
from realmap.lab.campaign.report import OK, Report, junit
from realmap.lab.campaign.run import Campaign, Say
from realmap.observe import words

#: Options that a campaign has in the place of the command's own.
OWN = ("json_path", "junit_path", "plot_path", "seed")
#: Of no use to it: a kernel is on one machine.
LEFT_OUT = ("kernel",)
CHANGES = [
    Column("verdict"),
    Column("change", "number"),
    Column("interval", "number"),
    Column("effect", "number", spare=2),
    Column("A", "seconds", spare=1),
    Column("B", "seconds", spare=1),
    Column("kind"),
]
HOSTS = [Column("host"), Column("state"), Column("runs", "number"), Column("seconds", "seconds"), Column("why")]


@click.group()
def campaign() -> None:
    """Run stress or bench on many machines as one, and compare what two such campaigns found.

    Hosts are processes here (--local N), or those of a Dask cluster (--scheduler ADDRESS): one run at a time on each.
    """


def _options(command: str) -> list[click.Parameter]:
    found = [
        click.Option(
            ["--local"], type=click.IntRange(1, 256), help="So many runs at a time on this machine; 1 by default."
        ),
        click.Option(
            ["--scheduler"], metavar="ADDRESS", help="A Dask cluster's scheduler: a run on each of its hosts."
        ),
        click.Option(
            ["--patience"],
            type=Seconds(1),
            default=30.0,
            help="A host that is silent for so many seconds is lost; by default 30.",
        ),
        click.Option(
            ["--repeat"], type=click.IntRange(1), help="Runs on each host, one after the other; 1 by default."
        ),
        click.Option(["--hours"], type=Seconds(0), help="In place of a number of runs: until so long has passed."),
        click.Option(
            ["--json", "json_path"], metavar="FILE", help="Everything, as JSON: `ok`, `hosts`, their reports."
        ),
        click.Option(["--junit", "junit_path"], metavar="FILE", help="A case for each host, as JUnit's XML."),
        click.Option(["--html", "html_path"], metavar="FILE", help="One page with pictures."),
    ]
    if command == "stress":
        found.append(click.Option(["--seed"], type=click.IntRange(0), help="Decides the seed of each run."))
    return list(found)


class _Campaign(click.Command):
    """`realmap campaign COMMAND`: with that command's own options, and a campaign's."""

    def __init__(self, command: click.Command) -> None:
        self._theirs = [param for param in command.params if param.name not in (*OWN, *LEFT_OUT)]
        name = str(command.name)
        super().__init__(
            name,
            callback=partial(_run, name),
            params=[*self._theirs, *_options(name)],
            help=(
                f"`realmap {name}` on many machines: its options mean what they mean there; files are each host's.\n\n"
                "Exit status 1 where a host failed or was lost; the others' results are kept, and the command that "
                f"replays it there is printed.\n\nExample: realmap campaign {name} --local 2 --html report.html"
            ),
        )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Checks all of it, and keeps the command's own as they were typed, for each host to be given."""
        given, _, order = self.make_parser(ctx).parse_args(list(args))
        rest = super().parse_args(ctx, args)
        arguments: list[str] = []
        typed = dict.fromkeys(param for param in order if param in self._theirs)
        for param in sorted(typed, key=lambda param: isinstance(param, click.Option)):
            value = given[str(param.name)]
            for each in value if isinstance(value, list | tuple) else [value]:
                if isinstance(param, click.Option):
                    arguments += [param.opts[0]] if param.is_flag else [param.opts[0], each]
                elif isinstance(each, str):  # an argument that was left out has something else here
                    arguments.append(each)
        ctx.params = {name: value for name, value in ctx.params.items() if name not in {p.name for p in self._theirs}}
        ctx.params["arguments"] = arguments
        return rest


def _run(
    command: str,
    arguments: list[str],
    *,
    local: int | None,
    scheduler: str | None,
    patience: float,
    repeat: int | None,
    hours: float | None,
    seed: int | None = None,
    **paths: str | None,
) -> None:
    if scheduler is not None and local is not None:
        raise click.UsageError("--local is this machine, --scheduler a cluster: give one of them")
    require_writable(*paths.values())
    if paths["html_path"] is not None:
        require_matplotlib("--html")
    if repeat is None and hours is None:
        repeat = 1
    plan = Plan(command, arguments, secrets.randbits(32) if seed is None else seed, repeat, hours)
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    logging.disable()  # by the cluster's own library: what it has to tell is told by us
    where: Here | Cluster = Here(local or 1) if scheduler is None else Cluster(scheduler, patience)
    with closing(where), _progress() as say:
        report = Campaign(plan, where, say).run()
    written = _write(report, paths)
    render(console, report)
    sys.exit(0 if report.ok and written else 1)


for each in (stress, bench):
    campaign.add_command(_Campaign(each))


@campaign.command()
@click.argument("a", metavar="A.json", type=click.Path(exists=True))
@click.argument("b", metavar="B.json", type=click.Path(exists=True))
@click.option(
    "--threshold", type=click.FloatRange(0), default=5.0, help="In percent: a smaller change is none. By default 5."
)
@json_option
def compare(a: str, b: str, threshold: float, as_json: bool) -> None:
    """Say what became slower or faster from campaign A to B, and how sure that is.

    Both need 5 runs at least (--repeat), better 10. Each kind is held against the machine's own pace in the same run,
    and the intervals of all kinds hold at once, with 99.9 %. One that goes beyond the threshold to both sides tells
    nothing: "unknown". Exit status 1 where something became slower by the threshold or more, beyond noise; 2 where the
    two cannot be compared.

    Example: realmap campaign compare before.json after.json
    """
    try:
        found = lab.compare(lab.load(a), lab.load(b), threshold / 100)
    except lab.Unlike as error:
        raise _Unlike(str(error)) from None
    if as_json:
        show_json(found)
    else:
        _show(found)
    sys.exit(1 if found.slower else 0)


class _Unlike(click.ClickException):
    exit_code = 2


def _show(found: lab.Comparison) -> None:
    verdicts = dict.fromkeys(found.slower, "slower") | dict.fromkeys(found.faster, "faster")
    verdicts |= dict.fromkeys(found.unknown, "unknown")
    rows = [
        [
            verdicts.get(each.name, "same"),
            f"{each.change:+.1%}",
            f"{each.low:+.1%}..{each.high:+.1%}",
            f"{each.effect:+.2f}",
            *([each.before / 1e9, each.after / 1e9] if each.name != lab.PACE else [None, None]),
            each.name,
        ]
        for each in found.changes
    ]
    show(CHANGES, rows)
    for fact, (before, after) in found.differs.items():
        click.echo(f"the machines differ: {fact}: {', '.join(before)} -> {', '.join(after)}")
    for note in found.notes:
        click.echo(f"note: {note}")
    for names, word in ((found.slower, "slower"), (found.faster, "faster")):
        click.echo(f"{word}: {', '.join(names) or 'nothing'}")


@contextmanager
def _progress() -> Iterator[Say]:
    """On a terminal a line for each host, which changes; elsewhere a line for what is news."""
    console = Console(stderr=True, highlight=False)
    lines: dict[str, str] = {}

    def shown() -> Table:
        grid = Table.grid(padding=(0, 2))
        for host, line in list(lines.items()):
            grid.add_row(Text(host, "bold"), Text(line))
        return grid

    if not console.is_terminal:
        yield lambda host, line, news: click.echo(f"{host}: {line}", err=True) if news else None
        return
    with Live(console=console, get_renderable=shown, transient=True):
        yield lambda host, line, news: lines.update({host: line}) if line else None


def _write(report: Report, paths: dict[str, str | None]) -> bool:
    """Every file that can be written; where there is no room for the JSON, it is printed: hours of work are in it."""
    from realmap.lab.campaign.page import page

    failed = write_files(
        (paths["json_path"], lambda: bytes(msgspec.json.format(msgspec.json.encode(report)))),
        (paths["junit_path"], lambda: junit(report)),
        (paths["html_path"], lambda: page(report)),
    )
    if paths["json_path"] in failed:
        show_json(report)
    return not failed


def render(console: Console, report: Report) -> None:
    """For people: the hosts, what all of them give together, and what to type where one failed."""
    hosts = [[host.name, host.state, len(host.reports), host.seconds, host.why] for host in report.hosts]
    print_table(console, HOSTS, hosts)
    if report.kinds:
        console.print()
        print_kinds(console, report.kinds)
    for host in report.hosts:
        if host.state != OK:
            console.print(Text.assemble(("replay ", "bold red"), f"on {host.name}: {host.replay}"))
    good = sum(host.state == OK for host in report.hosts)
    console.print(f"{good} of {len(report.hosts)} hosts are ok, after {words.duration(report.seconds * 1e9)}")
