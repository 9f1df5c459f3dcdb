"""The kernel process.

    server        Kernel: the loop that everything below hangs on; its own thread, epoll
    reception     who is let in
    dispatch      what answers a request: a service or a handler
    connection    one client's socket: what it said so far, what it has not read yet
    process_table who is connected, and what each holds
    syscalls      the @syscall decorator, Call, and how a handler is run
    user_buffer   UserBuffer: a handler's buffer argument
    services      map, unmap, query and the like: what the kernel does itself
    books         stats, and the books as plain data
    workers       threads for handlers that take long

Only the kernel's thread touches the books. A worker thread sees a call's buffers (pinned before
it starts) and KernelMemory (made for that), and leaves word when it is done.
"""

from realmap.kernel.server import Kernel
from realmap.kernel.syscalls import Call, syscall
from realmap.kernel.user_buffer import UserBuffer

__all__ = ["Call", "Kernel", "UserBuffer", "syscall"]
