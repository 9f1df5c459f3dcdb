"""What a user process might do next: one generator of choices, for `realmap stress` and for the stateful tests.

    choose(model, draw, mix) ──▶ Step ──┬─▶ model.apply(step)    what it should give
                                        └─▶ actor.perform(step)  what it gives (realmap/lab/stress/actor.py)

Where the numbers come from is the caller's: a seed, so that a run can be had again, or hypothesis, which
shrinks them. A step is valid in the model that it was chosen for, and says everything about itself.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from realmap.pages import PAGE_SIZE


class Draw(Protocol):
    """Where choices come from."""

    def below(self, bound: int, /) -> int:
        """A number from 0 on, below `bound`."""
        ...


class Seeded:
    """Choices that a seed decides: the same seed, the same choices."""

    def __init__(self, *seed: object) -> None:
        self.below: Callable[[int], int] = random.Random("/".join(map(str, seed))).randrange


class Step(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing that a process does. `key` names its buffer, offsets and lengths are bytes."""

    kind: str
    key: int = 0
    other: int = 0
    offset: int = 0
    length: int = 0
    #: Bytes a segment; 0 for one segment.
    fragment: int = 0
    #: Of what is written.
    seed: int = 0


@dataclass(frozen=True)
class Mix:
    """How often each kind is chosen, relative to the others, and how large things get (bytes).

    `own`: those of the kinds that the model knows nothing about: a step of one is its seed.
    """

    weights: dict[str, int]
    longest: int = 256 << 10
    buffers: int = 12
    kept: int = 4
    own: frozenset[str] = frozenset({"fork", "serve", "show", "stranger"})


#: Of a process that does everything, and neither dies nor has its memory taken away.
CALM = {
    "map": 12, "map_read_only": 2, "write": 16, "check": 14, "digest": 16, "slow_digest": 4, "copied_digest": 10,
    "reverse": 10, "fill": 8, "copy": 6, "keep": 2, "drop": 3, "unmap": 6, "forget": 3,
}  # fmt: skip
#: What a process does beside others: it forks, serves (or ends it), is served, shows a buffer, looks at a stranger's.
COMPANY = {"fork": 1, "serve": 1, "served": 3, "show": 1, "stranger": 2}
MIXES = {
    "quick": Mix(CALM | COMPANY),
    "soak": Mix(CALM | COMPANY | {"map": 8, "unmap": 5}, longest=64 << 10),
    "storm": Mix(CALM | COMPANY | {"map": 24, "unmap": 12, "forget": 8, "slow_digest": 12, "fork": 3}, longest=1 << 20),
}
#: Of what is served: each bit turned round.
FLIPPED = bytes(255 - byte for byte in range(256))


