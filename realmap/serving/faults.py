"""Whether a call has touched bytes that were gone: then it ends in MemoryFault, whatever its handler returned.

The C core puts zero pages where a segment was truncated under a mirror, so that nobody dies; here is where that
is told. A call whose handlers touched nothing of the kind pays one comparison (`realmap._core.faults`).
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from threading import get_native_id

from realmap.errors import MemoryFault
from realmap.memory.cross_process import CrossProcessMapping
from realmap.memory.kernel_memory import KernelMemory
from realmap.memory.userspace_ptr import fault_in
from realmap.serving.user_buffer import UserBuffer, late_faults, parts_of


def of_call(
    buffers: Sequence[UserBuffer], memory: KernelMemory, error: BaseException | None, before: int
) -> MemoryFault | None:
    """The fault of a call on `buffers` whose handler ended with `error` (None: it returned). None: it had none.

    For the thread that ran the handler. `before`: the count of faults when it began.
    """
    thread = get_native_id()
    noted, late = late_faults.pop(thread, (0, None))
    if late is not None and noted > before:
        return late
    for buffer in buffers:
        if buffer.fault is not None:  # noted when its mirror was dropped
            return buffer.fault
    for mirror in memory.mirrors():
        if isinstance(mirror, CrossProcessMapping) and mirror.fault is not None:
            caller = mirror._caller
            kept = isinstance(caller, UserBuffer) and caller.has_ended and mirror._fault_thread == thread
            # One that was kept from an earlier call, and touched in this one, is told of once.
            if caller in buffers or kept:
                mirror._tell(None)
                return mirror._memory_fault(mirror.fault)
    for buffer in buffers:
        if buffer.process.is_here:
            for mapping, offset, length in parts_of(buffer):
                fault = fault_in(mapping, offset, length)
                if fault is not None:
                    return fault
    if isinstance(error, OSError) and error.errno == errno.EFAULT:
        return _short(buffers)
    return None


def _short(buffers: Sequence[UserBuffer]) -> MemoryFault | None:
    """A system call of the handler found nothing at an address (EFAULT): which buffer's segment is short."""
    for buffer in buffers:
        for mapping, offset, length in parts_of(buffer):
            fault = mapping.truncated_at(offset, length)
            if fault is not None:
                return fault
    return None
