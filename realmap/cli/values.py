"""Bytes as numbers and text, and back: what `peek` and `poke` mean by --as."""

from __future__ import annotations

import struct
from typing import Any, TypeAlias

import click

from realmap.observe.words import harmless

#: The names that numpy has for numbers, as the struct module calls them.
NUMBERS = {
    **dict(zip(("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"), "bhiqBHIQ", strict=True)),
    **dict(zip(("f2", "f4", "f8"), "efd", strict=True)),
}
TEXT = "utf8"
#: What `--as` says; None: hex.
Form: TypeAlias = struct.Struct | str | None


def form_of(text: str) -> Form:
    """What bytes are read as: a `struct.Struct`, or text. BadParameter: it is no such thing."""
    if text == TEXT:
        return TEXT
    if text not in NUMBERS and not text.startswith("struct"):
        raise click.BadParameter(f"{text!r} is none of {', '.join(NUMBERS)}, {TEXT}, 'struct FORMAT'.")
    given = f"={NUMBERS[text]}" if text in NUMBERS else text.removeprefix("struct").strip()
    try:
        made = struct.Struct(given)
    except struct.error as error:
        raise click.BadParameter(f"{given!r} is no format of the struct module: {error}.") from None
    if not made.size:
        raise click.BadParameter(f"{given!r} has no bytes.")
    return made


form_option = click.option(
    "--as",
    "form",
    type=form_of,
    metavar="FORM",
    help=f"As numbers ({', '.join(NUMBERS)}), as text (utf8), or as records of the struct module ('struct <iq').",
)


def values(form: Form, data: bytes) -> list[Any]:
    """What they are in that form: numbers, records (lists), or one text; bytes that are left over are not in it."""
    if form is None:
        return []
    if isinstance(form, str):
        return [data.decode("utf-8", "backslashreplace")]
    whole = data[: len(data) - len(data) % form.size]
    records = [[_shown(value) for value in each] for each in form.iter_unpack(whole)]
    return [each[0] if len(each) == 1 else each for each in records]


def _shown(value: Any) -> Any:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value


def written(form: Form, text: str) -> bytes:
    """The bytes that `text` stands for: hex; in a form, text or numbers with commas between. UsageError: it is none."""
    try:
        if form is None:
            return bytes.fromhex(text.removeprefix("0x"))
        if isinstance(form, str):
            return text.encode("utf-8", "surrogateescape")
        return _packed(form, [_number(each.strip()) for each in text.split(",")])
    except (ValueError, struct.error) as error:
        kind = "hex digits (68656c6c6f); text is written with --as utf8" if form is None else "of that form"
        raise click.UsageError(f"{harmless(text)!r} is not {kind}: {error}") from None


def _number(text: str) -> Any:
    try:
        return int(text, 0)
    except ValueError:
        return float(text)


def _packed(form: struct.Struct, numbers: list[Any]) -> bytes:
    each = max(1, len(form.unpack(bytes(form.size))))
    if len(numbers) % each:
        raise ValueError(f"a record has {each} numbers, and there are {len(numbers)}")
    return b"".join(form.pack(*numbers[at : at + each]) for at in range(0, len(numbers), each))
