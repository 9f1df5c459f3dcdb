"""Everything that can go wrong, as one tree.

    KernelError                         code  also
    ├── InvalidAddress                     1  ValueError
    ├── InvalidSize                        2  ValueError
    ├── InvalidMemState                    3
    ├── WrongMappingFramesForType          4
    ├── PhysicalMemoryExhaustion           5  MemoryError
    ├── VirtualMemoryExhaustion            6  MemoryError
    ├── AccessDenied                       7  PermissionError
    │   └── InvalidRights                  8  ValueError
    ├── InvalidHandle                      9
    ├── UnknownSyscall                    10  LookupError
    ├── SyscallFailed                     11
    ├── SyscallTimeout                    12  TimeoutError
    ├── MemoryFault                       13
    ├── ProcessKilled                     14
    ├── KernelDied                        15  ConnectionError
    ├── VersionMismatch                   16
    ├── LimitReached                      17
    ├── WrongArguments                    18  TypeError
    ├── OwnerDied                         19
    └── ServerDied                        20  ConnectionError
    KernelPanic                               RuntimeError; no KernelError: the caller broke a precondition

Each error carries its facts as attributes (what its class annotates, named in ``fields``), and a wire code that
never changes its meaning. Errors pickle, and travel from the kernel to a caller as what they are.
"""

from __future__ import annotations

from typing import Any, ClassVar


def show(name: str, fact: object) -> str:
    """A fact as people read it: addresses in hex, everything else as it prints."""
    return f"{name} {fact:#x}" if name == "address" and isinstance(fact, int) else f"{name} {fact}"


class KernelError(Exception):
    """What every error of realmap derives from. `facts()` are its attributes, by name."""

    code: ClassVar[int] = 0
    fields: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        cls.fields += tuple(cls.__annotations__)

    def __init__(self, *facts: Any, why: str = "") -> None:
        if len(facts) > len(self.fields):
            raise TypeError(f"{type(self).__name__} takes {self.fields} and why=, got {facts!r}")
        for name, fact in zip(self.fields, (*facts, *[None] * (len(self.fields) - len(facts))), strict=True):
            setattr(self, name, fact)
        self.why = why
        # One argument only: with two, OSError (a base of some) takes them for errno and text.
        super().__init__(self._text())

    def _text(self) -> str:
        facts = ", ".join(show(name, getattr(self, name)) for name in self.fields if self._said(name))
        return f"{self.why} ({facts})" if self.why and facts else self.why or facts or type(self).__name__

    def _said(self, name: str) -> bool:
        return getattr(self, name) is not None

    def facts(self) -> dict[str, Any]:
        """The facts of the error by name, in the order of its constructor."""
        return {name: getattr(self, name) for name in self.fields}

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else type(self).__name__

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), tuple(self.facts().values()), self.why)


def _rebuild(kind: type[KernelError], facts: tuple[Any, ...], why: str) -> KernelError:
    return kind(*facts, why=why)


class InvalidAddress(KernelError, ValueError):
    """`address` (bytes) is unaligned, taken, outside of its land, or nothing is mapped there."""

    code = 1
    address: int


class InvalidSize(KernelError, ValueError):
    """`size` (bytes) is zero, negative, unaligned, overflows, or runs past the end of something."""

    code = 2
    size: int


class InvalidMemState(KernelError):
    """The memory at `address` is of a `type` (a `MemoryType`) that does not allow what was asked."""

    code = 3
    address: int
    type: Any


class WrongMappingFramesForType(KernelError):
    """A mapping of this `type` takes other frames: Shared where the type is counted, Owned or none elsewhere."""

    code = 4
    type: Any
    frames: str


class PhysicalMemoryExhaustion(KernelError, MemoryError):
    """No frames: /dev/shm is full, a limit is reached, or no descriptor is left. `size` is what was asked, in bytes."""

    code = 5
    size: int


class VirtualMemoryExhaustion(KernelError, MemoryError):
    """No addresses: the land has no hole of `size` bytes, or the machine's limit of mappings is reached."""

    code = 6
    size: int


class AccessDenied(KernelError, PermissionError):
    """What was asked goes beyond what the caller may do.

    `asked` beside `allowed` (rights), where it is about rights.
    """

    code = 7
    asked: Any
    allowed: Any
    address: int | None


class InvalidRights(AccessDenied, ValueError):
    """A rights value that is no combination of READABLE 1, WRITABLE 2, EXECUTABLE 4, USER_ACCESSIBLE 8."""

    code = 8


class InvalidHandle(KernelError):
    """A handle, a name or a path (`handle`) that stands for nothing that can be used here."""

    code = 9
    handle: Any

    def _said(self, name: str) -> bool:
        return self.handle is not None and str(self.handle) not in self.why