def pattern(seed: int, length: int) -> bytes:
    """Bytes to write and to know again: no two places of a page alike, no two seeds."""
    block = hashlib.shake_128(seed.to_bytes(8, "little")).digest(min(length, 509))  # 509 is prime: pages differ
    return (block * (length // len(block) + 1))[:length]


@dataclass
class Content:
    """What a buffer should hold."""

    data: bytearray
    writable: bool = True
    #: Mirrors that the kernel keeps of it, by name, with the digest that they will give: nothing is written then.
    kept: dict[int, str] = field(default_factory=dict)


class Model:
    """What a process has, and what each byte of it should be."""

    def __init__(self) -> None:
        self.buffers: dict[int, Content] = {}
        self._keys = 0

    def kinds(self, mix: Mix) -> list[str]:
        impossible: set[str] = set() if len(self.buffers) < mix.buffers else {"map", "map_read_only"}
        if sum(len(content.kept) for content in self.buffers.values()) >= mix.kept:
            impossible.add("keep")
        if not self.fitting("write"):
            impossible.add("copy")
        without_buffer = {"map", "map_read_only", *mix.own}
        return [
            kind for kind in mix.weights if kind not in impossible and (kind in without_buffer or self.fitting(kind))
        ]

    def fitting(self, kind: str) -> list[int]:
        """The keys of the buffers that a step of this kind can be done to."""
        if kind in ("write", "reverse", "fill", "truncate", "served"):
            return [key for key, content in self.buffers.items() if content.writable and not content.kept]
        if kind in ("unmap", "forget"):
            return [key for key, content in self.buffers.items() if not content.kept]
        if kind == "drop":
            return [key for key, content in self.buffers.items() if content.kept]
        return list(self.buffers)

    def next_key(self) -> int:
        """A key that no buffer has had."""
        self._keys += 1
        return self._keys

    def apply(self, step: Step) -> object:
        """Does it to the model; the result that the real step should have."""
        if step.kind in ("map", "map_read_only"):
            self.buffers[step.key] = Content(bytearray(step.length), step.kind == "map")
            return None
        if not step.key:  # of its own
            return None
        content = self.buffers[step.key]
        end = step.offset + step.length
        part = bytes(content.data[step.offset : end])
        if step.kind in ("write", "fill"):
            content.data[step.offset : end] = pattern(step.seed, step.length)
        elif step.kind == "reverse":
            content.data[step.offset : end] = part[::-1]
        elif step.kind == "served":
            content.data[step.offset : end] = part.translate(FLIPPED)
            return hashlib.sha256(part).digest() + content.data
        elif step.kind == "copy":
            target = self.buffers[step.other].data
            target[: len(part)] = part
        elif step.kind == "check":
            return bytes(content.data)
        elif step.kind in ("digest", "slow_digest", "copied_digest"):
            return hashlib.sha256(part).hexdigest()
        elif step.kind == "keep":
            content.kept[step.other] = hashlib.sha256(part).hexdigest()
        elif step.kind == "drop":
            return content.kept.pop(step.other)
        elif step.kind in ("unmap", "forget", "truncate"):
            del self.buffers[step.key]
        return None


def choose(model: Model, draw: Draw, mix: Mix) -> Step:
    """The next step of the process."""
    kinds = model.kinds(mix)
    at = draw.below(sum(mix.weights[kind] for kind in kinds))
    for kind in kinds:
        at -= mix.weights[kind]
        if at < 0:
            break
    if kind in ("map", "map_read_only"):
        return _map(model, draw, mix, kind)
    if kind in mix.own:
        return Step(kind, seed=draw.below(1 << 32))
    keys = model.fitting(kind)
    key = keys[draw.below(len(keys))]
    content = model.buffers[key]
    if kind in ("check", "unmap", "forget"):
        return Step(kind, key)
    if kind == "served" and not draw.below(4):
        return Step(kind, key, length=len(content.data))
    if kind == "drop":
        names = sorted(content.kept)
        return Step(kind, key, names[draw.below(len(names))])
    if kind == "copy":
        others = model.fitting("write")
        other = others[draw.below(len(others))]
        longest = min(len(content.data), len(model.buffers[other].data))
        length = 1 + draw.below(longest)
        return Step(kind, key, other, draw.below(len(content.data) - length + 1), length)
    offset = draw.below(len(content.data))
    length = 1 + draw.below(len(content.data) - offset)
    other = model.next_key() if kind == "keep" else 0
    return Step(kind, key, other, offset, length, seed=draw.below(1 << 32) if kind in ("write", "fill") else 0)


def _map(model: Model, draw: Draw, mix: Mix, kind: str) -> Step:
    # Sizes by their order of magnitude: as many of a few bytes as of many pages.
    length = 1 + draw.below(1 << (1 + draw.below(mix.longest.bit_length() - 1)))
    pages = -(-length // PAGE_SIZE)
    fragment = PAGE_SIZE * (1 + draw.below(pages)) if draw.below(3) == 0 else 0
    return Step(kind, model.next_key(), 0, 0, length, max(fragment, -(-pages // 64) * PAGE_SIZE) if fragment else 0)
