"""What keeps our blocks from the resource tracker of the standard library."""

from __future__ import annotations

from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from typing import Any

from realmap.host.signals import Living

_blocks: Living[SharedMemory] = Living()


def conceal(block: SharedMemory) -> None:
    """The tracker never hears of this one's name, for as long as it lives."""
    _blocks.add(block)


def hide() -> None:
    """Many programs tell the tracker of each block, mostly that it shall forget it. What it does not know it complains
    of then, and what it knows it unlinks at exit: it shall never hear of ours, whichever of its functions is called.
    """
    tracker: Any = resource_tracker._resource_tracker
    send = tracker._send

    def send_others(command: str, name: str, kind: str) -> None:
        if kind != "shared_memory" or name.lstrip("/") not in [each.name.lstrip("/") for each in _blocks.all()]:
            send(command, name, kind)

    tracker._send = send_others
