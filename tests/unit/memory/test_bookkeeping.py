"""The ordered tree, against a plain list."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

from realmap.errors import KernelPanic
from realmap.memory import bookkeeping
from realmap.memory.bookkeeping import Bookkeeping, Space

LOW, HIGH = 1000, 1400


class Model(RuleBasedStateMachine):
    """Every answer of the tree is the one a list of ranges gives."""

    ranges = Bundle("ranges")

    def __init__(self) -> None:
        super().__init__()
        self.leaf, bookkeeping.LEAF = bookkeeping.LEAF, 4  # many leaves with few ranges
        self.tree: Bookkeeping[tuple[int, int]] = Bookkeeping(LOW, HIGH)
        self.model: list[tuple[int, int]] = []

    def teardown(self) -> None:
        bookkeeping.LEAF = self.leaf

    def hit(self, start: int, end: int) -> list[tuple[int, int]]:
        return [entry for entry in self.model if entry[0] < end and start < entry[1]]

    @rule(target=ranges, start=st.integers(LOW - 5, HIGH + 5), length=st.integers(0, 30))
    def add(self, start: int, length: int) -> object:
        end = start + length
        if start < LOW or end > HIGH or not length or self.hit(start, end):
            with pytest.raises(KernelPanic):
                self.tree.add(start, end, (start, end))
            return multiple()
        self.tree.add(start, end, (start, end))
        self.model = sorted([*self.model, (start, end)])
        return (start, end)

    @rule(entry=consumes(ranges))
    def remove(self, entry: tuple[int, int]) -> None:
        assert self.tree.remove(entry[0]) == entry
        self.model.remove(entry)
        with pytest.raises(KernelPanic):
            self.tree.remove(entry[0])

    @rule(
        length=st.integers(1, 60),
        cursor=st.integers(LOW, HIGH),
        gap=st.integers(0, 3),
        bits=st.integers(0, 4),
        residue=st.integers(0, 15),
        high=st.sampled_from([HIGH, HIGH - 100]),
    )
    def find(self, length: int, cursor: int, gap: int, bits: int, residue: int, high: int) -> None:
        modulus = 1 << bits
        residue %= modulus

        def fits(at: int) -> bool:
            return (
                at % modulus == residue
                and at + length <= high
                and not self.hit(max(at - gap, LOW), min(at + length + gap, HIGH))
            )

        expected = next((at for at in range(cursor, high) if fits(at)), None)
        found = self.tree.find_hole(length, cursor, gap=gap, residue=residue, modulus=modulus, high=high)
        assert found == expected

    @precondition(lambda self: self.model)
    @rule(address=st.integers(LOW, HIGH - 1), length=st.integers(1, 40))
    def ask(self, address: int, length: int) -> None:
        inside = self.hit(address, address + 1)
        assert self.tree.at(address) == (inside[0] if inside else None)
        hits = self.hit(address, min(address + length, HIGH))
        assert self.tree.overlap(address, address + length) == (hits[0] if hits else None)
        after = next(((entry[0], entry) for entry in self.model if entry[0] >= address), None)
        assert self.tree.following(address) == after
        if inside:
            with pytest.raises(KernelPanic):
                self.tree.hole(address)
        else:
            start = max([LOW, *(end for _, end in self.model if end <= address)])
            assert self.tree.hole(address) == (start, after[0] if after else HIGH)

    @invariant()
    def same_ranges(self) -> None:
        assert list(self.tree) == self.model
        assert len(self.tree) == len(self.model)


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


def test_a_space_goes_on_from_where_the_last_search_ended() -> None:
    space: Space[None] = Space(0, 100)
    assert [space.find(10) for _ in range(3)] == [0, 10, 20]
    space.tree.add(30, 95, None)
    assert space.find(10) == 0, "round to the bottom"
    assert space.find(31) is None


def test_obstacles_are_passed_over_until_they_are_dropped() -> None:
    space: Space[None] = Space(0, 100, gap=5)
    space.note_obstacle(-10, 20)
    space.note_obstacle(15, 30)
    space.note_obstacle(60, 200)
    assert space.find(10) == 30
    assert space.hole_end(30) == 60
    assert space.find(31) is None
    assert space.drop_obstacles()
    assert not space.drop_obstacles()
    assert space.find(31) == 45


def test_a_search_among_many_is_quick() -> None:
    """Not a time: how many ranges a search looks at stays far below how many there are."""
    tree: Bookkeeping[int] = Bookkeeping(0, 1 << 40)
    for index in range(100_000):
        tree.add(index * 10, index * 10 + 9, index)
    looked = 0

    class Counting(list):  # type: ignore[type-arg]
        def __getitem__(self, index: object) -> object:
            nonlocal looked
            looked += 1
            return super().__getitem__(index)  # type: ignore[index]

    assert tree.find_hole(2, 0) is not None  # every leaf's widest hole is known from here on
    for leaf in tree._leaves:
        leaf.starts = Counting(leaf.starts)
    tree.remove(500_000)
    looked = 0
    assert tree.find_hole(5, 0) == 499_999
    assert looked < 5_000
    assert tree.at(77_777 * 10 + 3) == 77_777
