"""A lock of `realmap.sync` that another thread holds."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from conftest import BOUND

from realmap.sync import Lock


@contextlib.contextmanager
def held_elsewhere(lock: Lock) -> Iterator[None]:
    """Another thread holds it meanwhile."""
    taken, over = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            taken.set()
            over.wait(BOUND)

    thread = threading.Thread(target=hold)
    thread.start()
    assert taken.wait(BOUND)
    yield
    over.set()
    thread.join(BOUND)
