"""How long something took, counted in buckets: percentiles."""

from __future__ import annotations

import time

import pytest

from realmap._core import Durations


def of(*took: int) -> Durations:
    """These, in nanoseconds, and what it takes to count them."""
    found = Durations()
    for each in took:
        found.since(time.monotonic_ns() - each)
    return found


def test_nothing_yet() -> None:
    assert Durations().summary() == (None, None, None)


@pytest.mark.parametrize("exact", [10**5, 333_333, 10**6, 2**20 - 1, 2**20, 10**9, 10**12, 10**17])
def test_each_is_right_to_six_percent(exact: int) -> None:
    p50, p99, longest = of(exact).summary()
    assert longest is not None
    assert longest >= exact / 1e9
    assert p50 == p99
    assert p50 == pytest.approx(longest, rel=0.0626)
    assert p50 <= longest


def test_percentiles_are_those_of_the_whole() -> None:
    for slow, p99 in ((1, 10**6), (2, 10**9)):  # of a hundred
        found = of(*[10**6] * (100 - slow), *[10**9] * slow).summary()
        assert found == (
            pytest.approx(1e-3, rel=0.3),
            pytest.approx(p99 / 1e9, rel=0.3),
            pytest.approx(1.0, rel=0.3),
        )
    assert of(*[10**6] * 50, *[10**9] * 50).summary()[0] == pytest.approx(1e-3, rel=0.3)
    assert of(*[10**6] * 50, *[10**9] * 51).summary()[0] == pytest.approx(1.0, rel=0.3)


def test_any_64_bits_are_a_time() -> None:
    found = Durations()
    found.since(time.monotonic_ns() + 10**15)  # it has not begun yet: it took no time
    assert found.summary() == (0.0, 0.0, 0.0)
    found.since(-(2**63))
    longest = found.summary()[2]
    assert longest is not None
    assert longest > 2**63 / 1e9
    for nonsense in (2**63, -(2**63) - 1, 1.5, "1", None):
        with pytest.raises((OverflowError, TypeError)):
            found.since(nonsense)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Durations(1)  # type: ignore[call-arg]


def test_counts_of_several_are_those_of_all() -> None:
    one, other, both = [10**5] * 30 + [10**9], [10**7] * 40, Durations()
    for each in (of(*one), of(*other), Durations()):
        both.add(each.counts())
    longest, *pairs = both.counts()
    assert sum(pairs[1::2]) == len(one) + len(other) and longest >= 10**9
    for got, right in zip(both.summary(), of(*one, *other).summary(), strict=True):
        assert got == pytest.approx(right, rel=0.2)
    assert Durations().counts() == [0]


@pytest.mark.parametrize(
    "nonsense", [None, (1, 2, 3), [-1], [0, 496, 1], [0, 3], [0, 3, -1], [0, 3, 1.0], [0, 3, 2**63, 3, 2**63], [2**64]]
)
def test_counts_that_are_none(nonsense: list[int]) -> None:
    found = Durations()
    with pytest.raises((ValueError, TypeError, OverflowError, IndexError)):
        found.add(nonsense)
    found.summary()
    found.add([])
