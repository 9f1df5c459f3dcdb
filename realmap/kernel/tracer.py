"""Telling of everything that happens, for one listener; and at no cost while there is none.

Where nobody listens, nothing asks whether somebody does: while somebody does, a `TracedDispatch` stands in for the
kernel's `Dispatch`, and its buffers are `TracedBuffer`s. Only what is rare asks (a mapping, a death), and the C
core, once for a mirror and once for its drop.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, SupportsIndex

import msgspec

from realmap._core import Events
from realmap.errors import AccessDenied, InvalidHandle, InvalidSize, LimitReached, PhysicalMemoryExhaustion
from realmap.host import liveness
from realmap.kernel import syscalls
from realmap.kernel.connection import Connection
from realmap.kernel.dispatch import Dispatch
from realmap.kernel.events import ALREADY, BLOCKING, DIED, FAILED, LEAST, MOST, OUT, REAPED, SERVICE, Kind
from realmap.kernel.processes import UserProcess
from realmap.kernel.syscalls import Call, Syscall
from realmap.kernel.user_buffer import UserBuffer
from realmap.memory.cross_process import CrossProcessMapping
from realmap.memory.frames import SharedFrames
from realmap.memory.mapping import Mapping
from realmap.wire import messages

if TYPE_CHECKING:
    from realmap.kernel.kernel import Kernel

#: So many names of requests are told apart; nobody but a hostile client has more.
NAMES = 1000
#: Characters of each that are told.
LONGEST = 100
#: Records that one answer brings at most: 1 MiB.
BATCH = 1 << 14
# Plain numbers, where it has to be quick.
CALL, ANSWER, DONE, BEGIN, END, COPY = map(int, (Kind.CALL, Kind.ANSWER, Kind.DONE, Kind.BEGIN, Kind.END, Kind.COPY))


def _nobody(*_: int) -> None:
    """Nobody listens any more."""


class Tracer:
    """What a kernel tells, and to whom. Only on the kernel's thread, but for `note`."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        #: None while nobody listens.
        self.events: Events | None = None
        #: Whoever does, or has not taken the last of it yet; and what it has to take.
        self.listener: Connection | None = None
        self._waiting: Events | None = None
        #: note(kind, flags, process, *facts). From any thread.
        self.note: Callable[..., None] = _nobody
        self._names: dict[str, int] = {}
        self._told_names = 0
        #: By number of the process: how many bytes it has mapped; what it had when it ended: (mappings, bytes).
        self._bytes: dict[int, int] = {}
        self._had: dict[int, tuple[int, int]] = {}

    # ---- the listener -----------------------------------------------------------------------

    def start(self, connection: Connection, capacity: int) -> dict[str, Any]:
        """Tells this connection from now on; up to `capacity` records wait for it.

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
        kernel = self._kernel
        self.events = self._waiting = events
        self.listener, self.note = connection, events.note
        began = time.monotonic_ns()
        self._tell_what_is_there()
        kernel.memory._listen(events)
        kernel.clients.make_buffer = self._make_buffer
        kernel.dispatch = TracedDispatch(kernel, kernel.dispatch, events)
        return {
            "began": began,
            "time": time.time(),
            "pid": os.getpid(),
            "path": kernel.path,
            "thread": kernel.serving,
        }

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
        kernel = self._kernel
        if isinstance(kernel.dispatch, TracedDispatch):
            kernel.dispatch = kernel.dispatch.instead_of
        kernel.clients.make_buffer = UserBuffer
        kernel.memory._listen(None)
        for process in [*kernel.processes, *kernel.estates.processes()]:
            process.memory.told = None
        self.events, self.note = None, _nobody

    def lose(self, connection: Connection) -> None:
        """This connection has ended, or has taken all. Where it did not listen: nothing."""
        if connection is not self.listener:
            return
        self.stop(connection)
        self.listener = self._waiting = None
        for kept in (self._names, self._bytes, self._had):
            kept.clear()
        self._told_names = 0

    def _tell_what_is_there(self) -> None:
        kernel = self._kernel
        for process in kernel.processes:
            self.connected(process, ALREADY)
        for process in kernel.estates.processes():
            self.connected(process, ALREADY)
            self.note(Kind.DEATH, ALREADY | DIED, process.number, process.pid)
            self._had[process.number] = self._has(process)
        for running in kernel.dispatch.running:
            name = self.name(running.name)
            self.note(Kind.CALL, ALREADY | BLOCKING, running.process.number, name, running.id)
        mirrors = [each for each in kernel.memory.mirrors() if isinstance(each, CrossProcessMapping)]
        for live, mirror in enumerate(mirrors, 1):
            lead = mirror.address - mirror._base
            user = mirror.mapping.address + mirror._start + lead - mirror.mapping.phys_offset
            serial = getattr(mirror.mapping.frames, "serial", 0) if len(mirror.mappings) == 1 else 0
            flags = ALREADY | mirror._prot
            self.note(Kind.MIRROR, flags, live, mirror.address, len(mirror), user, serial, mirror._start + lead)

    # ---- what happens -----------------------------------------------------------------------

    def name(self, text: str) -> int:
        """The number of a name, as far as it is not absurdly long."""
        text = text[:LONGEST]
        number = self._names.get(text)
        if number is None:
            if len(self._names) >= NAMES:
                text = "…"
            number = self._names.setdefault(text, len(self._names))
        return number

    def connected(self, process: UserProcess, flags: int = 0) -> None:
        """It was taken in: what it maps is told from now on."""
        self.note(Kind.CONNECT, flags, process.number, process.pid, process.uid)
        self._bytes[process.number] = 0
        for mapping in process.memory:
            self._mapping(process, mapping, True, flags)
        process.memory.told = partial(self._mapping, process)

    def _mapping(self, process: UserProcess, mapping: Mapping, comes: bool, flags: int = 0) -> None:
        number = process.number
        mapped = self._bytes[number] = self._bytes.get(number, 0) + (mapping.length if comes else -mapping.length)
        frames = mapping.frames
        kind = len(process.memory) << 32 | mapping.type << 8 | mapping.rights
        self.note(
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

    def ended(self, process: UserProcess) -> None:
        """Its connection has ended; what it has is given back after this."""
        died = liveness.is_ending(process.pidfd, process.pid)
        self.note(Kind.DEATH, DIED if died else 0, process.number, process.pid)
        self._had[process.number] = self._has(process)

    def reaped(self, process: UserProcess) -> None:
        """What it had was given back; all of it, but where its forked children may still come for it."""
        had, left = self._had.pop(process.number, (0, 0)), self._has(process)
        if left[0]:
            self._had[process.number] = left
        else:
            self._bytes.pop(process.number, None)
            process.memory.told = None
        self.note(Kind.REAP, 0, process.number, process.pid, had[0] - left[0], had[1] - left[1])

    def _make_buffer(self, address: int, length: int) -> UserBuffer:
        buffer = TracedBuffer(address, length)
        buffer.tracing = self
        return buffer


class TracedDispatch(Dispatch):
    """Stands in for a kernel's `Dispatch` while somebody listens."""

    def __init__(self, kernel: Kernel, instead_of: Dispatch, events: Events) -> None:
        super().__init__(kernel, instead_of.running)
        self.instead_of = instead_of
        self._tracing = kernel.tracing
        self._note = events.note
        #: By the name of a call: the number of the name, and its flags.
        self._known: dict[str, tuple[int, int]] = {}

    def handle(self, connection: Connection, request: messages.Request, buffers: Sequence[UserBuffer]) -> None:
        """As `Dispatch`, and tells of it."""
        process = connection.process
        if process is not None and request.__class__ is messages.Call:
            assert isinstance(request, messages.Call)
            name, flags = self._known.get(request.name) or self._learn(request.name)
            if buffers:
                first = buffers[0]
                self._note(CALL, flags, process.number, name, request.id, len(buffers), first.address, len(first))
            else:
                self._note(CALL, flags, process.number, name, request.id)
            Dispatch.handle(self, connection, request, buffers)
        elif connection is self._tracing.listener:
            Dispatch.handle(self, connection, request, buffers)
        else:
            number = process.number if process is not None else 0
            what = request.what if isinstance(request, messages.Ask) else type(request).__name__.lower()
            name = self._tracing.name(what)
            self._note(CALL, SERVICE, number, name, request.id)
            Dispatch.handle(self, connection, request, buffers)
            self._note(DONE, 0, number, name, request.id)

    def _learn(self, name: str) -> tuple[int, int]:
        syscall = self._kernel.syscalls.get(name)
        if syscall is None:  # no end of names may be made up
            return self._tracing.name(name), 0
        known = self._known[name] = (self._tracing.name(name), BLOCKING if syscall.blocking else 0)
        return known

    def send(self, connection: Connection, id: int, message: bytes, descriptors: Sequence[int] = ()) -> None:
        """As `Dispatch`, and tells of it."""
        Dispatch.send(self, connection, id, message, descriptors)
        process = connection.process
        if process is not None:
            if id:
                self._note(ANSWER, 0, process.number, 0, id, _error(message), len(message))
        elif connection is not self._tracing.listener:
            self._note(ANSWER, 0, 0, 0, id, _error(message), len(message))

    def _run(self, syscall: Syscall, call: Call, id: int, args: list[Any], buffers: Sequence[UserBuffer]) -> bytes:
        if not syscall.blocking:  # from its arrival to its answer, the kernel's thread does nothing else
            return syscalls.run(syscall, call, id, args, buffers)
        number, thread = call.process.number, threading.get_ident()
        name, _ = self._known.get(syscall.name) or self._learn(syscall.name)
        self._note(BEGIN, 0, number, name, id, 0, 0, 0, thread)
        answer = syscalls.run(syscall, call, id, args, buffers)
        self._note(END, 0, number, name, id, _error(answer), 0, 0, thread)
        return answer


