"""Small blocks that were attached and closed, kept mapped for their next use.

The workers of a program attach the same few blocks again and again, and each time that is a message each way, a
descriptor and a mapping. So a small block stays mapped when it is closed, and the next who attaches it here has it
without a word to the kernel, as long as

* no name has ended since it was attached: the kernel counts that on its status page (`wire/status.py`);
* the kernel lives, and has nothing to say.

Where either does not hold, none of them is kept any longer. They are mappings like others, in the kernel's books as
well, and go with the connection, before a fork, and when this process ends a name. One whose name another process ends
stays until this one next attaches or closes a block: so they are few, and small.
"""

from __future__ import annotations

import os
import select
import weakref

from realmap.host.signals import pass_on
from realmap.rights import MappingAccessRights, allows, k_w
from realmap.user import names
from realmap.user.buffer import Buffer, UserWindow
from realmap.user.process import Process
from realmap.wire.client import Client
from realmap.wire.status import Names

#: Bytes, in whole pages, that a connection keeps at most, and in how many blocks.
MOST = 1 << 20
COUNT = 16


class Attached(Buffer):
    """A block that was attached by name."""

    __slots__ = ("_edition", "_keeper", "_key")

    _keeper: _Keeper | None
    _key: tuple[str, MappingAccessRights | None]
    #: Of the kernel's names, when it was attached.
    _edition: int

    def close(self) -> None:
        """Keeps it, or unmaps it without waiting for the kernel. Errors as `unmap`."""
        if self._keeper is None or not self._keeper.put(self):
            self._unmap_soon()


class _Keeper:
    """Of a connection. A block is kept by its window: whoever lets go of that has unmapped it."""

    def __init__(self, client: Client) -> None:
        """ValueError, OSError: its kernel has no status page, or not for us."""
        self.names = Names(client.path)
        self._fd = client.endpoint.fileno()
        self._windows: dict[tuple[str, MappingAccessRights | None], tuple[UserWindow, int, int]] = {}
        #: In which edition of the names they were attached.
        self._edition = -1

    def take(self, key: tuple[str, MappingAccessRights | None]) -> tuple[UserWindow, int] | None:
        """The window and the length of a block that is kept, and that its name still stands for."""
        if not self._windows:
            return None
        if self._edition != self.names.edition or not self._is_quiet():
            self.clear()
            return None
        found = self._windows.pop(key, None)
        return found[:2] if found is not None and found[2] == self._edition and found[0].alive else None

    def put(self, block: Attached) -> bool:
        """Keeps a block, if nobody sees it and its name has not ended."""
        window, length = block._window, len(block)
        if window.exports or window.fault is not None or window._span > MOST or block._edition != self.names.edition:
            return False
        if self._edition != block._edition:
            self.clear()
            self._edition = block._edition
        for key in list(self._windows):
            if len(self._windows) < COUNT and window._span + self._size() <= MOST:
                break
            self._windows.pop(key, None)
        block._drop()
        self._windows[block._key] = window, length, block._edition
        return True

    def _size(self) -> int:
        return sum(window._span for window, *_ in list(self._windows.values()))

    def _is_quiet(self) -> bool:
        """Whether the kernel lives, as far as can be seen, and says nothing."""
        poll = select.poll()  # threads cannot share one
        poll.register(self._fd, select.POLLIN)
        return not poll.poll(0)

    def clear(self) -> None:
        """None is kept any longer."""
        self._windows.clear()


_keepers: weakref.WeakKeyDictionary[Client, _Keeper | None] = weakref.WeakKeyDictionary()


def _keeper_of(client: Client) -> _Keeper | None:
    try:
        return _keepers[client]
    except KeyError:
        keeper = None
        try:
            keeper = _Keeper(client)
        except (OSError, ValueError) as error:
            pass_on(error)
        return _keepers.setdefault(client, keeper)


def attach(
    process: Process, name: str, rights: MappingAccessRights | None, *, timeout: float | None = None
) -> Attached:
    """The block of that name: one that is kept, or else as `names.attach`."""
    keeper, key = _keeper_of(process._own_client), (name, rights)
    # First: a name that ends while it is attached counts as ended.
    edition = keeper.names.edition if keeper is not None else 0
    kept = keeper.take(key) if keeper is not None else None
    if kept is None:
        found = names.attach(process, name, rights, timeout=timeout)
        kept = found._window, len(found)
    window, length = kept
    block = Attached._over((window,), window._base, length, int(allows(window.rights, k_w)))
    block.process, block.rights = window.process, window.rights
    block._keeper, block._key, block._edition = keeper, key, edition
    return block


def clear(process: Process) -> None:
    """This process has ended a name."""
    keeper = _keepers.get(process._own_client)
    if keeper is not None:
        keeper.clear()


def _before_fork() -> None:
    for ref in _keepers.keyrefs():
        client = ref()
        keeper = _keepers.get(client) if client is not None else None
        if keeper is not None:
            keeper.clear()


os.register_at_fork(before=_before_fork)
