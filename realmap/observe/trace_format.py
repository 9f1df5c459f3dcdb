"""Chrome's trace event format, which Perfetto and chrome://tracing read: the array form, whose end may be missing.

One event a line. A track is (process, thread): both are numbers that name it, whatever they mean to Linux.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache


class TraceWriter:
    """Writes events; `zero` is the moment (ns, monotonic) that the file's times, in microseconds, count from.

    `about` is the inside of a JSON object: what is shown of an event that is clicked at. Names come as JSON where
    they are anybody's, and as plain words where they are ours.
    """

    def __init__(self, write: Callable[[str], object], zero: int) -> None:
        self._write = write
        self._zero = zero
        self._lines: list[str] = []
        # What happens at one moment is told in several lines: its text is made once.
        self._at = lru_cache(32)(self._moment)
        write("[\n")

    def flush(self) -> None:
        """Hands on what has been gathered."""
        if self._lines:
            self._lines.append("")
            self._write(",\n".join(self._lines))
            self._lines.clear()

    def end(self, process: int, labels: str) -> None:
        """The last event, with words for one process; and the end of the file."""
        self._lines.append(
            f'{{"ph":"M","pid":{process},"tid":0,"name":"process_labels","args":{{"labels":{json.dumps(labels)}}}}}'
        )
        self._write(",\n".join(self._lines) + "\n]\n")
        self._lines.clear()

    def _moment(self, moment: int) -> str:
        return f"{(moment - self._zero) / 1000:.3f}" if moment > self._zero else "0.000"

    def span(self, process: int, thread: int, begin: int, end: int, kind: str, name: str, about: str) -> None:
        """Something that lasted from `begin` to `end`; `name` is JSON."""
        begin = max(begin, self._zero)
        self._lines.append(
            f'{{"ph":"X","pid":{process},"tid":{thread},"ts":{self._at(begin)},"dur":{(end - begin) / 1000:.3f},'
            f'"cat":"{kind}","name":{name},"args":{{{about}}}}}'
        )

    def instant(self, process: int, thread: int, moment: int, name: str, about: str, scope: str = "t") -> None:
        """Something that happened; of its thread, its process ("p"), or everything ("g")."""
        self._lines.append(
            f'{{"ph":"i","pid":{process},"tid":{thread},"ts":{self._at(moment)},"s":"{scope}","cat":"{name}",'
            f'"name":"{name}","args":{{{about}}}}}'
        )

    def counter(self, process: int, moment: int, name: str, value: int) -> None:
        """From now on so many."""
        self._lines.append(
            f'{{"ph":"C","pid":{process},"tid":0,"ts":{self._at(moment)},"name":"{name}","args":{{"{name}":{value}}}}}'
        )

    def flow(self, phase: str, process: int, thread: int, moment: int, number: int) -> None:
        """An arrow begins ("s"), goes through ("t"), or ends ("f") in the span that is there at that moment."""
        bound = ',"bp":"e"' if phase == "f" else ""
        self._lines.append(
            f'{{"ph":"{phase}","pid":{process},"tid":{thread},"ts":{self._at(moment)},"id":{number},'
            f'"cat":"flow","name":"call"{bound}}}'
        )

    def name_process(self, process: int, name: str, order: int) -> None:
        """What a process is called, and where it stands among the others."""
        self._meta(process, 0, "process_name", f'"name":{json.dumps(name)}')
        self._meta(process, 0, "process_sort_index", f'"sort_index":{order}')

    def name_track(self, process: int, thread: int, name: str) -> None:
        """What a track is called; they stand in the order of their numbers."""
        self._meta(process, thread, "thread_name", f'"name":"{name}"')
        self._meta(process, thread, "thread_sort_index", f'"sort_index":{thread}')

    def _meta(self, process: int, thread: int, what: str, value: str) -> None:
        self._lines.append(f'{{"ph":"M","pid":{process},"tid":{thread},"name":"{what}","args":{{{value}}}}}')
