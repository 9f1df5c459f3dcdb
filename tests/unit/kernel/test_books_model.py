"""The books against a plain model of them, step by step: each answer, error and count; and at the end, nothing."""

from __future__ import annotations

import gc
import random
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from books_driver import Driver
from conftest import scaled
from hypothesis import given, settings
from hypothesis import strategies as st

from realmap.kernel import services

FULL = 1_000_000
#: Steps with the same books.
TURN = 4_000


def run(rng: random.Random, steps: int, short: bool = True) -> Driver:
    gc.collect()  # an example that Hypothesis gave up half way
    driver = Driver(rng)
    with patch.object(services, "time", SimpleNamespace(monotonic=lambda: driver.model.now)):
        driver.steps(steps, short)
    return driver


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 60))
def test_few_steps(rng: random.Random, steps: int) -> None:
    run(rng, steps, short=False)  # what is left of descriptors is not this test's alone


def many(count: int) -> None:
    """Seed by seed: the one that fails is told, and says the same again."""
    errors = 0
    for seed in range(-(-count // TURN)):
        try:
            errors += run(random.Random(seed), min(TURN, count)).errors
        except Exception as error:
            error.add_note(f"run(random.Random({seed}), {min(TURN, count)})")
            raise
    print(f"{count} steps, {errors} of them errors, all as they ought to be")
    assert errors


def test_many_steps() -> None:
    many(TURN)


@pytest.mark.slow
def test_many_steps_full_count() -> None:
    many(scaled(FULL))
