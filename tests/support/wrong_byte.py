"""Operations for `realmap stress --ops` with which now and then a byte is written wrong: the run has to notice."""

from __future__ import annotations

import random

import realmap
from realmap.lab.stress import actor, operation
from realmap.lab.workload import Step

_perform = actor.Actor.perform


def _perform_wrongly(self: actor.Actor, step: Step) -> object:
    given = _perform(self, step)
    if step.kind == "write" and not step.seed % 16:
        buffer = self.buffers[step.key]
        buffer[step.offset] = buffer[step.offset] ^ 1
    return given


actor.Actor.perform = _perform_wrongly  # type: ignore[method-assign]


@operation()
def nothing(user: realmap.Process, rng: random.Random) -> None:
    """Makes this a module of operations."""
