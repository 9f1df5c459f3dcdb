"""Telling of everything that happens, for one listener: the observer of the books while there is one.

The records of mirrors are the C core's, which asks once for a mirror and once for its drop.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from realmap._core import Events
from realmap.errors import AccessDenied, InvalidHandle, InvalidSize, LimitReached, PhysicalMemoryExhaustion
from realmap.kernel.books import Books
from realmap.kernel.connection import Connection
from realmap.kernel.processes import UserProcess
from realmap.kernel.running import Running
from realmap.memory.cross_process import CrossProcessMapping
from realmap.memory.frames import SharedFrames
from realmap.memory.mapping import Mapping
from realmap.serving.syscalls import code_of
from realmap.wire import messages
from realmap.wire.records import ALREADY, BLOCKING, DIED, FAILED, LEAST, MOST, OUT, REAPED, SERVICE, Kind

#: So many names of requests are told apart; nobody but a hostile client has more.
NAMES = 1000
#: Characters of each that are told.
LONGEST = 100
#: Records that one answer brings at most: 512 KiB, half of a message; names that are new fit into the other half.
BATCH = 1 << 13
# Plain numbers, where it has to be quick.
CALL, ANSWER, DONE, BEGIN, END, COPY, SERVED = map(
    int, (Kind.CALL, Kind.ANSWER, Kind.DONE, Kind.BEGIN, Kind.END, Kind.COPY, Kind.SERVED)
)


def _nobody(*_: int) -> None:
    """Nobody listens any more."""


class Tracer:
    """What a kernel tells, and to whom. Only on the kernel's thread, but for `began`, `ended` and `copied`."""

    def __init__(self, books: Books) -> None:
        self._books = books
        #: None while nobody listens.
        self.events: Events | None = None
        #: Whoever does, or has not taken the last of it yet; and what it has to take.
        self.listener: Connection | None = None
        self._waiting: Events | None = None
        #: emit(kind, flags, process, *facts). From any thread.
        self._emit: Callable[..., None] = _nobody
        self._names: dict[str, int] = {}
        self._told_names = 0
        #: By the name of a call: the number of the name, and its flags.
        self._known: dict[str, tuple[int, int]] = {}
        #: By number of the process: how many bytes it has mapped; what it had when it ended: (mappings, bytes).
        self._bytes: dict[int, int] = {}
        self._had: dict[int, tuple[int, int]] = {}

    # ---- the listener -----------------------------------------------------------------------

    def start(self, connection: Connection, capacity: int, running: Iterable[Running]) -> dict[str, Any]:
        """Tells this connection from now on; up to `capacity` records wait for it. `running`: calls at work already.

        AccessDenied: it is no control connection. LimitReached: somebody listens already. InvalidSize: the
        capacity is out of bounds. PhysicalMemoryExhaustion: no memory for it.
        """
        if not connection.control:
            raise AccessDenied(why="only a control connection may trace the kernel")
        if self.listener is not None:
            raise LimitReached("traces", 1, why="the kernel is being traced already; one trace at a time: end that one")
        if not LEAST <= capacity <= MOST:
            raise InvalidSize(capacity, why=f"a trace holds {LEAST} to {MOST} events")
        try:
            events = Events(capacity)
        except MemoryError:
            raise PhysicalMemoryExhaustion(why=f"no memory for {capacity} events") from None
        self.events = self._waiting = events
        self.listener, self._emit = connection, events.note
        began = time.monotonic_ns()
        self._tell_what_is_there(running)
        self._books.memory._listen(events)
        self._books.observer = self
        self._books.ports.traced(True)
        return {"began": began, "time": time.time(), "pid": os.getpid()}

    def read(self, connection: Connection) -> list[Any]:
        """The records that wait, oldest first, a batch of them; how many were lost so far; names new since the last.

        After `stop`, an answer without records is the last one. InvalidHandle: this connection does not listen.
        """
        waiting = self._waiting
        if connection is not self.listener or waiting is None:
            raise InvalidHandle(None, why="this connection does not trace the kernel")
        records = waiting.take(BATCH)
        names = list(self._names)[self._told_names :]
        self._told_names = len(self._names)
        if not records and self.events is None:
            self.lose(connection)
        return [records, waiting.lost, names]

    def stop(self, connection: Connection) -> None:
        """Nothing more is told to this connection; it can still take what waits. Where it does not listen: nothing."""
        if connection is not self.listener or self.events is None:
            return
        self._books.observer = None
        self._books.ports.traced(False)
        self._books.memory._listen(None)
        for process in [*self._books.processes, *self._books.inheritance]:
            process.memory.told = None
        self.events, self._emit = None, _nobody

    def lose(self, connection: Connection) -> None:
        """This connection has ended, or has taken all. Where it did not listen: nothing."""
        if connection is not self.listener:
            return
        self.stop(connection)
        self.listener = self._waiting = None
        for kept in (self._names, self._known, self._bytes, self._had):
            kept.clear()
        self._told_names = 0

    def _tell_what_is_there(self, running: Iterable[Running]) -> None:
        for process in self._books.processes:
            self._connected(process, ALREADY)
        for process in self._books.inheritance:
            self._connected(process, ALREADY)
            self._emit(Kind.DEATH, ALREADY | DIED, process.number, process.pid)
            self._had[process.number] = self._has(process)
        for each in running:
            name = self._name(each.name)
            self._emit(Kind.CALL, ALREADY | BLOCKING, each.process.number, name, each.id)
        mirrors = [each for each in self._books.memory.mirrors() if isinstance(each, CrossProcessMapping)]
        for live, mirror in enumerate(mirrors, 1):
            lead = mirror.address - mirror._base
            user = mirror.mapping.address + mirror._start + lead - mirror.mapping.phys_offset
            serial = getattr(mirror.mapping.frames, "serial", 0) if len(mirror.mappings) == 1 else 0
            flags = ALREADY | mirror._prot
            self._emit(Kind.MIRROR, flags, live, mirror.address, len(mirror), user, serial, mirror._start + lead)

    def _name(self, text: str) -> int:
        """The number of a name, as far as it is not absurdly long."""
        text = text[:LONGEST]
        number = self._names.get(text)
        if number is None:
            if len(self._names) >= NAMES:
                text = "…"
            number = self._names.setdefault(text, len(self._names))
        return number

    def _of_call(self, name: str) -> tuple[int, int]:
        known = self._known.get(name)
        if known is None:
            syscall = self._books.syscalls.get(name)
            if syscall is None:  # no end of names may be made up
                return self._name(name), 0
            known = self._known[name] = (self._name(name), BLOCKING if syscall.blocking else 0)
        return known

    # ---- what happens: an `Observer` --------------------------------------------------------

    def connected(self, process: UserProcess) -> None:
        """It was taken in: what it maps is told from now on."""
        self._connected(process, 0)

    def _connected(self, process: UserProcess, flags: int) -> None:
        self._emit(Kind.CONNECT, flags, process.number, process.pid, process.uid)
        self._bytes[process.number] = 0
        for mapping in process.memory:
            self._mapping(process, mapping, True, flags)
        process.memory.told = partial(self._mapping, process)

    def _mapping(self, process: UserProcess, mapping: Mapping, comes: bool, flags: int = 0) -> None:
        number = process.number
        mapped = self._bytes[number] = self._bytes.get(number, 0) + (mapping.length if comes else -mapping.length)
        frames = mapping.frames
        kind = len(process.memory) << 32 | mapping.type << 8 | mapping.rights
        self._emit(
            Kind.MAP if comes else Kind.UNMAP,
            flags if process.alive or comes else REAPED,
            number,
            mapping.address,
            mapping.length,
            frames.serial if isinstance(frames, SharedFrames) else 0,
            mapping.phys_offset,
            kind,
            mapped,
        )

    def _has(self, process: UserProcess) -> tuple[int, int]:
        return len(process.memory), self._bytes.get(process.number, 0)

    def disconnected(self, process: UserProcess, died: bool) -> None:
        self._emit(Kind.DEATH, DIED if died else 0, process.number, process.pid)
        self._had[process.number] = self._has(process)

    def reaped(self, process: UserProcess) -> None:
        """What it had was given back; all of it, but where its forked children may still come for it."""
        had, left = self._had.pop(process.number, (0, 0)), self._has(process)
        if left[0]:
            self._had[process.number] = left
        else:
            self._bytes.pop(process.number, None)
            process.memory.told = None
        self._emit(Kind.REAP, 0, process.number, process.pid, had[0] - left[0], had[1] - left[1])

    def called(
        self, client: object, process: UserProcess | None, request: messages.Request, buffers: Sequence[messages.Place]
    ) -> None:
        if process is None or not isinstance(request, messages.Call):
            if client is not self.listener:
                self._emit(CALL, SERVICE, process.number if process else 0, self._service(request), request.id)
            return
        name, flags = self._of_call(request.name)
        if buffers:
            self._emit(CALL, flags, process.number, name, request.id, len(buffers), *buffers[0])
        else:
            self._emit(CALL, flags, process.number, name, request.id)

    def done(self, client: object, process: UserProcess | None, request: messages.Request) -> None:
        """Of a call this says nothing: from its arrival to its answer, the kernel's thread does nothing else."""
        if client is not self.listener and (process is None or not isinstance(request, messages.Call)):
            self._emit(DONE, 0, process.number if process else 0, self._service(request), request.id)

    def _service(self, request: messages.Request) -> int:
        what = request.what if isinstance(request, messages.Ask) else type(request).__name__.lower()
        return self._name(what)

    def answered(self, client: object, process: UserProcess | None, id: int, message: bytes) -> None:
        """A request was answered; 0 is none that wants an answer."""
        if process is not None:
            if id:
                self._emit(ANSWER, 0, process.number, 0, id, code_of(message), len(message))
        elif client is not self.listener:
            self._emit(ANSWER, 0, 0, 0, id, code_of(message), len(message))

    def began(self, process: UserProcess, name: str, id: int, thread: int) -> None:
        """A blocking handler begins on a thread, or one has lost the loop to this one."""
        loop = threading.get_ident()
        self._emit(BEGIN, 0, process.number, self._of_call(name)[0], id, 0 if loop == thread else loop, 0, 0, thread)

    def ended(self, process: UserProcess, name: str, id: int, answer: bytes) -> None:
        number = self._of_call(name)[0]
        self._emit(END, 0, process.number, number, id, code_of(answer), 0, 0, threading.get_ident())

    def served(
        self, server: UserProcess, caller: int, id: int, name: str, times: tuple[int, int, int], code: int
    ) -> None:
        self._emit(SERVED, 0, caller, self._name(name), id, *times, server.number << 32 | code)

    def copied(self, process: UserProcess, address: int, length: int, began: int, out: bool, failed: bool) -> None:
        flags = (OUT if out else 0) | (FAILED if failed else 0)
        self._emit(COPY, flags, process.number, address, length, began, 0, 0, threading.get_ident())
