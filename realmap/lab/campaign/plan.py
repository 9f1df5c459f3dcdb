"""What a campaign does: a command, on which host, how often, and by which seed."""

from __future__ import annotations

import random

import msgspec


class Plan(msgspec.Struct, frozen=True):
    """`command` is stress or bench, `arguments` are its own.

    Each host runs it `repeat` times, or until `hours` have passed.
    """

    command: str
    arguments: list[str]
    seed: int = 0
    repeat: int | None = 1
    hours: float | None = None

    def goes_on(self, turns: int, seconds: float) -> bool:
        """Whether a host that has done so many turns, so many seconds after the beginning, does another."""
        return (self.repeat is None or turns < self.repeat) and (self.hours is None or seconds < self.hours * 3600)

    def arguments_of(self, host: int, turn: int) -> list[str]:
        """Of `realmap`, for one run: no two have the same seed, and the plan's decides all of them."""
        seed = random.Random(f"{self.seed}/{host}/{turn}").getrandbits(32)
        return [self.command, *self.arguments, *(["--seed", str(seed)] if self.command == "stress" else [])]
