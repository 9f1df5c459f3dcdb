"""The kernel process.

    kernel        Kernel: the loop that everything below hangs on; its own thread, epoll
    clients       everybody who is connected: listening, reading, dropping
    admission     who is let in
    dispatch      what answers a request: a service or a handler
    connection    one client's socket: what it said so far, what it has not read yet
    processes     who is connected, and what each holds
    syscalls      the @syscall decorator, Call, and how a handler is run
    user_buffer   UserBuffer: a handler's buffer argument
    services      map, unmap, query and the like: what the kernel does itself
    handles       what is shared between processes, and until when
    inheritance   what a process that had forked left to its children
    dump          stats, and the books as plain data
    events        what is told of while somebody listens
    tracer        the telling
    faults        whether a call touched bytes that were gone
    workers       threads for handlers that take long, and each process's share of them
    watchdog      tells of handlers that do not return
    limits        what each process may have at a time

Only the kernel's thread touches the books. A worker thread sees a call's buffers (pinned before
it starts) and KernelMemory (made for that), and leaves word when it is done.
"""

from realmap.kernel import syscalls
from realmap.kernel.kernel import Kernel
from realmap.kernel.limits import Limits
from realmap.kernel.processes import UserProcess
from realmap.kernel.syscalls import Call, syscall
from realmap.kernel.user_buffer import UserBuffer

__all__ = ["Call", "Kernel", "Limits", "UserBuffer", "syscall"]

# The annotations of Call: help() asks for them, and they are known only now.
vars(syscalls).update(Kernel=Kernel, UserProcess=UserProcess)
