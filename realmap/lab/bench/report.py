"""What a bench finds, typed: figures in nanoseconds, ratios, what was left out and why."""

from __future__ import annotations

import msgspec

FORM = 3


class Spread(msgspec.Struct, frozen=True):
    """The median of some rounds, and between what 80 % of them lay."""

    median: float
    p10: float
    p90: float


class Figure(msgspec.Struct, frozen=True):
    """One contender: what one operation takes, and how that compares with its floor in the same rounds.

    `size` in bytes and `work` where they matter; `count` operations a round; `unit` "ns", "B" for bytes, or "".
    `unsteady`: the middle 80 % of the rounds are wider apart than half of the median.
    """

    group: str
    name: str
    size: int | None
    work: str | None
    floor: str | None
    time: Spread
    ratio: Spread | None
    rounds: int
    count: int
    unsteady: bool
    unit: str = "ns"


class Limit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the project holds itself to: in the race of `group`, `size`, `work`, `name` takes `limit` times `floor`.

    Without a `floor`, `name` takes `limit` of the figure's unit.
    """

    what: str
    group: str
    name: str
    limit: float
    floor: str | None = None
    size: int | None = None
    work: str | None = None


class Reached(msgspec.Struct, frozen=True):
    """How such a limit was held: `what`, what was `found`, and whether that is met.

    `found` is a ratio, and `ours` and `theirs` the medians behind it; or, with a `unit`, the figure itself. It is None
    where it could not be measured; `why` then says so.
    """

    what: str
    limit: float
    found: Spread | None
    ours: float | None = None
    theirs: float | None = None
    unit: str = ""
    why: str = ""

    @property
    def met(self) -> bool | None:
        """Whether it is; None where it was not measured."""
        return None if self.found is None else self.found.median <= self.limit


class Missing(msgspec.Struct, frozen=True):
    what: str
    why: str


class Report(msgspec.Struct):
    """Everything that one run found. `form` is the version of this structure; `seconds` how long it took."""

    form: int
    version: str
    groups: list[str]
    quick: bool
    machine: dict[str, str | int | float | bool]
    seconds: float = 0.0
    figures: list[Figure] = []
    reach: list[Reached] = []
    missing: list[Missing] = []
    #: What a reader should take from it, in words.
    sentences: list[str] = []
    #: What makes the figures doubtful.
    doubts: list[str] = []
