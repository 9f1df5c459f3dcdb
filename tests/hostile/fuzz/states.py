"""States of a ring that no honest client makes: words, lengths and contents, also changed while the kernel reads them.

A state is a list of writes. Where one says where, it says so from the place on where the next call would go: what the
generator makes depends on its seed alone.

    ("call", data)                the next slot holds `data`; published with the other calls of this state
    ("length", slot, value)       the length of a slot of the kernel's queue, so many from the next one on
    ("bytes", queue, at, data)    bytes anywhere in a queue's slots, or in the names before them
    ("word", queue, word, what, value)      tail, cpu, head or asleep: a number, or one that is relative to the true one
    ("race", turns, data)         while the kernel reads: the call published last changes, `turns` times
"""

from __future__ import annotations

import random
import struct
from typing import Any, NamedTuple

from mutations import Mutator, is_request

from realmap._core import RING_BYTES, RING_MESSAGE

#: The layout of a queue: realmap/_core/core.h. A head has a message's length, and the message where that is short.
TAIL, CPU, HEAD, ASLEEP, PLACES, NAMES = 0, 4, 64, 128, 192, 256
NAME_COUNT, NAME_BYTES = 16, 64
HEADS, HEAD_BYTES = NAMES + NAME_COUNT * NAME_BYTES, 64
SHORT = HEAD_BYTES - 4
SLOTS, SLOT_COUNT, SLOT_BYTES = 4096, 32, RING_MESSAGE
QUEUE_BYTES = RING_BYTES // 2
assert QUEUE_BYTES == SLOTS + SLOT_COUNT * SLOT_BYTES
#: The kernel reads calls from queue 0, and writes answers into queue 1.
CALLS, ANSWERS = 0, 1

Write = tuple[Any, ...]
#: A request that is right and wants no answer: it shows that the kernel has got past what stands before it.
QUIET = b"\x94\x01\x00\xa3nop\x90"
_WORDS = [0, 1, 2, 31, 32, 33, 2**31 - 1, 2**31, 2**32 - 1]


def head_of(number: int) -> int:
    """Where the length of that message lies in its queue."""
    return HEADS + number % SLOT_COUNT * HEAD_BYTES


def bytes_of(number: int, size: int) -> int:
    """And where the message, of so many bytes."""
    return head_of(number) + 4 if size <= SHORT else SLOTS + number % SLOT_COUNT * SLOT_BYTES


class State(NamedTuple):
    """One set of writes."""

    kind: str
    writes: list[Write]
    #: Whether the kernel is woken right after it, needed or not.
    bell: bool
    #: Whether the kernel may send the client away for it: nothing is written behind it before that is known.
    fatal: bool


class Scribbler:
    """Makes states out of a seed."""

    def __init__(self, seed: str) -> None:
        self._calls = Mutator(seed + "/calls")
        self.random = random.Random(seed)

    def state(self) -> State:
        """The next one."""
        pick, bell = self.random.random(), self.random.random() < 0.1
        if pick < 0.27:
            calls = [self._fitting() for _ in range(self.random.randrange(1, 4))]
            return State("calls", [("call", data) for data in calls], bell, not all(map(is_request, calls)))
        if pick < 0.70:
            return State("words", self._words(), bell, False)
        if pick < 0.92:
            return State("slots", [*self._bytes(), *self._quiet()], bell, False)
        if pick < 0.97:
            data = bytearray(self._fitting() if self.random.random() < 0.2 else QUIET)
            return State("race", [("call", bytes(data)), self._race()], bell, True)
        if pick < 0.985:
            size = self.random.choice((0, 1, SHORT, SHORT + 1, RING_MESSAGE, RING_MESSAGE + 1, 2**31, 2**32 - 1))
            return State("length", [("call", QUIET), ("length", 0, size)], bell, True)
        return State("tail", [*self._bytes(), ("word", CALLS, TAIL, "next", self._step())], bell, True)

    def _fitting(self) -> bytes:
        return self._calls.message(0.02)[:RING_MESSAGE]

    def _quiet(self) -> list[Write]:
        return [("call", QUIET)] * self.random.randrange(2)

    def _words(self) -> list[Write]:
        """Words that are the kernel's, or that the kernel only looks at. (The tail of the calls is what publishes.)"""
        writes: list[Write] = []
        for _ in range(self.random.randrange(1, 5)):
            queue = self.random.randrange(2)
            word = self.random.choice(
                (CPU, HEAD, ASLEEP, self._place()) if queue == CALLS else (TAIL, CPU, HEAD, HEAD, ASLEEP, ASLEEP)
            )
            if word >= PLACES:
                writes.append(("word", queue, word, "is", self.random.choice((*range(9), 2**32 - 1))))
            elif word == HEAD and queue == ANSWERS and self.random.random() < 0.5:
                writes.append(("word", queue, word, "tail", self.random.choice((0, 1, -1, 32, -32, -33, 2**31))))
            else:
                value = self.random.choice(_WORDS) if self.random.random() < 0.8 else self.random.getrandbits(32)
                writes.append(("word", queue, word, "is", value))
        # The kernel puts its own head right with the next call that it takes: how far it is can be read there again.
        return [*writes, ("call", QUIET)]

    def _place(self) -> int:
        return PLACES + 4 * self.random.randrange(16)

    def _bytes(self) -> list[Write]:
        writes: list[Write] = []
        for _ in range(self.random.randrange(1, 4)):
            data = self.random.randbytes(self.random.choice((4, 4, 8, 64, 2048)))
            at = bytes_of(self.random.randrange(SLOT_COUNT), self.random.choice((0, SLOT_BYTES)))
            if self.random.random() < 0.3:
                at = self.random.randrange(HEADS, QUEUE_BYTES)
            at = min(at, QUEUE_BYTES - len(data))
            if self.random.random() < 0.15:  # the names before them: a length, whether it lasts, a text
                length = self.random.choice((0, 1, 4096, 70_000, 2**40, 2**63, 2**64 - 1))
                text = self.random.choice((b"psm_" + b"a" * 20, b"a" * 24, b"f" * 24, self.random.randbytes(48)))
                data = struct.pack("=QQ48s", length, self.random.choice((0, 1, 2**63)), text)
                at = HEADS - NAME_BYTES * self.random.randrange(1, NAME_COUNT + 1)
            writes.append(("bytes", self.random.randrange(2), at, data))
        return writes

    def _race(self) -> Write:
        data = self.random.choice(
            (self.random.randbytes(4), b"\xff\xff\xff\xff", b"\0\x08\0\0", b"\1\x08\0\0", b"\x3d\0\0\0", b"\0\0\0\0")
        )
        return ("race", self.random.choice((1, 10, 50)), data)

    def _step(self) -> int:
        """By how much a tail lies: backwards, within what a ring holds (old contents come again), or beyond."""
        return self.random.choice((-1, -32, 1, 2, 31, 32, 33, 2**31, self.random.getrandbits(32)))
