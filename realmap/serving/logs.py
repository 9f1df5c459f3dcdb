"""What a kernel has to say besides its answers, through the standard `logging`: the logger "realmap".

Where the program configures no logging, only what its author has to know ("realmap.urgent") goes to stderr: of the rest
a hostile peer could make any amount.

Records about a user process carry `user` (its number in the books) and `user_pid`, those about a call `syscall`.
"""

from __future__ import annotations

import logging
import os

LEVELS = ("debug", "info", "warning", "error")
#: Has a kernel of `boot`, which is a process of its own, say on stderr what is of this level or above.
VARIABLE = "REALMAP_LOG"

log = logging.getLogger("realmap")
#: A handler that does not come back; an end that nobody asked for.
urgent = log.getChild("urgent")


class _Unconfigured(logging.Handler):
    """Is asked first, and speaks where nobody else would."""

    def emit(self, record: logging.LogRecord) -> None:
        """To stderr, if it is urgent."""
        if record.name == urgent.name and log.handlers == [self] and not logging.root.handlers and logging.lastResort:
            logging.lastResort.handle(record)


log.addHandler(_Unconfigured())


def to_stderr(level: str) -> None:
    """Has everything of this level or above written to stderr. ValueError: none of LEVELS."""
    if level.lower() not in LEVELS:
        raise ValueError(f"a level of logging is one of {', '.join(LEVELS)}, not {level!r}")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s realmap %(levelname)s: %(message)s"))
    log.addHandler(handler)
    log.setLevel(level.upper())
    log.propagate = False  # a handler of the root logger would say it once more


def as_environment_says() -> None:
    """The same, where $REALMAP_LOG names a level; any other word of it is a warning."""
    level = os.environ.get(VARIABLE)
    if level:
        try:
            to_stderr(level)
        except ValueError as error:
            to_stderr("warning")
            log.warning("$%s: %s", VARIABLE, error)
