"""`UserspacePtr`: case 1, a buffer of this very process. Its bytes are reached where they are; nothing is mapped."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable
from typing import Self

from realmap._core import View, Window
from realmap.errors import InvalidAddress, MemoryFault, gone
from realmap.memory.byte_access import ByteAccess
from realmap.memory.cross_process import mirror_prot
from realmap.memory.mapping import Mapping
from realmap.rights import MappingAccessRights, allows, k_r, k_rw, k_w

#: What user processes have mapped in the UserLand of this process, by the address of the first page.
#: Not a WeakValueDictionary: that runs Python code when a window goes, and loses what a signal handler raises there.
_user_windows: dict[int, weakref.ref[Window]] = {}

#: So many may be noted before those that have gone are taken out.
ROOM = 64
_room = ROOM


def register_window(window: Window) -> None:
    """Makes a window of this process's UserLand known, so that a kernel in this process can reach it directly."""
    global _room
    _user_windows[window._base] = weakref.ref(window)
    if len(_user_windows) > _room:
        for base, ref in list(_user_windows.items()):
            if ref() is None and (taken := _user_windows.pop(base, ref)) is not ref:
                _user_windows.setdefault(base, taken)  # another thread's, of this moment
        _room = 2 * len(_user_windows) + ROOM


def user_windows() -> list[Window]:
    """All of them that live. Safe in a signal handler, and while others come and go."""
    return [window for ref in list(_user_windows.values()) if (window := ref()) is not None]


def _window_at(address: int) -> Window | None:
    ref = _user_windows.get(address)
    return ref() if ref is not None else None


def fault_in(mapping: Mapping, offset: int, length: int) -> MemoryFault | None:
    """The fault in a range of a mapping of this very process, in bytes; None: it has none, or is unmapped."""
    window = _window_at(mapping.address)
    at = window.fault if window is not None and window.alive else None
    if at is None or at >= mapping.address + offset + length:
        return None
    return gone(max(at, mapping.address + offset))


class UserspacePtr(View, ByteAccess):
    """`len()` bytes at `address`, in the address space the kernel is using right now.

    It behaves as a mirror does (`memoryview(p)`, `p[3:7]`, `drop()`, a context manager), and while
    a view of it lives the user cannot unmap the buffer (BufferError there). Unlike a mirror it does
    not outlive the user's mapping: once that is unmapped, every use raises BufferError.
    """

    __slots__ = ("__weakref__", "mapping")

    mapping: Mapping

    @property
    def rights(self) -> MappingAccessRights:
        """What may be done through it: k_r or k_rw."""
        return k_rw if self.writable else k_r

    def drop(self) -> None:
        """Ends its use; nothing is unmapped. BufferError: a view of it lives. Again: nothing.

        MemoryFault: bytes of it are gone.
        """
        if self._drop() and self.fault is not None:
            raise self._memory_fault(self.fault)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # An exception on its way out may hold views in its traceback, and matters more than they do.
        with contextlib.suppress(BufferError) if kind is not None else contextlib.nullcontext():
            self.drop()

    def __repr__(self) -> str:
        return f"<UserspacePtr {self.address:#x}, {len(self)} bytes, {self.rights}>"


def point_at(
    mappings: Iterable[Mapping], address: int, length: int, *, rights: MappingAccessRights = k_rw
) -> UserspacePtr:
    """Points at [address, address + length), bytes, which lies in `mappings` side by side.

    InvalidAddress: this process has not (or no longer) mapped it. AccessDenied, InvalidRights: `rights` beyond k_rw, or
    none.
    """
    mirror_prot(rights)
    windows = []
    books = tuple(mappings)
    for mapping in books:
        window = _window_at(mapping.address)
        if window is None or not window.alive or window._span != mapping.length:
            raise InvalidAddress(mapping.address, why="this process has nothing mapped there")
        windows.append(window)
    pointer = UserspacePtr._over(tuple(windows), address, length, int(allows(rights, k_w)))
    pointer.mapping = books[0]
    return pointer
