"""A strict reader of Chrome's trace event format, as realmap writes it: every rule that a viewer relies on."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

KEYS = {
    "M": {"ph", "pid", "tid", "name", "args"},
    "X": {"ph", "pid", "tid", "ts", "dur", "cat", "name", "args"},
    "i": {"ph", "pid", "tid", "ts", "s", "cat", "name", "args"},
    "C": {"ph", "pid", "tid", "ts", "name", "args"},
    "s": {"ph", "pid", "tid", "ts", "id", "cat", "name"},
    "t": {"ph", "pid", "tid", "ts", "id", "cat", "name"},
    "f": {"ph", "pid", "tid", "ts", "id", "cat", "name", "bp"},
}
NAMES = {"process_name": str, "thread_name": str, "process_labels": str}


class TraceFile:
    """The events of a file, checked. Times in ns: `begin`, and `end` of spans."""

    def __init__(self, path: Path, *, cut: bool = False) -> None:
        """`cut`: its writer was killed; then the end is missing, and the last line may be."""
        text = path.read_text()
        if cut:
            assert not text.endswith("]\n")
            text = text[: text.rindex("\n")].rstrip(",\n") + "\n]\n"
        assert text.startswith("[\n")
        assert text.endswith("]\n")
        self.events: list[dict[str, Any]] = json.loads(text)
        for event in self.events:
            if "ts" in event:
                event["begin"] = round(event["ts"] * 1000)
                event["end"] = event["begin"] + round(event.get("dur", 0) * 1000)
        self.lines = text.splitlines()
        self.check()

    def check(self) -> None:
        """AssertionError: a rule is broken."""
        assert len(self.lines) == len(self.events) + 2  # one event a line
        for event in self.events:
            found = set(event) - {"begin", "end"}
            assert found == KEYS[event["ph"]], event
            assert all(type(event[key]) is int for key in ("pid", "tid")), event
            assert event.get("ts", 0) >= 0, event
            assert event.get("dur", 0) >= 0, event
            assert isinstance(event["name"], str), event
            assert event["name"], event
            if event["ph"] == "i":
                assert event["s"] in ("t", "p", "g"), event
            elif event["ph"] == "C":
                assert list(event["args"]) == [event["name"]], event
                assert event["args"][event["name"]] >= 0, event
        self._check_names()
        self._check_spans()
        self._check_flows()

    def _check_names(self) -> None:
        names: dict[tuple[int, int, str], Any] = {}
        for event in self.of("M"):
            key = (event["pid"], event["tid"], event["name"])
            assert key not in names, f"named twice: {event}"
            (names[key],) = event["args"].values()
            assert type(names[key]) is NAMES.get(event["name"], int), event
        for event in self.events:
            assert (event["pid"], 0, "process_name") in names, event
            if event["ph"] in "Xistf":
                assert (event["pid"], event["tid"], "thread_name") in names, event

    def _check_spans(self) -> None:
        """On each track they nest: none ends in the middle of another."""
        for spans in self.by_track("X").values():
            open_until: list[int] = []
            for span in sorted(spans, key=lambda span: (span["begin"], -span["end"])):
                while open_until and open_until[-1] <= span["begin"]:
                    open_until.pop()
                assert not open_until or span["end"] <= open_until[-1], span
                open_until.append(span["end"])

    def _check_flows(self) -> None:
        """Each begins, goes through the kernel, and ends, in this order, and each time inside of a span."""
        spans = self.by_track("X")
        flows = defaultdict(list)
        for event in self.of("s", "t", "f"):
            flows[event["id"]].append(event)
            track = (event["pid"], event["tid"])
            assert any(span["begin"] <= event["begin"] < span["end"] for span in spans[track]), event
        for flow in flows.values():
            assert [event["ph"] for event in flow] == ["s", "t", "f"], flow
            begin, through, end = (event["begin"] for event in flow)
            assert begin <= through <= end, flow
            assert (flow[0]["pid"], flow[0]["tid"]) == (flow[2]["pid"], flow[2]["tid"])

    def of(self, *phases: str) -> list[dict[str, Any]]:
        """The events of these phases."""
        return [event for event in self.events if event["ph"] in phases]

    def by_track(self, *phases: str) -> dict[tuple[int, int], list[dict[str, Any]]]:
        """The same, by track."""
        found = defaultdict(list)
        for event in self.of(*phases):
            found[event["pid"], event["tid"]].append(event)
        return found

    def named(self, name: str, phase: str = "i", **facts: Any) -> list[dict[str, Any]]:
        """The events of this name whose `args` have these facts, in order of time."""
        found = [event for event in self.of(phase) if event["name"] == name]
        found = [event for event in found if all(event["args"].get(key) == value for key, value in facts.items())]
        return sorted(found, key=lambda event: event["begin"])

    def mirrors(self) -> list[dict[str, Any]]:
        """The mirrors, in order of time."""
        return sorted((span for span in self.of("X") if span["cat"] == "mirror"), key=lambda span: span["begin"])

    def calls(self, pid: int) -> list[dict[str, Any]]:
        """The calls and services on the tracks of a process, in order of time."""
        found = [span for span in self.of("X") if span["pid"] == pid and span["cat"] in ("call", "service")]
        return sorted(found, key=lambda span: span["begin"])

    def counted(self, name: str, pid: int) -> list[int]:
        """The values of a counter, in order of time."""
        found = sorted((event for event in self.of("C") if event["pid"] == pid), key=lambda event: event["begin"])
        return [event["args"][name] for event in found if event["name"] == name]

    @property
    def totals(self) -> dict[str, Any]:
        """What the last event says: events, lost, and the error that ended it, if one did."""
        (end,) = self.named("trace ends")
        found: dict[str, Any] = end["args"]
        return found
