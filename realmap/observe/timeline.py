"""A kernel's records as a timeline.

    the kernel's process   its thread: calls and services, copies inside of them · a track for each worker
                           KernelLand: mirrors, those that live at the same time side by side · how many live
    each user process      its calls, those that are on their way at the same time side by side
                           its memory: what is mapped and unmapped · how many mappings, how many bytes
                           its calls to services, and what it serves others
    flows                  from the caller to where its handler runs, and back

The kernel sees when a call arrives and when it is answered; when its caller sent it, and has read the answer, it does
not: a call on its caller's track goes from the one to the other. A span is written when it ends: one that is open
where the file ends is marked as such by `end`, and missing where the writer was killed. What a service answers the
kernel hears of from the server, when it has: a call on its caller's track begins when its server has taken it up.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from realmap.errors import BY_CODE
from realmap.observe.trace_format import About, TraceWriter
from realmap.observe.words import GONE, program
from realmap.rights import MemoryType, rights_of
from realmap.wire.records import (
    ALREADY,
    BLOCKING,
    DIED,
    FAILED,
    FAULTED,
    OUT,
    REAPED,
    RECORD,
    SERVICE,
    WAS_KEPT,
    Event,
    Kind,
)

#: Tracks of the kernel's process: its thread is 1, workers follow; from here on KernelLand's.
KERNEL_LAND = 1_000_000
#: Tracks of a user process: its memory, and from here on its calls.
MEMORY, CALLS = 1, 2
#: Those that it makes to services, and that it serves.
ASKS, SERVES = 1_000_000, 2_000_000
#: Linux gives no larger pids: a pid that is used again gets a track of its own.
PIDS = 1 << 22


class Lanes:
    """Numbers from 0 on for things that live at the same time: the lowest free one first."""

    def __init__(self, on_first: Callable[[int], None]) -> None:
        """`on_first`: called with each that was never taken before."""
        self._count = 0
        self._free: list[int] = []
        self._on_first = on_first

    def take(self) -> int:
        if self._free:
            return heapq.heappop(self._free)
        self._count += 1
        self._on_first(self._count - 1)
        return self._count - 1

    def give(self, lane: int) -> None:
        heapq.heappush(self._free, lane)


class Rows:
    """Numbers from 0 on for things that are over, none of which lasted into the next of its number."""

    def __init__(self, on_first: Callable[[int], None]) -> None:
        """`on_first`: called with each that was never given before."""
        self._ends: list[int] = []
        self._on_first = on_first

    def give(self, begin: int, end: int) -> int:
        """One that is free from `begin` on, and is not until `end`."""
        for row, until in enumerate(self._ends):
            if until <= begin:
                self._ends[row] = end
                return row
        self._ends.append(end)
        self._on_first(len(self._ends) - 1)
        return len(self._ends) - 1


class Mirror(NamedTuple):
    """A mirror that lives; `process`: the number of the one that it was made for, 0 where that is not known."""

    event: Event
    lane: int
    process: int


class User:
    """A user process; its tracks belong to the process `track` of the file."""

    def __init__(self, track: int, pid: int, file: TraceWriter) -> None:
        self.track = track
        self.pid = pid

        def name(first: int, what: str) -> Callable[[int], None]:
            return lambda lane: file.name_track(track, first + lane, f"{what} {lane + 1}" if lane else what)

        self.lanes = Lanes(name(CALLS, "calls"))
        self.asks, self.serves = Rows(name(ASKS, "calls to services")), Rows(name(SERVES, "serves"))


class Call:
    """A request on its way."""

    __slots__ = ("answer", "arrival", "began", "done", "lane", "thread", "user")

    def __init__(self, arrival: Event, user: User | None) -> None:
        self.arrival = arrival
        self.user = user
        self.lane = user.lanes.take() if user is not None and arrival.b else -1
        #: Where its handler runs, and since when.
        self.thread, self.began = 1, arrival.time
        self.done = False
        self.answer: Event | None = None


class Timeline:
    """Writes records as they come. Times in the file are microseconds since its beginning."""

    def __init__(self, write: Callable[[bytes], object], start: dict[str, Any]) -> None:
        """`start`: what the kernel answered to the one who began to listen."""
        #: Of requests, by number.
        self.names: list[str] = []
        self._kernel: int = start["pid"]
        self._zero: int = start["began"]
        self._last = self._zero
        self._file = TraceWriter(write, self._zero)
        self._land = Lanes(self._name_lane)
        #: By thread: for which process it is at work.
        self._at_work: dict[int, int] = {}
        self._main: int = start["thread"]
        self._threads = {self._main: 1}
        self._users: dict[int, User] = {}
        self._tracks: dict[int, User] = {}
        self._calls: dict[tuple[int, int], Call] = {}
        self._workers: dict[int, Event] = {}
        self._mirrors: dict[int, Mirror] = {}
        self._flows = 0
        #: By kind of event: `_mirror` for MIRROR, and so on.
        self._tell: dict[int, Callable[[Event], None]] = {kind: getattr(self, f"_{kind.name.lower()}") for kind in Kind}
        self._file.name_process(self._kernel, f"kernel {start['path']} (pid {self._kernel})", 0)
        self._file.name_track(self._kernel, 1, "kernel thread")
        about = {"path": start["path"], "time": start["time"]}
        self._file.instant(self._kernel, 1, self._zero, "trace begins", about)

    def feed(self, records: bytes) -> int:
        """Adds records, in the order in which they came; how many there were, without gaps."""
        count = 0
        tell, make = self._tell, Event._make
        for fields in RECORD.iter_unpack(records):
            event = make(fields)
            tell[event.kind](event)
            count += event.kind != 0
            self._last = event.time
        self._file.flush()
        return count

    def end(self, events: int, lost: int, why: str = "") -> None:
        """What is open is marked so, and the file is complete. `why`: what ended it before its time, if anything."""
        self._last = max(self._last, time.monotonic_ns())
        self._close_all("was still open when the trace ended")
        about: About = {"events": events, "lost": lost}
        if why:
            about["error"] = why
        self._file.instant(self._kernel, 1, self._last, "trace ends", about)
        self._file.end(self._kernel, f"{events} events, {lost} lost")

    def _request(self, number: int) -> str:
        return self.names[number] if number < len(self.names) else "?"

    def _who(self, number: int) -> About:
        return {"process": number, "pid": self._user(number).pid}

    # ---- processes --------------------------------------------------------------------------

    def _user(self, number: int, pid: int = 0) -> User:
        """Who has this number; one that nothing was told of (it was lost) gets a track all the same."""
        user = self._users.get(number)
        if user is None:
            track = pid or PIDS - 1
            while track in self._tracks or track == self._kernel:
                track += PIDS
            user = self._users[number] = self._tracks[track] = User(track, pid, self._file)
            known = f"{_command(pid)}pid {pid}" if pid else "pid unknown"
            self._file.name_process(track, f"process {number} ({known})", number)
            self._file.name_track(track, MEMORY, "memory")
        return user

    def _thread(self, thread: int) -> int:
        track = self._threads.get(thread)
        if track is None:
            track = self._threads[thread] = max(self._threads.values()) + 1
            self._file.name_track(self._kernel, track, f"worker {track - 1}")
        return track

    def _connect(self, event: Event) -> None:
        user = self._user(event.process, event.a)
        about: About = {"process": event.process, "pid": event.a, "uid": event.b}
        self._file.instant(user.track, MEMORY, event.time, "connect", about | _marks(event, already=ALREADY))

    def _death(self, event: Event) -> None:
        user = self._user(event.process, event.a)
        name = "death" if event.flags & DIED else "leave"
        about: About = {"process": event.process, "pid": event.a}
        self._file.instant(user.track, MEMORY, event.time, name, about, "p")

    def _reap(self, event: Event) -> None:
        user = self._user(event.process, event.a)
        about: About = {"process": event.process, "pid": event.a, "mappings": event.b, "bytes": event.c}
        self._file.instant(user.track, MEMORY, event.time, "reap", about, "p")

    # ---- requests ---------------------------------------------------------------------------

    def _call(self, event: Event) -> None:
        user = self._user(event.process) if event.process else None
        before = self._calls.get((event.process, event.b))
        if before is not None and before.lane >= 0:
            assert before.user is not None
            before.user.lanes.give(before.lane)
        self._calls[event.process, event.b] = Call(event, user)
        if not event.flags & (BLOCKING | SERVICE):
            self._at_work[self._main] = event.process

    def _answer(self, event: Event) -> None:
        call = self._calls.get((event.process, event.b))
        if call is None:
            return
        call.answer = event
        self._span_of_user(call, event.time)
        if not call.arrival.flags & (SERVICE | BLOCKING):
            self._at_work.pop(self._main, None)
            self._span_of_kernel(call, event.time)
        if call.done or not call.arrival.flags & SERVICE:
            self._finish(call)

    def _done(self, event: Event) -> None:
        call = self._calls.get((event.process, event.b))
        if call is None:
            return
        call.done = True
        self._span_of_kernel(call, event.time)
        if call.answer is not None or not event.b:
            self._finish(call)

    def _finish(self, call: Call) -> None:
        """The call is complete: an arrow goes from its caller to its handler and back."""
        event, user, answer = call.arrival, call.user, call.answer
        self._calls.pop((event.process, event.b), None)
        if user is None or call.lane < 0 or answer is None or not call.began:
            return
        caller = user.track, CALLS + call.lane, event.time
        self._flow(caller, (self._kernel, call.thread, call.began), answer.time)

    def _flow(self, caller: tuple[int, int, int], handler: tuple[int, int, int], end: int) -> None:
        """From the one (process, track, when) to the other, and back at the `end`."""
        self._flows += 1
        self._file.flow("s", *caller, self._flows)
        self._file.flow("t", *handler, self._flows)
        # Within the span: its end is not part of it.
        self._file.flow("f", *caller[:2], max(end - 1, caller[2]), self._flows)

    def _span_of_user(self, call: Call, end: int, **more: object) -> None:
        """Writes it, and frees its place on the caller's track."""
        if call.user is not None and call.lane >= 0:
            self._span(call, call.user.track, CALLS + call.lane, end, more)
            call.user.lanes.give(call.lane)

    def _span_of_kernel(self, call: Call, end: int, **more: object) -> None:
        self._span(call, self._kernel, 1, end, more)

    def _span(self, call: Call, process: int, thread: int, end: int, more: About) -> None:
        event, answer = call.arrival, call.answer
        pid = call.user.pid if call.user is not None else 0
        about: About = {"process": event.process, "pid": pid, "id": event.b}
        if event.c:
            about |= {"buffers": event.c, "address": hex(event.d), "bytes": event.e}
        if answer is not None:
            about |= _error(answer.c) | {"answer_bytes": answer.d}
        kind = "service" if event.flags & SERVICE else "call"
        self._file.span(process, thread, event.time, end, kind, self._request(event.a), about | more)

    def _begin(self, event: Event) -> None:
        call = self._calls.get((event.process, event.b))
        if event.c:
            self._lose(event, call)
        self._workers[event.f] = event
        self._at_work[event.f] = event.process
        if call is not None:
            call.thread, call.began = self._thread(event.f), event.time

    def _lose(self, event: Event, call: Call | None) -> None:
        """A handler has lost the loop to another thread: its own is a worker's from now on."""
        self._at_work.pop(self._main, None)
        self._threads[event.c] = self._threads.pop(self._main)
        self._main = event.c
        if call is not None:
            self._span_of_kernel(call, event.time)
            call.arrival = call.arrival._replace(flags=call.arrival.flags | BLOCKING)

    def _end(self, event: Event) -> None:
        begin = self._workers.pop(event.f, None)
        self._at_work.pop(event.f, None)
        if begin is not None:
            self._span_of_worker(begin, event.time, _error(event.c))

    def _span_of_worker(self, begin: Event, end: int, more: About) -> None:
        about = self._who(begin.process) | {"id": begin.b} | more
        self._file.span(self._kernel, self._thread(begin.f), begin.time, end, "call", self._request(begin.a), about)

    def _served(self, event: Event) -> None:
        user, server = self._user(event.process), self._user(event.f >> 32)
        end = max(event.e, self._zero)
        came, began = (min(max(each, self._zero), end) for each in (event.c, event.d))
        asks, serves = ASKS + user.asks.give(came, end), SERVES + server.serves.give(began, end)
        about: About = {"process": event.process, "pid": user.pid, "id": event.b, "server": server.pid}
        about |= _error(event.f & 0xFFFFFFFF)
        name = self._request(event.a)
        self._file.span(user.track, asks, came, end, "call", name, about)
        self._file.span(server.track, serves, began, end, "call", name, about)
        self._flow((user.track, asks, came), (server.track, serves, began), end)

    def _copy(self, event: Event) -> None:
        about = self._who(event.process) | {"address": hex(event.a), "bytes": event.b} | _marks(event, failed=FAILED)
        name = "copy_out" if event.flags & OUT else "copy_in"
        self._file.span(self._kernel, self._thread(event.f), event.c, event.time, "copy", name, about)

    # ---- memory -----------------------------------------------------------------------------

    def _map(self, event: Event) -> None:
        user, mapped = self._user(event.process), event.kind == Kind.MAP
        about: About = {
            "process": event.process,
            "address": hex(event.a),
            "bytes": event.b,
            "type": MemoryType(event.e >> 8 & 255).name,
            "rights": _rights(event.e & 15),
            "frames": event.c,
            "offset": event.d,
        }
        about |= _marks(event, already=ALREADY) if mapped else _marks(event, reaped=REAPED)
        self._file.instant(user.track, MEMORY, event.time, "map" if mapped else "unmap", about)
        self._file.counter(user.track, event.time, "mappings", event.e >> 32)
        self._file.counter(user.track, event.time, "mapped bytes", event.f)

    _unmap = _map

    def _name_lane(self, lane: int) -> None:
        self._file.name_track(self._kernel, KERNEL_LAND + lane, f"KernelLand {lane + 1}" if lane else "KernelLand")

    def _mirror(self, event: Event) -> None:
        process = 0 if event.flags & ALREADY else self._at_work.get(event.f, 0)
        self._mirrors[event.a] = Mirror(event, self._land.take(), process)
        self._file.counter(self._kernel, event.time, "mirrors", event.process)

    def _drop(self, event: Event) -> None:
        begun = self._mirrors.pop(event.a, None)
        self._file.counter(self._kernel, event.time, "mirrors", event.process)
        if begun is None:
            return
        self._span_of_mirror(begun, event.time, _marks(event, kept=WAS_KEPT, fault=FAULTED))

    def _span_of_mirror(self, begun: Mirror, end: int, more: About) -> None:
        """Writes it, and frees its place on KernelLand's tracks."""
        event, lane, process = begun
        about = self._who(process) if process else {}
        about |= {
            "address": hex(event.a),
            "bytes": event.b,
            "user_address": hex(event.c),
            "frames": event.d,
            "offset": event.e,
            "rights": _rights(event.flags & 3),
        }
        about |= {"window": "kept"} if event.flags & WAS_KEPT else {}
        about |= _marks(event, already=ALREADY) | more
        name = f"mirror of process {process}" if process else "mirror"
        self._file.span(self._kernel, KERNEL_LAND + lane, event.time, end, "mirror", name, about)
        self._land.give(lane)

    def _evict(self, event: Event) -> None:
        about: About = {"address": hex(event.a), "bytes": event.b, "frames": event.d, "offset": event.e}
        self._file.instant(self._kernel, KERNEL_LAND, event.time, "kept window unmapped", about)

    # ---- where the telling stops ------------------------------------------------------------

    def _gap(self, event: Event) -> None:
        """What was open may have ended among what is missing."""
        self._last = event.time
        self._close_all("its end may be among the events that were lost")
        self._file.instant(self._kernel, 1, event.time, "events lost", {"lost": event.a}, "g")

    def _close_all(self, why: str) -> None:
        end = self._last
        for call in self._calls.values():
            if call.answer is None:
                self._span_of_user(call, end, unfinished=why)
            if not call.done and not call.arrival.flags & BLOCKING:
                self._span_of_kernel(call, end, unfinished=why)
        for begin in self._workers.values():
            self._span_of_worker(begin, end, {"unfinished": why})
        for begun in self._mirrors.values():
            self._span_of_mirror(begun, end, {"unfinished": why})
        for open_ones in (self._calls, self._workers, self._mirrors, self._at_work):
            open_ones.clear()


def _marks(event: Event, **flags: int) -> About:
    """Those of its flags that are set, by name."""
    return {name: True for name, bit in flags.items() if event.flags & bit}


@lru_cache
def _rights(bits: int) -> str:
    return str(rights_of(bits))


def _error(code: int) -> About:
    if not code:
        return {}
    kind = BY_CODE.get(code)
    return {"error": kind.__name__ if kind is not None else str(code)}


def _command(pid: int) -> str:
    name = program(pid)
    return f"{name}, " if name != GONE else ""
