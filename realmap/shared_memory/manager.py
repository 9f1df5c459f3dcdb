"""`SharedMemoryManager`: a process that ends the names of what was made by it."""

from __future__ import annotations

from collections.abc import Iterable
from multiprocessing import managers
from typing import Any

from realmap.shared_memory import block, lookup


class SharedMemoryManager(managers.SharedMemoryManager):
    """The standard library's `SharedMemoryManager`, of this module's blocks and lists.

    Their names end with `shutdown`, with the `with` block, or with the process tree. Errors as `SharedMemory`.

    >>> with SharedMemoryManager() as manager:
    ...     items = manager.ShareableList([1, "two"])
    ...     block = manager.SharedMemory(size=100)
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        managers.BaseManager.__init__(self, *args, **options)  # past what starts the tracker

    def SharedMemory(self, size: int) -> block.SharedMemory:
        """A new block of `size` bytes."""
        return self._noted(block.SharedMemory(create=True, size=size))

    def ShareableList(self, sequence: Iterable[Any] | None) -> block.ShareableList:
        """A new list in such a block."""
        made = block.ShareableList(sequence)
        self._noted(made.shm)
        return made

    def _noted(self: Any, made: Any) -> block.SharedMemory:
        try:
            with self._Client(self._address, authkey=self._authkey) as connection:
                managers.dispatch(connection, None, "track_segment", (made.name,))  # type: ignore[attr-defined]
        except BaseException:
            made.close()
            made.unlink()
            raise
        return made  # type: ignore[no-any-return]


class _Names:
    """What the manager's process knows: under the names that the standard library's server uses."""

    def __init__(self) -> None:
        self.segment_names: list[str] = []

    def register_segment(self, name: str) -> None:
        self.segment_names.append(name)

    def destroy_segment(self, name: str) -> None:
        self.segment_names.remove(name)
        lookup.unlink(name)  # or its user has done that already

    def unlink(self) -> None:
        for name in list(self.segment_names):
            self.destroy_segment(name)


class _Server(managers.SharedMemoryServer):
    def __init__(self, *args: Any, **options: Any) -> None:
        managers.Server.__init__(self, *args, **options)
        self.shared_memory_context: Any = _Names()


SharedMemoryManager._Server = _Server  # type: ignore[attr-defined]
