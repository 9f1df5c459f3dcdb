"""What is lost in a forked child: descriptors and maps that are the parent's alone.

Everything here is held weakly, unlike what os.register_at_fork is given directly.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from typing import Protocol

from realmap.host.signals import Living


class LostInChild(Protocol):
    """Something that a forked child must not keep."""

    def _after_fork_in_child(self) -> None:
        """Called in the child, right after the fork."""


_things: Living[LostInChild] = Living()


def lose_in_child(thing: LostInChild) -> None:
    """Has `thing._after_fork_in_child()` called in every forked child, for as long as it lives."""
    _things.add(thing)


def fork() -> int:
    """As os.fork, beside threads whose locks the child has no use for: from 3.15 on Python warns of any."""
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        return os.fork()


def _after_fork() -> None:
    for thing in _things.all():
        with contextlib.suppress(Exception):  # one that is half made must not keep the others from it
            thing._after_fork_in_child()


os.register_at_fork(after_in_child=_after_fork)
