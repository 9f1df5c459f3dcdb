"""Memory taken away under live mirrors, many times (tools/faults). What each case promises: unit/core/test_guard.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BOUND, scaled

FAULTS = Path(__file__).with_name("faults.py")


def _faults(count: int, *kinds: str) -> None:
    arguments = [sys.executable, str(FAULTS), *kinds, "--count", str(count), "--seed", "1"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=20 * BOUND)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok: the kernel lives" in done.stdout


def test_taken_away_some_times() -> None:
    _faults(50, "truncate", "regrow", "punch")


@pytest.mark.slow
def test_taken_away_thousands_of_times() -> None:
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        _faults(scaled(10_000), "truncate", "regrow", "punch")
        pytest.skip("a full /dev/shm needs a mount namespace of its own (unshare)")
    _faults(scaled(10_000))
