"""`Attached`: what a process has attached, so that what is parked of it is attached again without a message."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from realmap._core import ATTACHED
from realmap.rights import MappingAccessRights, rights_of
from realmap.user.buffer import Buffer, UserWindow, part_of
from realmap.user.windows import describe, map_window
from realmap.wire import messages

if TYPE_CHECKING:
    from realmap.user.process import Process

#: Of how many attached parts of memory it is known what they are.
KNOWN = 64


class Attached:
    """By token, offset, length and rights. From any thread: each change is one step of a dict."""

    def __init__(self) -> None:
        #: (kind, span, where its first byte is, length, rights, bytes in huge pages)
        self._known: dict[tuple[Any, ...], tuple[int, int, int, int, MappingAccessRights, int]] = {}
        self._kinds = itertools.count(0, 2 * ATTACHED)

    def __len__(self) -> int:
        return len(self._known)

    def attach(
        self,
        process: Process,
        token: str,
        offset: int = 0,
        length: int | None = None,
        rights: MappingAccessRights | None = None,
        timeout: float | None = None,
    ) -> Buffer:
        """Errors as `Process.attach`; SyscallTimeout."""
        allowed = None if rights is None else int(rights_of(rights))
        key = token, offset, length, allowed
        if (found := self._again(process, key)) is not None:
            return found
        client = process._own_client
        request = messages.Attach(client.next_id(), token, offset, length, allowed)
        value, answer = client.request(request, timeout=timeout, name="attach", late=process._unmap_late)
        *_, lead, size, given, pieces, again = value
        window = map_window(process, value[:5], lambda index: tuple(pieces[index]), answer, rights_of(given))
        if again:
            window.recycles = self._note(key, window, lead, size)
        return part_of(window, window._base + lead, size)

    def _again(self, process: Process, key: tuple[Any, ...]) -> Buffer | None:
        """What was so attached, and unmapped, if the kernel has not said that it is to be asked again."""
        known = self._known.get(key)
        if known is None:
            return None
        kind, span, lead, size, rights, huge = known
        window = process._own_client.endpoint.unpark(UserWindow, kind, span)
        if window is None:
            return None
        describe(window, process, rights, huge, kind)
        return part_of(window, window._base + lead, size)

    def _note(self, key: tuple[Any, ...], window: UserWindow, lead: int, size: int) -> int:
        """What it is parked as when it is unmapped: its kind."""
        known = self._known.get(key)
        found = window._span, lead, size, window.rights, window.huge
        if known is None or known[1:] != found:  # another block may have that name by now
            if known is None and len(self._known) >= KNOWN:
                self._known.pop(next(iter(self._known)), None)
            known = self._known[key] = next(self._kinds) | ATTACHED, *found
        return known[0]