_failed = msgspec.msgpack.Decoder(messages.Failed)


def _error(answer: bytes) -> int:
    """The code of the error that an answer is; 0: it is none."""
    return 0 if answer[1] == messages.DONE else _failed.decode(answer).error.code


class TracedBuffer(UserBuffer):
    """A `UserBuffer` that tells of its copies."""

    __slots__ = ("tracing",)

    tracing: Tracer

    def copy_in(self, length: SupportsIndex | None = None, offset: SupportsIndex = 0) -> bytes:
        """As `UserBuffer`, and tells of it."""
        began, flags, copied = time.monotonic_ns(), FAILED, 0
        try:
            data = super().copy_in(length, offset)
            flags, copied = 0, len(data)
            return data
        finally:
            self._tell(began, flags, offset, copied)

    def copy_out(self, data: bytes | bytearray | memoryview, offset: SupportsIndex = 0) -> None:
        """As `UserBuffer`, and tells of it."""
        began, flags, copied = time.monotonic_ns(), OUT | FAILED, 0
        try:
            super().copy_out(data, offset)
            flags, copied = OUT, memoryview(data).nbytes
        finally:
            self._tell(began, flags, offset, copied)

    def _tell(self, began: int, flags: int, offset: SupportsIndex, copied: int) -> None:
        if not self.has_ended:
            at = self.address if flags & FAILED else self.address + offset.__index__()
            self.tracing.note(COPY, flags, self.process.number, at, copied, began, 0, 0, threading.get_ident())
