"""What users do to each other: they serve, and call who serves; they show a buffer, and mirror what others show."""

from __future__ import annotations

import hashlib

from realmap.errors import AccessDenied, InvalidAddress, InvalidHandle, ProcessKilled, UnknownSyscall
from realmap.host.stranger import may_open_map_files
from realmap.kernel import Call, UserBuffer, syscall
from realmap.lab.stress.board import Board
from realmap.lab.workload import FLIPPED, Seeded, pattern
from realmap.memory.foreign import ForeignProcess
from realmap.pages import PAGE_SIZE
from realmap.user import Buffer, Process
from realmap.user.service import Service

#: What a user shows has so many bytes at most.
LONGEST = 1 << 17


@syscall
def stress_flip(call: Call, data: UserBuffer) -> bytes:
    """Turns round every bit; the digest of what was. If it dies midway, each byte is as before, or as it will be."""
    with data.mirror() as mirror:
        before = bytes(mirror)
        mirror[:] = before.translate(FLIPPED)
        return hashlib.sha256(before).digest()


class Skipped(Exception):
    """Linux does not allow it: what is missing."""


class Neighbours:
    """What user `index` does with the others."""

    def __init__(self, me: Process, board: Board, index: int) -> None:
        self._me = me
        self._board = board
        self._index = index
        self._service: Service | None = None
        self._shown: Buffer | None = None

    def serve(self, seed: int) -> None:
        """Ends its service, or begins one in a quarter of the cases: a few of the users serve at a time."""
        if self._service is not None:
            self.close()
        elif not seed % 4:
            self._begin(seed // 4)

    def _begin(self, seed: int) -> None:
        self._service = self._me.serve(stress_flip, threads=1 + seed % 2, lazy_unmap=seed % 3 << 18)

    def flip(self, buffer: Buffer, offset: int, length: int) -> bytes:
        """Has a part flipped by whoever serves; what is answered, and then all of the buffer."""
        part = buffer.slice(offset, length)
        try:
            answer: bytes = self._me.call("stress_flip", part)
        except UnknownSyscall:  # nobody serves: so this one does
            if self._service is not None:
                raise
            self._begin(length)
            answer = self._me.call("stress_flip", part)
        return answer + buffer[:]

    def show(self, seed: int) -> None:
        """Shows another buffer from now on, which it leaves as it is."""
        self._board.show(self._index, 0, 0, 0)
        if self._shown is not None:
            self._shown.unmap()
            self._shown = None
        length = 1 + seed % LONGEST
        shown = self._me.map(length, fragment=None if seed % 3 else -(-length // 3 // PAGE_SIZE) * PAGE_SIZE)
        shown[:] = pattern(seed, length)
        self._shown = shown
        self._board.show(self._index, shown.address, length, seed)

    def look(self, seed: int) -> tuple[bytes, bytes]:
        """Mirrors a part of what a user shows: what was seen, and what is right. Of its own where that one ends or
        shows nothing any more. Skipped: no way in is allowed.
        """
        draw = Seeded(seed)
        for user in (draw.below(1 << 16), self._index):
            shown = self._board.shown(user)
            if shown is None:
                continue
            offset = draw.below(shown.length)
            length = 1 + draw.below(shown.length - offset)
            try:
                with ForeignProcess(shown.pid) as process, process.mirror(shown.address + offset, length) as mirror:
                    seen = bytes(mirror)
            except (ProcessKilled, InvalidHandle):
                continue
            except (InvalidAddress, AccessDenied) as error:
                if self._board.shown(user) != shown:
                    continue
                if isinstance(error, InvalidAddress) or may_open_map_files():
                    raise
                raise Skipped(error.why) from None
            if self._board.shown(user) == shown:
                return seen, pattern(shown.seed, shown.length)[offset : offset + length]
        return b"", b""

    def close(self) -> None:
        if self._service is not None:
            self._service.close()
            self._service = None
