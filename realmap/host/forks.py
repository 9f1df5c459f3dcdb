"""What is lost in a forked child: descriptors and maps that are the parent's alone.

Everything here is held weakly, unlike what os.register_at_fork is given directly.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import warnings
from typing import Protocol

from realmap.host.signals import Living


class LostInChild(Protocol):
    """Something that a forked child must not keep."""

    def lose(self) -> None:
        """Called in the child, right after the fork."""


_things: Living[LostInChild] = Living()


def lose_in_child(thing: LostInChild) -> None:
    """Has `thing.lose()` called in every forked child, for as long as it lives."""
    _things.add(thing)


def fork() -> int:
    """As os.fork, beside threads whose locks the child has no use for: from 3.15 on Python warns of any."""
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        return os.fork()


def default_signals_in_child() -> None:
    """In every forked child from now on, what ends this process (SIGTERM, Ctrl-C) does what it does anywhere."""
    os.register_at_fork(before=_hold_signals, after_in_parent=_let_signals, after_in_child=_default_signals)


_ENDING = {signal.SIGINT, signal.SIGTERM}
_mask = threading.local()


def _hold_signals() -> None:
    """One that is sent to the child before it has its own handlers would be the parent's handler's, or lost."""
    _mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)


def _let_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _mask.before)


def _default_signals() -> None:
    signal.set_wakeup_fd(-1)  # it belongs to the parent's loop
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _let_signals()


def _after_fork() -> None:
    for thing in _things.all():
        with contextlib.suppress(Exception):  # one that is half made must not keep the others from it
            thing.lose()


os.register_at_fork(after_in_child=_after_fork)
