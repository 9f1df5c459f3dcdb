"""`realmap poke`: writes into the memory of any process."""

from __future__ import annotations

import click

from realmap.cli.peek import lines
from realmap.cli.place import place_of
from realmap.cli.values import Form, form_option, written
from realmap.memory import ForeignProcess
from realmap.observe import words
from realmap.observe.words import harmless


@click.command()
@click.argument("pid", type=int)
@click.argument("place", metavar="ADDRESS|NAME")
@click.argument("data")
@form_option
@click.option("--yes", is_flag=True, help="Do not ask.")
def poke(pid: int, place: str, data: str, form: Form, yes: bool) -> None:
    """Write DATA at ADDRESS of process PID, any: hex digits, or with --as numbers (commas between) or text.

    The NAME of a segment that it has mapped, as `realmap shm` prints it, stands for the address of its beginning.

    What is there now is shown, and it is asked first. It is written where the process itself may write, and
    nowhere else. A number below zero is written behind `--`.

    Example: realmap poke 4711 0x7f0012345000 --as f8 2.5,3
    """
    content = written(form, data)
    with ForeignProcess(pid) as process:
        address = place_of(process, place)
        told = words.counted(len(content), "byte")
        before = process.copy_in(address, len(content))
        if not yes:
            for title, shown in (("there is", before), ("there will be", content)):
                click.echo("\n".join([title, *(line.plain for line in lines(address, shown))]))
            click.confirm(f"Write {told} into process {pid}, {harmless(process.name)}?", abort=True)
        process.copy_out(address, content)
    click.echo(f"{told} written")
