"""Kept windows (`lazy_unmap`): a dropped mirror stays mapped for its next use, within a budget of bytes.

    mirror dropped ──▶ kept ──▶ the same range wanted again: the mirror's, without a system call
                        ├─ the budget is exceeded: the one that was kept longest goes
                        ├─ its mapping is released, or its frames go: it goes with them
                        └─ no space: all of them go; too many maps: the ones kept longest

A kept window is no reference: it never keeps frames alive. It serves one mirror at a time (it is
taken out while one uses it), and is found by frames, range and rights; a larger one serves a
smaller range inside it. The keeping itself is the C core's (`Land`, `Mirror`): it has to be cheaper
than the two system calls that it saves. Here is what can be asked of it.
"""

from __future__ import annotations

from typing import NamedTuple

from realmap._core import Land


class KeptCounts(NamedTuple):
    """How often a mirror was served by a kept window (`hits`) or not, how many went, and what is kept now."""

    hits: int
    misses: int
    evictions: int
    windows: int
    bytes: int


class KeptWindow(NamedTuple):
    """A mapping that no mirror uses: `span` bytes at `base` that show the frames `serial` from byte `start` on."""

    base: int
    span: int
    serial: int
    start: int
    prot: int


class KeptWindows:
    """The kept windows of a `KernelMemory`."""

    def __init__(self, land: Land) -> None:
        self._land = land

    def counts(self) -> KeptCounts:
        """What has happened so far, and what is kept now."""
        land = self._land
        return KeptCounts(land._hits, land._misses, land._evictions, len(land._kept()), land._kept_bytes)

    def windows(self) -> list[KeptWindow]:
        """What is kept now, the one kept longest first."""
        return [KeptWindow(*window) for window in self._land._kept()]

    def clear(self) -> bool:
        """Unmaps all of them; whether there were any."""
        return self._land._clear_kept()
