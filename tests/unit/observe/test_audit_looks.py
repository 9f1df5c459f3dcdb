"""An audit of a kernel at work looks again before a difference counts."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest

from realmap import Kernel, Process
from realmap.observe.audit import AuditReport, Difference, audit, compare
from realmap.observe.control import Control

DIFFERENCES = [Difference("UserLand of pid 7", 0x2000_0000_0000, "it is mapped", "otherwise")]


@pytest.mark.parametrize("seconds", [0.0, 0.2, 600.0])
def test_who_is_stopped_for_a_moment_has_time_to_map(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    end = time.monotonic() + seconds

    def compare(_: object) -> AuditReport:
        return AuditReport(DIFFERENCES if time.monotonic() < end else [], 1, 1, 0, 1, [], [])

    monkeypatch.setattr(sys.modules[audit.__module__], "compare", compare)
    snapshot: Any = None
    found = audit(lambda: snapshot)
    assert found.differences == (DIFFERENCES if seconds > 60 else [])


def test_who_is_on_its_way_through_exit_has_no_memory_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be there for long: where it closes large files, or gets no CPU."""
    with Kernel() as kernel, Process(kernel.path) as me, Control(kernel.path) as control, me.map(1):
        monkeypatch.setattr("realmap.host.procfs.maps", lambda *_: [])
        assert len(compare(control.snapshot()).differences) == 1
        monkeypatch.setattr("realmap.host.procfs.is_dying", lambda _: True)
        assert compare(control.snapshot())
