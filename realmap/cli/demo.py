"""`realmap demo`: runs the demo, and tells what happened, with a verdict on every statement; or JSON."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from realmap.cli.output import Column, Seconds, require_writable, show, show_json
from realmap.cli.top import require_terminal, require_textual
from realmap.errors import KernelError
from realmap.lab import demo as lab
from realmap.observe import words
from realmap.observe.words import harmless

OPENING = """\
[bold]realmap: one process works on the memory of others, without copying it.[/]
Each file below is loaded by a process of its own, a user, into its own memory. Then one more process, the kernel \
(a program like them, not Linux's), maps that same memory into its own address space, takes the SHA-256 of the bytes \
where they lie, and unmaps it. To map another's memory so is to mirror it."""
#: The columns that the picture wants to be complete, and that the story has at most.
WIDE, WIDEST = 76, 100
#: How many times quicker is a difference.
EVEN = 1.15


@click.command()
@click.argument("files", nargs=-1, type=click.Path(exists=True, dir_okay=False, readable=True))
@click.option("--json", "as_json", is_flag=True, help="What was checked and found, as JSON.")
@click.option("--ranges", is_flag=True, help="Also each range that was checked.")
@click.option("--trace", metavar="FILE", help="Trace it: a file for ui.perfetto.dev or chrome://tracing.")
@click.option("--top", is_flag=True, help="Under `realmap top`, each mirror kept for a while, to be seen.")
@click.option("--pace", type=Seconds(0, 3600), help="With --top: for so many seconds; by default 1.")
def demo(files: tuple[str, ...], as_json: bool, ranges: bool, trace: str | None, top: bool, pace: float | None) -> None:
    """Watch a kernel process mirror-map the memory of user processes, and check every byte.

    Each FILE is loaded by a user process of its own; the kernel digests it, and odd ranges of it, in
    place. Without FILES, some that every Python installation has. Exit status 1 if anything does not hold.

    Example: realmap demo /etc/services
    """
    if pace is not None and not top:
        raise click.UsageError("--pace goes with --top")
    console = Console(highlight=False)
    console.width = min(console.width, WIDEST)
    try:
        planned = lab.plan(files or lab.default_files())
    except (OSError, KernelError) as error:
        raise click.ClickException(str(error)) from None
    require_writable(trace)
    if top:
        require_terminal()
        require_textual()
    if not as_json:
        console.print(OPENING)
    story = _watched(planned, trace, 1.0 if pace is None else pace) if top else _run(console, planned, trace, as_json)
    if as_json:
        show_json(story)
    else:
        if ranges:
            show_ranges(story)
        render(console, story)
    sys.exit(0 if story.ok else 1)


def _watched(planned: list[lab.FileReport], trace: str | None, pace: float) -> lab.Report:
    """Under the live view. ClickException: it was left before the end."""
    from realmap.cli.top.demo import watch

    report = watch(planned, trace, pace)
    if report is None:
        raise click.ClickException("the demo was left before its end, so there is no report")
    return report


def _run(console: Console, planned: list[lab.FileReport], trace: str | None, quiet: bool) -> lab.Report:
    """With a bar for how far it is."""
    total = sum(len(file.checks) for file in planned)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task("mirroring", total=total)
        with lab.boot(trace) as kernel:
            return lab.run(kernel, planned, lambda done: progress.update(task, completed=done))


def _say(console: Console, text: str, ok: bool) -> None:
    """A statement, its verdict first."""
    verdict = "ok" if ok else "WRONG"
    told = Text(textwrap.fill(text, console.width, initial_indent=f"{verdict:7}", subsequent_indent=" " * 7))
    told.stylize("green" if ok else "bold red", 0, len(verdict))
    console.print(told)


def render(console: Console, story: lab.Report) -> None:
    """The story for people. Whatever it states was looked at in this run, and has its verdict."""
    _render_mirrors(console, story)
    _render_races(console, story)
    _render_kill(console, story, story.killed)
    console.print("\n[bold green]All of it held.[/]" if story.ok else "\n[bold red]Not all of it held: see WRONG.[/]")
    console.print("Add --top to watch it happen, --ranges to see each range, FILE ... to take your own files.")


def _render_mirrors(console: Console, story: lab.Report) -> None:
    checks = [check for file in story.files for check in file.checks]
    console.print("\n[bold]Two addresses, one memory[/]")
    console.print("An address counts inside its process only; the page of RAM behind it has a number of its own.")
    console.print(_picture(story, console.width))
    lengths = [check.length for check in checks]
    _say(
        console,
        f"{words.counted(len(checks), 'range')} of {min(lengths)} to {max(lengths)} bytes, mirrored and read in place: "
        "the SHA-256 of each is that of the file on disk",
        all(check.digested for check in checks),
    )
    if None in [check.same_frames for check in checks]:
        same = "each mirror starts where its range does in its page (the numbers of pages Linux shows to root only)"
    else:
        same = 'same frame: the first and last byte of each lie in the same page of RAM (a "frame") for user and kernel'
    _say(console, same, all(check.placed for check in checks))
    counts = ", ".join(dict.fromkeys("→".join(map(str, check.refcounts)) for check in checks))
    counted = f"refcount {counts}: how many held that memory before, during and after its mirror"
    _say(console, counted, all(check.counted for check in checks))
    _say(console, "what the kernel wrote into a mirror, the user found in its own memory", story.written)


def _picture(story: lab.Report, width: int) -> Table:
    """Who maps what, at which of its addresses, and where the kernel had all of it mirrored."""
    wide = width >= WIDE
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="")
    styles = {"user": "", "maps": "", "at its address": "cyan", "RAM": "", f"kernel {story.kernel}": "magenta"}
    for head, style in styles.items():
        table.add_column(head, style=style, justify="center" if head == "RAM" else "left", no_wrap=True)
    names = [Text(harmless(Path(file.path).name)) for file in story.files]
    longest = min(max(name.cell_len for name in names), width - (66 if wide else 44))
    for file, name in zip(story.files, names, strict=True):
        whole = file.checks[0]
        frame = whole.frames[0][0] if whole.frames and whole.same_frames else None
        page = f"──▶ {'memory' if frame is None else f'{frame:#x}'} ◀──" if wide else "▶▒◀"
        name.truncate(longest, overflow="ellipsis", pad=True)
        if wide:
            name.append(f"{words.size(file.size):>9}")
        table.add_row(str(file.pid), name, f"{whole.user_address:#x}", page, f"{whole.kernel_address:#x}")
    return table


def _render_races(console: Console, story: lab.Report) -> None:
    console.print("\n[bold]A mirror beside a copy of the same bytes[/]")
    last = story.races[-1]
    rows = [(words.size(race.length), race.mirror, race.copy) for race in story.races]
    rows.append((f"{words.size(last.length)} + SHA-256", last.mirror_digest, last.copy_digest))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for head in ("", "mirror", "copy", ""):
        table.add_column(head, justify="right" if head else "left", no_wrap=True)
    for what, mirror, copy in rows:
        times = max(mirror, copy) / min(mirror, copy)
        quicker = f"{'mirror' if mirror < copy else 'copy'} {times:.1f}x quicker" if times >= EVEN else "about the same"
        table.add_row(what, words.duration(mirror), words.duration(copy), quicker)
    console.print(table)
    _say(console, "medians of this run, in turns; both ways gave the same bytes", all(race.ok for race in story.races))


def _render_kill(console: Console, story: lab.Report, killed: lab.KillReport) -> None:
    console.print("\n[bold red]kill -9[/] [bold]of an owner, while the kernel has its memory mirrored[/]")
    owner = f"user {killed.pid} ──▶"
    gone = "✗".rjust(len(owner)) if killed.died else owner
    before, after = killed.refcounts
    console.print(f"before   {owner} memory ◀── kernel   refcount {before}")
    console.print(f"kill -9  {gone} memory ◀── kernel   refcount {after}")
    console.print(f"dropped  {' ' * len(owner)}                     segments {story.balance['segments']}")
    name = harmless(Path(story.files[-1].path).name)
    died = f"process {killed.pid}, which had loaded {name}, died of it (exit code {killed.exitcode})"
    _say(console, died, killed.died)
    read = f"the mirror did not: {killed.length} bytes, read through it afterwards, are still those of the file"
    _say(console, read, killed.digested)
    _say(console, f"refcount {before}→{after}: owner and mirror, then the mirror alone", killed.counted)
    left = ", ".join(f"{count} {name}" for name, count in story.balance.items())
    _say(console, f"that mirror dropped, left in the end: {left} in /dev/shm", not any(story.balance.values()))


def show_ranges(story: lab.Report) -> None:
    """Each range that was checked, in a line."""
    kinds = {"offset": "number", "bytes": "number", "UserLand": "hex", "KernelLand": "hex"}
    heads = ("user", *kinds, "refs", "frame", "")
    same = {True: "same", False: "OTHER", None: "?"}
    rows = []
    for file in story.files:
        for check in file.checks:
            where = (check.offset, check.length, check.user_address, check.kernel_address)
            refs = "→".join(map(str, check.refcounts))
            rows.append((file.pid, *where, refs, same[check.same_frames], "ok" if check.ok else "WRONG"))
    show([Column(head, kinds.get(head, "text")) for head in heads], rows)
