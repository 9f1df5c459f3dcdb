"""Parts of the C core in plain C programs, under the sanitizers (tools/races)."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
from conftest import BOUND, ROOT, scaled

TOOL = ROOT / "tools" / "races"
DRIVERS = {
    "ring_threads": 1_000_000,
    "post_threads": 100_000,
    "sleep_threads": 400_000,
    "guard_threads": 200_000,
    "table_model": 20_000_000,
}


def _drive(driver: str, count: int) -> None:
    if "LD_PRELOAD" in os.environ:
        pytest.skip("something else is preloaded: a sanitizer")
    if shutil.which(os.environ.get("CC", "gcc")) is None:
        pytest.skip("needs a C compiler with sanitizers")
    done = subprocess.run(
        [str(TOOL), driver, str(count)],
        capture_output=True, text=True, timeout=20 * BOUND,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.partition(": ")[0] for line in done.stdout.splitlines()] == [
        f"{driver} under {sanitizers}" for sanitizers in ("thread", "address,undefined")
    ]


@pytest.mark.parametrize("driver", DRIVERS)
def test_for_a_moment(driver: str) -> None:
    _drive(driver, DRIVERS[driver] // 200)


@pytest.mark.slow
@pytest.mark.parametrize("driver", DRIVERS)
def test_for_long(driver: str) -> None:
    _drive(driver, scaled(DRIVERS[driver]))
