"""Numbers and names for people: short, and harmless on a terminal."""

from __future__ import annotations

from realmap.host import procfs

UNITS = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
GONE = "gone"


def size(length: float) -> str:
    """Bytes in three figures or so: 333 B, 4 KiB, 1.5 MiB, 16 GiB."""
    for unit, name in UNITS:
        if length >= unit:
            number = length / unit
            return f"{number:.0f} {name}" if number >= 10 or length % unit == 0 else f"{number:.1f} {name}"
    return f"{length:.0f} B"


def short_size(length: int) -> str:
    """The same where every column counts: 333, 4K, 1.5M, 16G."""
    text = size(length)
    number, unit = text.split()
    return number + unit[0] if unit != "B" else number


def duration(nanoseconds: float) -> str:
    """Three figures, with a unit: 512 ns, 4.31 µs, 27.0 ms."""
    for unit, name in ((1e9, "s"), (1e6, "ms"), (1e3, "µs")):
        if nanoseconds >= unit:
            return f"{three(nanoseconds / unit)} {name}"
    return f"{nanoseconds:.0f} ns"


def lapse(seconds: float) -> str:
    """How long ago, roughly: 40 s, 12 min, 3 h, 5 days."""
    for unit, name in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds // unit:.0f} {name}"
    return f"{seconds:.0f} s"


def three(number: float) -> str:
    """Three figures: 1.25, 12.5, 125."""
    return f"{number:.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"


def count(number: float) -> str:
    """A number in three figures or so: 7, 950, 12.3k, 4.5M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.0f}" if number >= 10 or number == int(number) else f"{number:.1f}"


def counted(number: int, noun: str) -> str:
    """1 mapping, 2 mappings, 3 processes."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith('s') else 's'}"


def cut(text: str, longest: int) -> str:
    """`text` in at most so many letters, the last of them an ellipsis where some are missing."""
    return text if len(text) <= longest else text[: max(0, longest - 1)] + "…"[:longest]


def harmless(value: object) -> str:
    """It as text, with whatever a terminal might act upon (control characters, broken bytes) as \\x escapes."""
    text = str(value)
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def program(pid: int) -> str:
    """The name of the program that runs as `pid`; "gone" where it has ended."""
    try:
        return procfs.program(pid)
    except ProcessLookupError:
        return GONE
