"""`realmap call`: one call of a syscall, from a shell."""

from __future__ import annotations

import io
import os
import stat
import sys
from typing import Any

import click
import msgspec

from realmap.ambient import connect
from realmap.cli.output import Seconds, show_json
from realmap.cli.target import BOUND, find, kernel_option
from realmap.errors import KernelError, SyscallFailed, WrongArguments
from realmap.observe.words import harmless
from realmap.user import Buffer, Process

#: So much is read at most from what does not say beforehand how long it is, in bytes.
LONGEST = 1 << 30


@click.command(context_settings={"allow_interspersed_args": False}, epilog=BOUND)
@kernel_option
@click.option(
    "--timeout",
    type=Seconds(min=0),
    metavar="SECONDS",
    help="Wait no longer for the answer; by default as long as the handler takes.",
)
@click.option(
    "--out", type=click.IntRange(min=1), metavar="N", help="Print the bytes of the N-th @FILE afterwards instead."
)
@click.argument("name")
@click.argument("args", nargs=-1, metavar="[ARG]...")
def call(path: str | None, timeout: float | None, out: int | None, name: str, args: tuple[str, ...]) -> None:
    """Make one call of the syscall NAME, and print what it answers as JSON.

    An ARG is a JSON value where it parses as one (5, true, null, "5", [1, 2]), else text. @FILE is a buffer that
    holds the bytes of that file: mapped, filled and passed; @@TEXT is text that begins with @. Bytes in the answer
    are printed as text where they are UTF-8, else as {"base64": "..."}. Options come before NAME.

    Example: realmap call sha256 @/etc/services
    """
    for each in ("--kernel", "--timeout", "--out"):
        if each in args:
            raise click.UsageError(f"{each} comes before {name}; as an argument of it, write '\"{each}\"'")
    wanted = sum(_is_file(text) for text in args)
    if out is not None and out > wanted:
        raise click.UsageError(f"--out {out}: among the arguments there are {wanted} of the form @FILE")
    with connect(find(path)) as me:
        buffers: list[Buffer] = []
        values = [_value(me, text, buffers) for text in args]
        try:
            answer = me.call(name, *values, timeout=timeout)
        except (SyscallFailed, WrongArguments) as error:
            # A handler that was given text in place of a buffer finds no such method, or no such type.
            unfit = isinstance(error, WrongArguments) or error.type in ("TypeError", "AttributeError")
            hint = "; a buffer is passed as @FILE" if unfit and not buffers else ""
            # The rest is its handler's traceback, for whoever wrote it.
            raise click.ClickException(harmless(str(error).splitlines()[0]) + hint) from None
        except KernelError:  # some are a ValueError, too
            raise
        except (TypeError, ValueError, OverflowError) as error:
            raise click.ClickException(f"the arguments cannot be sent: {error}") from None
        if out is not None:
            with memoryview(buffers[out - 1]) as view:
                _write(view)
        else:
            show_json(_printable(answer), line=True)


def _is_file(text: str) -> bool:
    return text.startswith("@") and not text.startswith("@@")


def _value(me: Process, text: str, buffers: list[Buffer]) -> Any:
    if _is_file(text):
        buffers.append(_loaded(me, text[1:]))
        return buffers[-1]
    if text.startswith("@@"):
        return text[1:]
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeEncodeError):
        return text


def _loaded(me: Process, name: str) -> Buffer:
    try:
        with open(name, "rb") as file:
            status = os.fstat(file.fileno())
            if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
                raise click.ClickException(f"{name} is a device, and may have no end: put some of it into a file")
            if stat.S_ISREG(status.st_mode) and status.st_size:
                return _filled(me, name, file, status.st_size)
            data = file.read(LONGEST + 1)  # a pipe, or a file of /proc
    except OSError as error:
        if isinstance(error, KernelError):
            raise
        raise click.ClickException(f"cannot read {name}: {error.strerror or error}") from None
    if not 0 < len(data) <= LONGEST:
        wrong = f"gives more than {LONGEST} bytes" if data else "is empty"
        raise click.ClickException(f"{name} {wrong}: a buffer of it has at least one byte, and an end")
    return _filled(me, name, io.BytesIO(data), len(data))


def _filled(me: Process, name: str, file: io.BufferedIOBase, size: int) -> Buffer:
    buffer = me.map(size)
    with memoryview(buffer) as view:
        if file.readinto(view) < size:
            raise click.ClickException(f"{name} was cut short while it was read")
    return buffer


def _write(view: memoryview) -> None:
    sys.stdout.flush()
    sys.stdout.buffer.write(view)
    sys.stdout.buffer.flush()


def _printable(value: Any) -> Any:
    """`value` as JSON can have it."""
    if isinstance(value, bytes | bytearray):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return {"base64": value}  # msgspec writes bytes as base64
    if isinstance(value, dict):
        return {key if isinstance(key, str) else str(_printable(key)): _printable(each) for key, each in value.items()}
    return [_printable(each) for each in value] if isinstance(value, list) else value
