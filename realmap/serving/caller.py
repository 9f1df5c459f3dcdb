"""Who a handler works for, and what it sees of the process that it runs in: as far as running one needs it."""

from __future__ import annotations

from typing import Any, Protocol

from realmap.memory.frames import FrameAllocator
from realmap.memory.kernel_memory import KernelMemory


class Caller(Protocol):
    """A user process: `Call.process`. `number` is its name in the books, `pid` and `uid` what Linux says of it."""

    number: int
    pid: int
    uid: int
    alive: bool

    @property
    def memory(self) -> Any:
        """Where its buffers are found: a `ProcessMemory` in the kernel, what it has granted in a service."""

    @property
    def is_here(self) -> bool:
        """Whether it is this very process: case 1, its buffers are mapped in this address space."""

    @property
    def facts(self) -> dict[str, int]:
        """What a record of `logging` about it carries."""


class RunningKernel(Protocol):
    """What a handler sees of the `Kernel` that runs it."""

    path: str
    memory: KernelMemory
    frames: FrameAllocator
    handles: Any

    def process(self, pid: int) -> Any:
        """A connected process, with the face of `ForeignProcess`. InvalidHandle: it is not connected."""

    def processes(self) -> list[Any]:
        """All of them, in the order in which they connected."""

    @property
    def ending(self) -> bool:
        """Whether it ends, or has."""

    def stop(self, *, wait: bool = True, timeout: float = 10.0) -> None:
        """Ends it. From any thread."""


class Copies(Protocol):
    """Is told of the copies that handlers make (`kernel/observer.py` is told of the rest)."""

    def copied(self, process: Any, address: int, length: int, began: int, out: bool, failed: bool) -> None:
        """A handler's copy of so many bytes has ended, which `began` then (monotonic, ns). On the handler's thread."""
