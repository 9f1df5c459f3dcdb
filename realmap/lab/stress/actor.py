"""Does what a `Step` says, with real buffers and real calls."""

from __future__ import annotations

import contextlib
import os
import threading

from realmap.errors import KernelError, MemoryFault, PhysicalMemoryExhaustion, VirtualMemoryExhaustion
from realmap.host import forks
from realmap.lab.workload import Step, pattern
from realmap.pages import PAGE_SIZE
from realmap.rights import u_r, u_rw
from realmap.user import Buffer, Process

#: What a map may be answered with where memory is short; nothing is wrong then.
NO_ROOM = (PhysicalMemoryExhaustion, VirtualMemoryExhaustion)
#: How long the kernel may take to answer whoever would not wait for ever: what works against it may keep it. Seconds.
PATIENCE = 60.0


def join(path: str) -> Process:
    """A user of the kernel at `path`. Errors as `realmap.connect`."""
    return Process(path, timeout=PATIENCE)


class WrongBytes(Exception):
    """What was read is not what was written."""


class Actor:
    """A user process with its buffers, by the keys of the workload."""

    def __init__(self, me: Process) -> None:
        self.me = me
        self.buffers: dict[int, Buffer] = {}
        #: Truncations that nobody noticed, since nothing was touched after them.
        self.unnoticed = 0

    def perform(self, step: Step) -> object:
        """Does it; its result. KernelError: as the library says."""
        kind, me = step.kind, self.me
        if kind in ("map", "map_read_only"):
            rights = u_rw if kind == "map" else u_r
            self.buffers[step.key] = me.map(step.length, fragment=step.fragment or None, rights=rights)
            return None
        if kind == "fork":
            _fork(me.path, step.seed)
            return None
        buffer = self.buffers[step.key]
        if kind == "write":
            buffer[step.offset : step.offset + step.length] = pattern(step.seed, step.length)
        elif kind == "check":
            return buffer[:]
        elif kind in ("digest", "slow_digest", "copied_digest", "reverse"):
            return me.call(f"stress_{kind}", buffer.slice(step.offset, step.length))
        elif kind == "fill":
            me.call("stress_fill", buffer.slice(step.offset, step.length), pattern(step.seed, step.length))
        elif kind == "copy":
            target = self.buffers[step.other].slice(0, step.length)
            me.call("stress_copy", buffer.slice(step.offset, step.length), target)
        elif kind == "keep":
            me.call("stress_keep", step.other, buffer.slice(step.offset, step.length))
        elif kind == "drop":
            return me.call("stress_drop", step.other)
        elif kind == "unmap":
            self.buffers.pop(step.key).unmap()
        elif kind == "forget":
            del self.buffers[step.key]
        elif kind == "truncate":
            del self.buffers[step.key]
            self._truncate(step, buffer)
        return None

    def _truncate(self, step: Step, buffer: Buffer) -> None:
        """Truncates a segment while a handler reads it: it is told, or everything was read before."""
        buffer[:] = b"\1" * len(buffer)
        pid, fd, length = self.me.call("stress_where", buffer)[0]
        errors: list[BaseException] = []

        def read_on() -> None:
            try:
                zeros = self.me.call("stress_read_on", buffer, 200)
                if zeros:
                    errors.append(WrongBytes(f"{zeros} pages of zeros were read, and no fault was reported"))
                self.unnoticed += 1
            except MemoryFault:
                pass
            except KernelError as error:
                errors.append(error)

        reader = threading.Thread(target=read_on)
        reader.start()
        try:
            # Whole pages stay, so that what is left is all ones.
            size = min(step.offset, length - 1) // PAGE_SIZE * PAGE_SIZE
            with contextlib.suppress(FileNotFoundError):
                os.truncate(f"/proc/{pid}/fd/{fd}", size)
        finally:
            reader.join()
        if errors:
            raise errors[0]
        try:
            seen = buffer[:]
        except MemoryFault:
            pass
        else:
            raise WrongBytes(f"a truncated buffer was read as {len(seen)} bytes, {seen.count(0)} of them zero")
        buffer.unmap()


def _fork(path: str, seed: int) -> None:
    """A child that inherits everything and touches nothing, or becomes a process of its own; it ends by itself."""
    child = forks.fork()
    if not child:
        status = 1
        try:
            if seed % 2:
                with contextlib.suppress(*NO_ROOM), join(path) as me:
                    buffer = me.map(1 + seed % 9999)
                    data = pattern(seed, len(buffer))
                    buffer[:] = data
                    if buffer[:] != data:
                        raise WrongBytes("in a forked child")
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        raise WrongBytes(f"a forked child ended with {status}")
