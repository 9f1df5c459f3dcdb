"""What is done in a forked child of this process, and said to it."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable

from realmap.host import forks

#: So long it may take, in seconds.
BOUND = 60


def said_in_a_child(say: Callable[[], str]) -> str:
    """What `say` returns there; nothing, where it ends before."""
    reader, writer = os.pipe()
    child = forks.fork()
    if not child:
        try:
            signal.alarm(BOUND)
            os.write(writer, say().encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as said:
        text = said.read()
    os.waitpid(child, 0)
    return text


def in_a_child(work: Callable[[], object]) -> None:
    """Raises what went wrong there."""

    def say() -> str:
        try:
            work()
        except BaseException:
            return traceback.format_exc()
        return "well"

    said = said_in_a_child(say)
    assert said == "well", said or "it has died"
