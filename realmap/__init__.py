"""realmap: cross-process mapping with real parts.

A kernel process mirror-maps the buffers of user processes into its own address space, works on the
bytes in place, and unmaps them. Frames are POSIX shared-memory segments under a refcount.

    import hashlib, realmap

    @realmap.syscall
    def sha256(call, data):
        with data.mirror(realmap.k_r) as mirror:
            return hashlib.sha256(mirror).hexdigest()

    with realmap.boot(syscalls=[sha256]) as kernel, kernel.connect() as me:
        buffer = me.map(1 << 20)
        buffer[100:105] = b"hello"
        print(me.call("sha256", buffer.slice(100, 5)))

boot, Kernel                        starts a kernel in a process of its own; one in this process
KernelHandle, SpawnedProcess        that kernel, and the user processes that it was asked to spawn
connect, aconnect, Process          this process as a user of a kernel
Service, Session                    handlers that a user serves; one of the processes that serve a name
Buffer, Handle, MemoryInfo          its memory, what shares it with others, what the kernel has noted of it
syscall, Call, UserBuffer           handlers: what makes a function one, who calls, a buffer argument
ForeignProcess, ForeignMapping      any process, of no kernel: what it shares is mirrored, the rest copied; a map of it
CrossProcessMapping, UserspacePtr   a mirror; a buffer that is in this very process
Limits                              what a kernel lets each process have
MemoryType, MappingAccessRights     and k_r, k_rw, u_rw, … its shorthands
KernelError, KernelPanic            every error; realmap.errors draws the tree
realmap.memory                      the pieces by themselves
realmap.shared_memory               in place of multiprocessing.shared_memory
realmap.sync                        locks, events, queues, … in the bytes of a Buffer

All else is how it is built, and may change. What is large is imported when it is first asked for: whoever changes its
root or its user, or takes its last descriptor, after `import realmap` names what it needs before (`realmap.connect`).
"""

import importlib
import os
from _thread import RLock
from typing import TYPE_CHECKING

from realmap import _core

if getattr(_core, "__file__", None) is None:  # the folder of its C sources: a checkout that was not built
    _checkout = __path__[0].rpartition("/")[0]
    raise ImportError(
        f"realmap is not built in {_checkout}: install it for this Python (python -m pip install -e {_checkout}), "
        f"or run {_checkout}/tools/setup and use {_checkout}/.venv/bin/python",
        name="realmap._core",
    )

from realmap.errors import (
    AccessDenied,
    InvalidAddress,
    InvalidHandle,
    InvalidMemState,
    InvalidRights,
    InvalidSize,
    KernelDied,
    KernelError,
    KernelPanic,
    LimitReached,
    MemoryFault,
    OwnerDied,
    PhysicalMemoryExhaustion,
    ProcessKilled,
    ServerDied,
    SyscallFailed,
    SyscallTimeout,
    UnknownSyscall,
    VersionMismatch,
    VirtualMemoryExhaustion,
    WrongArguments,
    WrongMappingFramesForType,
)
from realmap.pages import PAGE_SIZE
from realmap.rights import MappingAccessRights, MemoryType, k_r, k_rw, k_rx, k_w, u_r, u_rw, u_rx, u_w

if TYPE_CHECKING:
    from realmap import memory
    from realmap.ambient import aconnect, connect
    from realmap.kernel import Call, Kernel, Limits, UserBuffer, syscall
    from realmap.memory import CrossProcessMapping, ForeignMapping, ForeignProcess, UserspacePtr
    from realmap.system import KernelHandle, boot
    from realmap.user import Buffer, Handle, Process, Session
    from realmap.user.service import Service
    from realmap.user.spawned import SpawnedProcess
    from realmap.wire.messages import MemoryInfo, __version__

__all__ = [
    "PAGE_SIZE",
    "AccessDenied",
    "Buffer",
    "Call",
    "CrossProcessMapping",
    "ForeignMapping",
    "ForeignProcess",
    "Handle",
    "InvalidAddress",
    "InvalidHandle",
    "InvalidMemState",
    "InvalidRights",
    "InvalidSize",
    "Kernel",
    "KernelDied",
    "KernelError",
    "KernelHandle",
    "KernelPanic",
    "LimitReached",
    "Limits",
    "MappingAccessRights",
    "MemoryFault",
    "MemoryInfo",
    "MemoryType",
    "OwnerDied",
    "PhysicalMemoryExhaustion",
    "Process",
    "ProcessKilled",
    "ServerDied",
    "Service",
    "Session",
    "SpawnedProcess",
    "SyscallFailed",
    "SyscallTimeout",
    "UnknownSyscall",
    "UserBuffer",
    "UserspacePtr",
    "VersionMismatch",
    "VirtualMemoryExhaustion",
    "WrongArguments",
    "WrongMappingFramesForType",
    "__version__",
    "aconnect",
    "boot",
    "connect",
    "k_r",
    "k_rw",
    "k_rx",
    "k_w",
    "memory",
    "syscall",
    "u_r",
    "u_rw",
    "u_rx",
    "u_w",
]

#: Where the others are: whoever needs little, a command or a process that only maps, does not pay for the rest.
_PLACES = {
    "Buffer": "realmap.user.buffer",
    "Call": "realmap.serving.syscalls",
    "CrossProcessMapping": "realmap.memory.cross_process",
    "ForeignMapping": "realmap.memory.foreign",
    "ForeignProcess": "realmap.memory.foreign",
    "Handle": "realmap.user.handle",
    "Kernel": "realmap.kernel.kernel",
    "KernelHandle": "realmap.system",
    "Limits": "realmap.kernel.limits",
    "MemoryInfo": "realmap.wire.messages",
    "Process": "realmap.user.process",
    "Service": "realmap.user.service",
    "Session": "realmap.user.sessions",
    "SpawnedProcess": "realmap.user.spawned",
    "UserBuffer": "realmap.serving.user_buffer",
    "UserspacePtr": "realmap.memory.userspace_ptr",
    "__version__": "realmap.wire.messages",
    "aconnect": "realmap.ambient",
    "boot": "realmap.system",
    "connect": "realmap.ambient",
    "syscall": "realmap.serving.registry",
}

#: Whoever imports one has this: others would see half modules, and the child of a fork would wait for it for ever.
_importing = RLock()
os.register_at_fork(before=_importing.acquire, after_in_parent=_importing.release, after_in_child=_importing.release)

if not TYPE_CHECKING:  # a checker would take every name for one of these

    def __getattr__(name: str) -> object:
        if name == "memory":  # itself
            return _imported("realmap.memory")
        if name not in _PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = globals()[name] = getattr(_imported(_PLACES[name]), name)
        return found

    def _imported(place: str) -> object:
        import signal  # here: whoever only imports realmap does without

        with _importing:
            # The handler of a signal that comes meanwhile runs afterwards: it may use realmap, or raise.
            handled = {number for number in signal.valid_signals() if callable(signal.getsignal(number))}
            before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
            try:
                signal.pthread_sigmask(signal.SIG_BLOCK, handled)
                return importlib.import_module(place)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
