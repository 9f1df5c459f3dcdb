"""Hosts that are processes of this machine: `--local N`."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Callable

from realmap.lab.campaign import work


class Here:
    """So many runs at a time, on this machine. `hosts`, `notes`: as of `Cluster`."""

    def __init__(self, count: int) -> None:
        name = socket.gethostname()
        self.hosts = [name] if count == 1 else [f"{name}/{number}" for number in range(1, count + 1)]
        self.notes = [""] * count
        self._campaign = str(uuid.uuid4())

    def run(self, host: int, arguments: list[str], tell: Callable[[str], None]) -> work.Outcome:
        """One run. Errors as `work.run`."""
        return work.run(self._campaign, arguments, tell)

    def stop(self) -> None:
        """Ends every run."""
        work.stop(self._campaign)

    def close(self) -> None:
        """Nothing is kept."""
