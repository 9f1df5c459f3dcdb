"""Random mirrors against a plain bytearray, with canaries on both sides."""

from __future__ import annotations

import random

import pytest
from canaries import AT, between_canaries
from conftest import PAGE, land_maps, scaled
from hypothesis import given, settings
from hypothesis import strategies as st

from realmap.memory import CrossProcessMapping, KernelMemory, ProcessMemory
from realmap.rights import MemoryType, u_rw

FULL = 200_000


def run(seed: int, pages: int, fragment: int, split: int, turns: int) -> int:
    """Mirrors random ranges, writes through them, and compares all bytes; how many mirrors were tried."""
    rng = random.Random(seed)
    size = pages * PAGE
    kernel = KernelMemory()
    memory, frames, model = between_canaries(rng, pages, fragment, split)
    for _ in range(turns):
        offset = rng.randrange(size)
        length = min(size - offset, rng.choice((1, 2, rng.randrange(1, 64), PAGE, 3333, rng.randrange(1, size))))
        with memory.mirror_mapping(AT + offset, length, kernel=kernel) as mirror:
            start = PAGE + offset
            assert bytes(mirror) == model[start : start + length]
            content = rng.randbytes(min(length, 40))
            at = rng.randrange(length - len(content) + 1)
            mirror[at : at + len(content)] = content
            model[start + at : start + at + len(content)] = content
    assert frames.read(0, frames.length, 0) == model
    memory.release_all()
    assert (frames.freed, kernel.live) == (True, 0)
    return turns


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 32), st.integers(1, 12), st.integers(1, 16), st.data())
def test_mirrors_show_what_a_bytearray_shows(seed: int, pages: int, fragment: int, data: st.DataObject) -> None:
    run(seed, pages, fragment, data.draw(st.integers(0, pages)), 20)


@pytest.mark.slow
def test_mirrors_show_what_a_bytearray_shows_full_count() -> None:
    wanted, done, seed = scaled(FULL), 0, 0
    while done < wanted:
        rng = random.Random(seed)
        pages = rng.randrange(1, 17)
        done += run(seed, pages, rng.randrange(1, 20), rng.randrange(pages + 1), 200)
        seed += 1
    assert land_maps() == []
    print(f"{done} mirrors, 0 wrong bytes")


@settings(max_examples=60, deadline=None)
@given(offset=st.integers(-2, 6 * PAGE), length=st.integers(-2, 6 * PAGE))
def test_what_is_mirrored_is_what_the_arithmetic_says(offset: int, length: int) -> None:
    """The acceptance of every (offset, length) is that of lines 4 to 6."""
    memory = ProcessMemory()
    mapping = memory.create_regular_mapping(AT, 4 * PAGE, MemoryType.HEAP, u_rw)
    good = 0 <= offset and 0 < length and offset + length <= 4 * PAGE
    try:
        mirror = CrossProcessMapping.mirror_mapping(mapping, offset, length, kernel=KernelMemory())
    except ValueError:
        assert not good
    else:
        assert good
        assert land_maps()[0].length == -(-(offset % PAGE + length) // PAGE) * PAGE
        mirror.drop()
    memory.release_all()
