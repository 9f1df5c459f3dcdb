"""Steps on bytes, of the books and of their model: calls, mirrors, copies."""

from __future__ import annotations

from typing import Any

import pytest
from books_beside import Beside
from books_nouns import Mirror

from realmap.errors import (
    AccessDenied,
    VirtualMemoryExhaustion,
)
from realmap.rights import k_r, k_rw, k_w, u_rw
from realmap.serving import user_buffer


class AtWork(Beside):
    """What handlers do there."""

    def begin_call(self) -> None:
        if len(self.calls) < 4:
            buffer, parts = self.resolved()
            user_buffer.pin(buffer)
            self.calls.append((buffer, parts))
            self.model.pinned.append(parts)

    def end_call(self) -> None:
        if self.calls:
            index = self.rng.randrange(len(self.calls))
            buffer, _ = self.calls.pop(index)
            user_buffer.end(buffer, pinned=True)
            del self.model.pinned[index]

    def mirror(self) -> None:
        with self.buffer() as (buffer, parts):
            if len(buffer) > 1 << 30:  # far beyond what KernelLand has between its anchors
                return
            rights = self.rng.choice((k_rw, k_rw, k_rw, k_r, k_r, k_w, k_r & 0, u_rw))
            make = self.rng.choice((buffer.mirror, buffer.access))
            self.what = f"a mirror, {rights}, of {buffer!r}"
            wrong = self.model.mirror_error(parts, rights, self.books.memory)
            lazy = self.books.memory._budget > 0
            with self.right(*((wrong, None) if lazy and wrong is VirtualMemoryExhaustion else (wrong,))):
                made: Any = make(rights)
            assert (len(made), made.rights) == (len(buffer), rights)
            span = self.model.span(parts)[0]
            assert made._span == span or (lazy and made._span > span)  # a kept window serves a part of it
            for other in self.model.mirrors:  # a page stays free
                assert other.real._base + other.real._span < made._base or made._base + made._span < other.real._base
            self.model.mirrors.append(Mirror(made, parts, rights))

    def drop(self) -> None:
        if not self.model.mirrors:
            return
        mirror = self.rng.choice(self.model.mirrors)
        if self.rng.random() < 0.2:
            with memoryview(mirror.real), pytest.raises(BufferError):
                mirror.real.drop()
            return
        mirror.real.drop()
        self.model.mirrors.remove(mirror)

    def touch(self) -> None:
        """Reads or writes through a mirror, whatever became of the mapping and its process."""
        if not self.model.mirrors:
            return
        mirror = self.rng.choice(self.model.mirrors)
        slot = self.slot(mirror.parts)
        if slot is None:
            return
        _, frames, offset, at = slot
        if mirror.rights & 1:
            assert mirror.real[at : at + 8] == frames.written.get(offset, bytes(8)), self.what
        if mirror.rights & 2:
            frames.written[offset] = self.rng.randbytes(8)
            mirror.real[at : at + 8] = frames.written[offset]

    def copy(self) -> None:
        with self.buffer() as (buffer, parts):
            slot = self.slot(parts)
            if slot is None:
                return
            place, frames, offset, at = slot
            self.what = f"a copy of {buffer!r}"
            if self.rng.random() < 0.5:
                with self.right(None if place.rights & 1 else AccessDenied):
                    assert buffer.copy_in(8, at) == frames.written.get(offset, bytes(8)), self.what
            else:
                data = self.rng.randbytes(8)
                with self.right(None if place.rights & 2 else AccessDenied):
                    buffer.copy_out(data, at)
                frames.written[offset] = data
