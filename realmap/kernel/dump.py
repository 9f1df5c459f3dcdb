"""The books as plain data: a few totals (`stats`), and everything (`Picture`).

A picture is of one moment, and nobody is served in that: it takes references to what does not change, and copies of
what does. To write it takes longer, and can wait. What there may be thousands of is told in rows, the fields of the
structures of wire/records.py in their order; words are left to the reader (observe/snapshot.py).
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator
from itertools import chain, islice
from operator import attrgetter
from typing import Any, NamedTuple

from realmap._core import holders_of
from realmap.kernel.books import Books
from realmap.kernel.handles import FOR_EVER, Shared
from realmap.kernel.limits import segments_of
from realmap.kernel.ports import Grant, Ports, Seat
from realmap.kernel.processes import UserProcess
from realmap.kernel.running import Running
from realmap.memory.cross_process import CrossProcessMapping
from realmap.memory.frames import SharedFrames
from realmap.memory.kernel_memory import KeptWindow
from realmap.memory.mapping import Mapping
from realmap.serving.syscalls import encode
from realmap.serving.user_buffer import parts_of
from realmap.wire.records import FORM

Row = tuple[Any, ...]
#: What is counted of peers, and told in `stats`.
_COUNTED = "connections", "half_sent", "unread", "undecoded", "orphans", "seats", "sessions", "grants"
#: How many rows are written at a time: about 0.2 ms.
BATCH = 128


class Around(NamedTuple):
    """What is told along with the books, and is not in them."""

    path: str
    #: Whether the process is the kernel's: its main thread serves.
    alone: bool
    #: Connections that ask and look, without being a process: a descriptor each.
    controls: int
    threads: int
    #: Calls of blocking handlers that have not ended, and of others that lost the loop.
    running: Collection[Running]
    given_up: int
    #: (device, inode) of what waits in a socket, on its way to a process.
    outbox: list[tuple[int, int]]


def stats(books: Books, around: Around) -> dict[str, int]:
    """Totals. What there is: processes, mappings, live mirrors, segments and their bytes, descriptors, threads.

    `stock`: segments besides, with their `stock_bytes`, of small mappings that were unmapped and may be mapped again.

    `given_up`: handlers at work that nobody waits for, or that lost the loop (`GivenUp`).

    `lent`: windows of lent pages, as their servers said last; `grants`: mappings that servers may map.

    What was done so far, by the kernel's own handlers (what services did is told by syscall): calls (how many of them
    failed, and how many were `late`, having lost the loop), mirrors made and copies, each with bytes.
    """
    memory, syscalls = books.memory, books.syscalls.values()
    peers, lent = books.peers.totals(), [window for seat in books.ports for window in seat.served.lent]
    kept = memory.kept_counts()
    mappings = sum(len(process.memory) for process in books.processes)  # first: it finds what of a stock is used again
    stocks = [process.memory.stock for process in books.processes]
    stock, stock_bytes = sum(each.segments for each in stocks), sum(each.bytes for each in stocks)
    return {
        "processes": len(books.processes),
        "handles": len(books.handles),
        "inheritances": len(books.inheritance),
        "mappings": mappings,
        "mirrors": memory.live,
        "kept_windows": kept.windows,
        "kept_bytes": kept.bytes,
        "kept_hits": kept.hits,
        "kept_misses": kept.misses,
        "kept_evictions": kept.evictions,
        "segments": books.frames.segments - stock,
        "bytes": books.frames.used - stock_bytes,
        "stock": stock,
        "stock_bytes": stock_bytes,
        "calls": sum(syscall.calls for syscall in syscalls),
        "failed": sum(syscall.failed for syscall in syscalls),
        "late": sum(syscall.late for syscall in syscalls),
        "running": sum(process.calls for process in books.processes),
        "given_up": around.given_up,
        "taking": sum(process.coming > 0 for process in books.processes),
        "mirrored": memory._made,
        "mirrored_bytes": memory._made_bytes,
        "copied_in": memory.copies_in,
        "copied_in_bytes": memory.bytes_in,
        "copied_out": memory.copies_out,
        "copied_out_bytes": memory.bytes_out,
        "controls": around.controls,
        "descriptors": _descriptors(),
        "threads": around.threads,
        **{name: peers[name] for name in _COUNTED},
        "lent": len(lent),
        "lent_bytes": sum(length for _, _, length, _, _ in lent),
    }


def limits(books: Books) -> dict[str, float | None]:
    """What is allowed, as `Limits` and `boot` name it; bytes and numbers, None for no limit."""
    found = books.limits
    return {
        **{name: getattr(found, name) for name in found.__slots__},
        "segments": segments_of(found),
        "memory_limit": books.frames.limit,
        "process_limit": books.process_limit,
        "kernel_land": books.memory.length,
        "lazy_unmap": books.memory._budget,
    }


def _descriptors() -> int:
    """How many descriptors this process has open; -1 where not even one is left to look."""
    try:
        # Since Linux 6.2 that is its size; before, it is 0, and they are counted.
        return os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd"))
    except OSError:
        return -1


#: What changes of a handle; and of a mirror, or a parked window, all that is told: they may be gone by then.
_OF_HANDLE = attrgetter("maker", "keep", "uses", "until")
_OF_PARKED = attrgetter("address", "end", "inode", "offset", "frames")
_OF_SEGMENT = attrgetter("inode", "device", "length", "huge", "name")
_OF_MIRROR = attrgetter("address", "_base", "_span", "_zeros", "_prot", "_start", "mappings")
_FRAMES = attrgetter("frames")


class Picture:
    """The books at one moment: every process, mapping, segment (with its holders), mirror and handle. Bytes."""

    def __init__(self, books: Books, around: Around) -> None:
        """Takes it: about 0.3 ms for a thousand mappings of frames of their own."""
        self._now = time.monotonic()
        self._processes = [
            (list(process.memory), _process_facts(process), list(map(_OF_PARKED, process.memory.stock.windows())))
            for process in books.processes
        ]
        mirrors = [mirror for mirror in books.memory.mirrors() if isinstance(mirror, CrossProcessMapping)]
        self._mirrors = list(zip(map(_OF_MIRROR, mirrors), map(len, mirrors), strict=True))
        self._handles = list(books.handles)
        self._of_handles = list(map(_OF_HANDLE, self._handles))
        # Unmapped by its process while a call works on it: in no process's memory any more, but it holds on.
        pinned = dict.fromkeys(
            mapping
            for running in around.running
            for buffer in running.buffers
            for mapping, _, _ in parts_of(buffer)
            if mapping.released
        )
        loose = [*pinned, *books.inheritance.mappings()]
        mapped = chain(
            chain.from_iterable(mappings for mappings, _, _ in self._processes),
            loose,
            chain.from_iterable(mappings for (*_, mappings), _ in self._mirrors),
        )
        found = dict.fromkeys(map(_FRAMES, chain(mapped, self._handles)))
        found.update(dict.fromkeys(frames for *_, parked in self._processes for *_, frames in parked))
        self._frames = [frames for frames in found if type(frames) is SharedFrames]
        self._holders = holders_of(self._frames)
        self._kept = books.memory.kept_windows()
        self._rows = {"running": [self._running_row(each) for each in around.running]} | _rows_of_seats(books.ports)
        self._rows["running"] += self._served_rows(books.ports)
        sessions = [session for seat in books.ports for session in seat.sessions.values()]
        self._grants = [grant for session in sessions for grant in session.grants.values()]
        self._plain = {
            "form": FORM,
            "pid": os.getpid(),
            "path": around.path,
            "alone": around.alone,
            "time": time.time(),
            "kernel_land": [books.memory.start, books.memory.length],
            "anchors": books.memory._anchors(),
            "limits": limits(books),
            "stats": stats(books, around),
            "calls": [
                (each.name, each.blocking, each.calls, each.failed, *each.durations.summary())
                for each in books.syscalls.values()
            ]
            + [
                (name, False, each.calls, each.failed, *each.durations.summary(), each.servers)
                for name, each in books.ports.totals().items()
                if name not in books.syscalls  # of a name that the kernel has taken over
            ],
            "pinned": [mapping.frames.serial for mapping in loose if isinstance(mapping.frames, SharedFrames)],
            "outbox": around.outbox,
        }

    def written(self) -> Iterator[bytes]:
        """It in MessagePack, a little at a time: one map."""
        serials = {frames.serial for frames in self._frames}
        kept = [window for window in self._kept if window.serial in serials]
        yield b"\xde" + (len(self._plain) + len(self._rows) + 6).to_bytes(2, "big")
        for name, value in self._plain.items():
            yield encode(name) + encode(value)
        for name, rows in self._rows.items():
            yield encode(name)
            yield from _list(len(rows), iter(rows))
        yield encode("processes") + _list_of(len(self._processes))
        for mappings, facts, parked in self._processes:
            yield _row_with(2, facts)
            yield from _list(len(mappings), map(_mapping_row, mappings))
            yield from _list(len(parked), map(_parked_row, parked))
        yield encode("handles")
        yield from _list(len(self._handles), map(self._handle_row, self._handles, self._of_handles))
        yield encode("grants")
        yield from _list(len(self._grants), map(_grant_row, self._grants))
        yield encode("mirrors")
        yield from _list(len(self._mirrors), map(_mirror_row, self._mirrors))
        yield encode("kept")
        yield from _list(len(kept), map(_kept_row, kept))
        yield encode("frames") + _list_of(len(self._frames))
        yield from self._frames_rows()

    def _frames_rows(self) -> Iterator[bytes]:
        holders = iter(self._holders)
        rows: list[Row] = []
        for frames in self._frames:
            count = next(holders)
            who = islice(holders, count)
            segments = frames.segments
            facts = map(_OF_SEGMENT, segments)
            if count + len(segments) <= BATCH:
                rows.append((frames.serial, frames.length, count, list(who), list(facts)))
            else:  # long by itself
                yield _row_with(2, (frames.serial, frames.length, count))
                yield from _list(count, who)
                yield from _list(len(segments), facts)
            if len(rows) == BATCH:
                yield _side_by_side(rows)
                rows.clear()
        yield _side_by_side(rows)

    def _running_row(self, each: Running) -> Row:
        return each.process.number, each.name, None if each.began is None else self._now - each.began, each.given_up

    def _served_rows(self, ports: Ports) -> list[Row]:
        """Calls of services, as their servers said last."""
        return [
            (session.process.number, name, began and max(0.0, self._now - began), False, seat.process.number)
            for seat in ports
            for session, name, began in seat.running()
        ]

    def _handle_row(self, shared: Shared, changing: Row) -> Row:
        maker, keep, uses, until = changing
        return (
            shared.label,
            shared.frames.serial,
            shared.start,
            shared.length,
            int(shared.rights),
            None if maker is None else maker.number,
            min(keep, FOR_EVER),
            uses,
            None if until is None else until - self._now,
            shared.uid,
        )


def _rows_of_seats(ports: Ports) -> dict[str, list[Row]]:
    seats = list(ports)
    sessions = [session for seat in seats for session in seat.sessions.values()]
    return {
        "seats": [_seat_row(seat) for seat in seats],
        "sessions": [(session.number, session.seat.number, session.process.number) for session in sessions],
        "lent": [row for seat in seats for row in _lent_rows(seat)],
    }


def _seat_row(seat: Seat) -> Row:
    begins = [began for _, _, began in seat.running()]
    waiting = begins.count(None)
    at_work = len(begins) - waiting
    return seat.number, seat.process.number, seat.names, seat.threads, seat.queue, seat.closing, at_work, waiting


def _grant_row(grant: Grant) -> Row:
    mapping = grant.mapping
    place = mapping.phys_offset, mapping.address, mapping.length, int(mapping.rights)
    return grant.session.number, grant.frames.serial, *place


def _lent_rows(seat: Seat) -> list[Row]:
    told = seat.served
    lent = [(seat.number, number or None, address, *rest) for number, address, *rest in told.lent]
    return lent + [(seat.number, None, 0, length, at, 0, True) for at, length in told.kept]


def _process_facts(process: UserProcess) -> Row:
    frames, stock = process.memory.allocator, process.memory.stock
    return process.number, process.pid, process.uid, process.calls, frames.used - stock.bytes, frames.limit


def _mapping_row(mapping: Mapping) -> Row:
    frames = mapping.frames
    serial = frames.serial if type(frames) is SharedFrames else None
    return mapping.address, mapping.length, mapping.type, mapping.rights, mapping.phys_offset, serial


def _parked_row(told: Row) -> Row:
    address, end, inode, offset, frames = told
    return address, end - address, inode, offset, None if frames is None else frames.serial


def _mirror_row(told: tuple[Row, int]) -> Row:
    """A mirror with the parts of frames that its pages show, in order."""
    (address, base, span, zeros, prot, start, mappings), length = told
    # A kept window may be larger than what was asked for: what counts is what its pages show.
    left, offset, parts = span, start - mappings[0].phys_offset, []
    for mapping in mappings:
        size = left if len(mappings) == 1 else min(left, mapping.length - offset)
        parts.append((mapping.frames.serial, mapping.phys_offset + offset, size))
        left, offset = left - size, 0
    return address, length, base, span, zeros, prot, parts


def _kept_row(window: KeptWindow) -> Row:
    return window.base, window.span, window.prot, (window.serial, window.start, window.span)


# ---- MessagePack, a little at a time ------------------------------------------------------------


def _list_of(count: int) -> bytes:
    """The beginning of a list of so many."""
    return b"\xdd" + count.to_bytes(4, "big")


def _list(count: int, rows: Iterator[Row]) -> Iterator[bytes]:
    yield _list_of(count)
    while batch := list(islice(rows, BATCH)):
        yield _side_by_side(batch)


def _side_by_side(rows: list[Row]) -> bytes:
    """The rows alone, without the beginning of their list."""
    return encode(rows)[1 if len(rows) < 16 else 3 :]


def _row_with(more: int, facts: Row) -> bytes:
    """The beginning of a row: these facts, and so many more to come."""
    return bytes([0x90 + len(facts) + more]) + _side_by_side(list(facts))
