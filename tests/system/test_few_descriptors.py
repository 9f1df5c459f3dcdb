"""What is done for the first time with few descriptors left says so, and goes well once there are enough."""

from __future__ import annotations

import json
import subprocess
import sys

from conftest import BOUND, SUPPORT

from realmap import KernelHandle

#: What may be told. By whom it serves, or is the kernel of: that one had no descriptor for the connection.
SHORT = {"PhysicalMemoryExhaustion", "LimitReached", "ServerDied", "KernelDied"}


def test_each_first_time_with_few_descriptors(kernel: KernelHandle) -> None:
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "few_descriptors.py"), kernel.path],
        capture_output=True,
        text=True,
        timeout=4 * BOUND,
    )
    found = json.loads(done.stdout)
    assert len(found) == 7
    for act, outcomes in found.items():
        assert outcomes[-1] == "ok", (act, outcomes)
        assert outcomes[0] == "PhysicalMemoryExhaustion", (act, outcomes)
        assert set(outcomes[:-1]) <= SHORT, (act, outcomes)