class UnknownSyscall(KernelError, LookupError):
    """The kernel has no syscall of this `name`."""

    code = 10
    name: str


class SyscallFailed(KernelError):
    """The handler of `name` raised, in process `pid`: `type` and `text` of its exception, and the `traceback` there."""

    code = 11
    name: str
    type: str
    text: str
    traceback: str
    pid: int | None

    def _text(self) -> str:
        head = f"syscall {self.name!r} failed: {self.type}: {self.text}"
        return f"{head}\n\nIn process {self.pid}:\n{self.traceback}" if self.traceback else head


class SyscallTimeout(KernelError, TimeoutError):
    """No answer to the syscall `name` within `timeout` seconds. Its handler may still be at work."""

    code = 12
    name: str
    timeout: float

    def _said(self, name: str) -> bool:
        return not self.why


class MemoryFault(KernelError):
    """The bytes at `address` are gone: somebody truncated the segment under them, or there was no room in /dev/shm
    when a page that had not been committed was touched. What was read there since were zeros.
    """

    code = 13
    address: int


def gone(address: int) -> MemoryFault:
    """The fault for bytes whose segment cannot be looked at any more."""
    return MemoryFault(
        address, why="its segment was truncated, or /dev/shm had no room for a page at first touch; unmap it"
    )


def read_only(memory: object) -> AccessDenied:
    """For who writes where only reading is allowed."""
    return AccessDenied(why=f"{memory!r} is read-only")


def other_length(size: int, takes: int) -> InvalidSize:
    """For who assigns `size` bytes to a slice of another length."""
    return InvalidSize(size, why=f"a slice of {takes} bytes takes {takes} bytes: memory does not move")


def frames_gone() -> InvalidHandle:
    """For who would hold frames after their end."""
    return InvalidHandle(None, why="these frames are gone: their last reference was released")


class ProcessKilled(KernelError):
    """The user process `pid` is no longer one of the kernel's: it was closed, killed, or sent away."""

    code = 14
    pid: int

    def _said(self, name: str) -> bool:
        return False


class KernelDied(KernelError, ConnectionError):
    """No kernel answers at `path`: it was killed or shut down, or none was ever started there."""

    code = 15
    path: str

    def _said(self, name: str) -> bool:
        return self.path is not None and self.path not in self.why


class VersionMismatch(KernelError):
    """The two sides speak different versions of the protocol: `ours` and `theirs`."""

    code = 16
    ours: str
    theirs: str


class LimitReached(KernelError):
    """The kernel allows no more `what` at a time than `limit`; end some first."""

    code = 17
    what: str
    limit: int


class WrongArguments(KernelError, TypeError):
    """The syscall `name` does not take these arguments: their number, a name, or a type. Its handler was not called."""

    code = 18
    name: str

    def _said(self, name: str) -> bool:
        return not self.why


class OwnerDied(KernelError):
    """Who held the lock at `address` has died. You hold it now: mend what it guards, then say `recovered()`."""

    code = 19
    address: int


class ServerDied(KernelError, ConnectionError):
    """Process `pid` served `name`, and has ended, or serves no more, without an answer. Call again: others may serve.

    `began`: whether its handler may have begun; False: nothing was done.
    """

    code = 20
    name: str
    pid: int
    began: bool
    #: Whether this process itself has seen that end; else it was told of one further on.
    _here = False

    def _said(self, name: str) -> bool:
        return name == "name" if self.why else super()._said(name)


def owner_died(address: int) -> OwnerDied:
    """For who takes a lock after its holder's death."""
    return OwnerDied(address, why="who held this lock has died; it is yours now: mend what it guards, then recovered()")


def too_long(size: int, most: int) -> InvalidSize:
    """For who puts more into a queue than its slots hold."""
    return InvalidSize(size, why=f"a message of this queue has {most} bytes at most")


def unmapped(address: int) -> InvalidAddress:
    """Of a buffer that is used after its end."""
    return InvalidAddress(address, why="the buffer is unmapped")


def not_here(address: int, why: str) -> InvalidMemState:
    """For who would synchronize by bytes that are no such thing, or not any more."""
    return InvalidMemState(address, why=why)


class KernelPanic(RuntimeError):
    """The caller broke a precondition: a bug in the calling code, not a condition to handle."""


def _tree(kind: type[KernelError]) -> list[type[KernelError]]:
    return [kind, *(found for child in kind.__subclasses__() for found in _tree(child))]


#: Every error by its wire code.
BY_CODE: dict[int, type[KernelError]] = {kind.code: kind for kind in _tree(KernelError)}
