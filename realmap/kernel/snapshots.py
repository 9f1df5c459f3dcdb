"""Answers whoever asks for the books: a picture is taken at once, and written a little at a time, on the loop.

    asked ──▶ Picture (one moment) ──▶ a slice of it, in turn with everybody else, … ──▶ its length, and a descriptor

It is written to memory that has no name, which nobody can change any more once it is sent. Those who ask while one is
being written wait for the next, and share it: there are never more than two in the making, whoever asks how often.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator

from realmap.errors import LimitReached
from realmap.host import files, room
from realmap.host.translate import shortage
from realmap.kernel.connection import Connection
from realmap.kernel.dump import Picture
from realmap.kernel.services import Begun, Reply
from realmap.serving.loop import Loop

#: How long it is written before others have their turn, in nanoseconds.
SLICE = 1_000_000
#: How many of them one connection may wait for: the answer to each has a descriptor.
MOST = 32
#: Nothing of it changes any more, its length neither.
_SEALED = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


class Snapshots:
    """Those that are asked for. Only on the loop."""

    def __init__(self, loop: Loop, take: Callable[[], Picture]) -> None:
        self._loop = loop
        self._take = take
        self._waiting: dict[Connection, list[Reply]] = {}
        #: The one that is being written, and its file; -1: there is none.
        self._steps: Iterator[None] | None = None
        self._file = -1

    def begin(self, connection: Connection) -> Begun:
        """The answer to who asks, when it is there: its length in bytes, with a descriptor of the file.

        LimitReached: it has asked too often. Answered instead: PhysicalMemoryExhaustion, for want of memory or
        descriptors.
        """
        if len(self._waiting.get(connection, ())) >= MOST:
            why = f"this connection waits for {MOST} snapshots already; read their answers first"
            raise LimitReached("snapshots", MOST, why=why)

        def begin(reply: Reply) -> None:
            self._waiting.setdefault(connection, []).append(reply)
            if self._steps is None:
                self._steps = self._write()
                self._step()

        return Begun(begin)

    def _step(self) -> None:
        assert self._steps is not None
        for _ in self._steps:
            self._loop.post(self._step)
            return
        self._steps = self._write() if self._waiting else None
        if self._steps is not None:
            self._loop.post(self._step)

    def _write(self) -> Iterator[None]:
        """Writes one for all who wait now, and answers them. Yields where others may have their turn."""
        askers, self._waiting = self._waiting, {}
        replies = [reply for asked in askers.values() for reply in asked]
        length = 0
        try:
            picture = self._take()
            yield
            self._file = os.memfd_create("realmap-books", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            pause = time.perf_counter_ns() + SLICE
            for part in picture.written():
                room.require(len(part), in_shm=False)
                length += len(part)
                while part:
                    part = part[os.write(self._file, part) :]
                if time.perf_counter_ns() > pause:
                    yield
                    if all(connection.closed for connection in askers):
                        return
                    pause = time.perf_counter_ns() + SLICE
            fcntl.fcntl(self._file, fcntl.F_ADD_SEALS, _SEALED)
            while replies:
                descriptor = os.open(f"/proc/self/fd/{self._file}", os.O_RDONLY | os.O_CLOEXEC)
                replies.pop()((length, [descriptor]))
        except Exception as error:
            told = shortage(error, "the kernel cannot write its books") if isinstance(error, OSError) else error
            while replies:
                replies.pop()(told)
        finally:
            self._end()

    def _end(self) -> None:
        file, self._file = self._file, -1
        if file >= 0:
            files.close(file)

    def after_fork_in_child(self) -> None:
        self._end()
        self._waiting = {}
