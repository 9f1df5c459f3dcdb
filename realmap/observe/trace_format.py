"""Chrome's trace event format, which Perfetto and chrome://tracing read: the array form, whose end may be missing.

One event a line. A track is (process, thread): both are numbers that name it, whatever they mean to Linux.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

_encode = msgspec.json.Encoder().encode
#: What is shown of an event that is clicked at.
About = dict[str, object]


class TraceWriter:
    """Writes events; `zero` is the moment (ns, monotonic) that the file's times, in microseconds, count from."""

    def __init__(self, write: Callable[[bytes], object], zero: int) -> None:
        self._write = write
        self._zero = zero
        self._lines: list[bytes] = []
        write(b"[\n")

    def flush(self) -> None:
        """Hands on what has been gathered."""
        if self._lines:
            self._lines.append(b"")
            self._write(b",\n".join(self._lines))
            self._lines.clear()

    def end(self, process: int, labels: str) -> None:
        """The last event, with words for one process; and the end of the file."""
        self._name(process, 0, "process_labels", "labels", labels)
        self._write(b",\n".join(self._lines) + b"\n]\n")
        self._lines.clear()

    def _at(self, moment: int) -> float:
        return max(0, moment - self._zero) / 1000

    def _add(self, phase: str, process: int, thread: int, name: str, **more: object) -> None:
        self._lines.append(_encode({"ph": phase, "pid": process, "tid": thread, "name": name, **more}))

    def span(self, process: int, thread: int, begin: int, end: int, kind: str, name: str, about: About) -> None:
        """Something that lasted from `begin` to `end`."""
        begin = max(begin, self._zero)
        self._add("X", process, thread, name, cat=kind, ts=self._at(begin), dur=(end - begin) / 1000, args=about)

    def instant(self, process: int, thread: int, moment: int, name: str, about: About, scope: str = "t") -> None:
        """Something that happened; of its thread, its process ("p"), or everything ("g")."""
        self._add("i", process, thread, name, cat=name, ts=self._at(moment), s=scope, args=about)

    def counter(self, process: int, moment: int, name: str, value: int) -> None:
        """From now on so many."""
        self._add("C", process, 0, name, ts=self._at(moment), args={name: value})

    def flow(self, phase: str, process: int, thread: int, moment: int, number: int) -> None:
        """An arrow begins ("s"), goes through ("t"), or ends ("f") in the span that is there at that moment."""
        bound = {"bp": "e"} if phase == "f" else {}
        self._add(phase, process, thread, "call", cat="flow", ts=self._at(moment), id=number, **bound)

    def name_process(self, process: int, name: str, order: int) -> None:
        """What a process is called, and where it stands among the others."""
        self._name(process, 0, "process_name", "name", name)
        self._name(process, 0, "process_sort_index", "sort_index", order)

    def name_track(self, process: int, thread: int, name: str) -> None:
        """What a track is called; they stand in the order of their numbers."""
        self._name(process, thread, "thread_name", "name", name)
        self._name(process, thread, "thread_sort_index", "sort_index", thread)

    def _name(self, process: int, thread: int, what: str, key: str, value: object) -> None:
        self._add("M", process, thread, what, args={key: value})
