"""Mirrors of a process that is no user of a kernel, at random: against a model, and while it does its worst."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
from conftest import PAGE, long, scaled
from strangers import FREE, KINDS, pattern, stranger

from realmap import (
    AccessDenied,
    CrossProcessMapping,
    ForeignProcess,
    InvalidAddress,
    InvalidMemState,
    KernelError,
    MemoryFault,
    ProcessKilled,
    k_r,
    k_rw,
)
from realmap.host import stranger as host

#: As `race` of stranger.c has it.
SLOTS, SLOT_PAGES = 8, 4
#: Pages of the model.
PAGES = 64


class Model:
    """What a stranger has mapped in PAGES pages, page by page: None, or (kind, writable, bytes)."""

    def __init__(self) -> None:
        self.pages: list[tuple[str, bool, bytearray] | None] = [None] * PAGES

    def right(self, start: int, length: int, writes: bool) -> type[KernelError] | bytes:
        """What a mirror of [start, start + length) shows, or which error is right."""
        touched = range(start // PAGE, (start + length - 1) // PAGE + 1)
        pages = [self.pages[number] if number < PAGES else None for number in touched]
        for page in pages:  # in order of address, as they are looked at
            if page is None:
                return InvalidAddress
            if writes and not page[1]:
                return AccessDenied
        found = [page for page in pages if page is not None]
        if any(kind == "private" for kind, _, _ in found):
            return InvalidMemState
        whole = b"".join(bytes(data) for _, _, data in found)
        return whole[start % PAGE : start % PAGE + length]

    def write(self, start: int, data: bytes) -> None:
        for at, byte in enumerate(data, start):
            page = self.pages[at // PAGE]
            assert page is not None
            page[2][at % PAGE] = byte


@pytest.mark.parametrize("count", [2000, long(100_000)])
def test_mirrors_at_random_against_a_model(tmp_path: Path, count: int) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng, model = random.Random(seed), Model()
    kinds = [*KINDS, "private"] if host.may_open_map_files() else ["posix", "memfd", "file", "private"]
    with stranger(tmp_path) as other, ForeignProcess(other.pid) as process:
        for _ in range(count if count < 10_000 else scaled(count)):
            if rng.random() < 0.02:
                first, pages = rng.randrange(PAGES), rng.randint(1, 5)
                pages = min(pages, PAGES - first)
                if rng.random() < 0.25:
                    other.tell("unmap", FREE + first * PAGE, pages * PAGE)
                    model.pages[first : first + pages] = [None] * pages
                    continue
                kind, writable, mark = rng.choice(kinds), rng.random() < 0.8, rng.randrange(256)
                flags = "k" if kind != "posix" else ""
                other.map(kind, pages, FREE + first * PAGE, flags, mark)
                if not writable:
                    other.tell("protect", FREE + first * PAGE, pages * PAGE, 1)
                content = pattern(pages * PAGE, mark)
                for number in range(pages):
                    data = bytearray(content[number * PAGE : (number + 1) * PAGE])
                    model.pages[first + number] = (kind, writable, data)
            start, length = rng.randrange(PAGES * PAGE), int(PAGE * rng.expovariate(1)) + 1
            writes = rng.random() < 0.3
            right = model.right(start, length, writes)
            if not isinstance(right, bytes):
                with pytest.raises(right):
                    process.mirror(FREE + start, length, k_rw if writes else k_r)
                continue
            with process.mirror(FREE + start, length, k_rw if writes else k_r) as mirror:
                assert (bytes(mirror) == right, len(mirror)) == (True, length)
                if writes:
                    mine = rng.randbytes(min(length, 50))
                    mirror[: len(mine)] = mine
                    model.write(start, mine)
                elif rng.random() < 0.1:
                    assert process.copy_in(FREE + start, length) == right


def require_right(pid: int, address: int, mirror: CrossProcessMapping) -> bool:
    """Every word in it is of that process and that page of that slot, or is gone; whether any is gone."""
    data = bytes(mirror)
    gone = False
    for at in range(-address % 8, len(data) - 7, 256):
        (word,) = struct.unpack_from("=Q", data, at)
        slot, inside = divmod((address + at - FREE) // PAGE, SLOT_PAGES)
        if not word:
            gone = True
        else:
            assert word == pid << 32 | slot << 16 | inside + 1, (hex(word), pid, slot, inside)
    return gone


@pytest.mark.parametrize("rounds", [50, long(5000)])
def test_a_process_that_maps_unmaps_truncates_execs_and_dies(tmp_path: Path, rounds: int) -> None:
    if not host.may_open_map_files():
        pytest.skip("what it maps has neither name nor descriptor for long: it takes CAP_SYS_ADMIN")
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    kept: list[tuple[int, int, CrossProcessMapping]] = []
    seen = {"mirrors": 0, "gone": 0, "holes": 0, "dead": 0}
    for _ in range(rounds if rounds < 1000 else scaled(rounds)):
        with stranger(tmp_path, "race", str(rng.randrange(1 << 31))) as other, ForeignProcess(other.pid) as process:
            for turn in range(looks := rng.randint(1, 60)):
                if turn == looks - 2:
                    other.process.kill()  # between any two of its steps
                start, length = rng.randrange(SLOTS * SLOT_PAGES * PAGE), rng.randint(1, 2 * PAGE)
                address = FREE + start
                try:
                    if rng.random() < 0.2:
                        process.copy_in(address, length)
                        continue
                    mirror = process.mirror(address, length)
                except InvalidAddress:
                    seen["holes"] += 1
                except MemoryFault:
                    seen["gone"] += 1
                except ProcessKilled:
                    seen["dead"] += 1
                else:
                    seen["mirrors"] += 1
                    kept.append((other.pid, address, mirror))
        while len(kept) > 20:  # long after: the process has unmapped it, or is dead
            pid, address, mirror = kept.pop(rng.randrange(len(kept)))
            gone = require_right(pid, address, mirror)
            try:
                mirror.drop()
            except MemoryFault:
                seen["gone"] += 1
            else:
                assert not gone, "zeros that nobody tells of"
    for _, _, mirror in kept:
        try:
            mirror.drop()
        except MemoryFault:
            pass
    assert all(seen.values()) or rounds < 1000, seen  # few rounds need not meet everything
