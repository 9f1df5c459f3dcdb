"""Files that commands write."""

from __future__ import annotations

import os

import click


def require_writable(path: str) -> None:
    """Before the run, not after it. A file that was not there is not left behind."""
    there = os.path.lexists(path)
    try:
        with open(path, "ab"):
            pass
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror}") from None
    if not there:
        os.unlink(path)
