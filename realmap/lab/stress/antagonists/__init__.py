"""What works against the users of a stress run, and on their pages: each in a process of its own, counted, by the seed.

antagonist  what one is, and bytes of its own that it verifies
pages       page tables and frames          machine     what the machine does by itself
processes   on the users as processes       crew        the runner's side: starts them, counts, ends, restores

Another one is a class in one of these, and its name in `ALL`.
"""

from __future__ import annotations

from collections.abc import Sequence

from realmap.lab.stress.antagonists.antagonist import Antagonist
from realmap.lab.stress.antagonists.machine import Compaction, Ksm, Numa, Reclaim
from realmap.lab.stress.antagonists.pages import Collapse, Holes, PageOut, Windows
from realmap.lab.stress.antagonists.processes import Affinity, Forks, Limits, Oom, Signals, Stops

ALL: dict[str, type[Antagonist]] = {
    each.name: each
    for each in (
        *(Collapse, PageOut, Holes, Windows),
        *(Compaction, Numa, Reclaim, Ksm),
        *(Forks, Affinity, Stops, Signals, Limits, Oom),
    )
}


def chosen(names: Sequence[str]) -> list[type[Antagonist]]:
    """Those of these names; "all": every one. ValueError: there is none of a name."""
    unknown = [name for name in names if name not in ALL and name != "all"]
    if unknown:
        raise ValueError(f"no antagonist is called {unknown[0]!r}: there are all, {', '.join(ALL)}")
    return [kind for name, kind in ALL.items() if name in names or "all" in names]
