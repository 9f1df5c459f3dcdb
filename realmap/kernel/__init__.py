"""The kernel process, in floors: imports only ever go down.

kernel        Kernel: puts the parts together; nobody here imports it

listener      the path, and the socket there
admission     who is let in
connection    one client: its line, and what it is to the books
clients       everybody who is connected: greeting, dropping
dispatch      what answers a request: a service or a handler
seats         the sockets of services between processes, and what their servers are told
registration  handlers that come and go while it runs
heirs         who may still come for what a dead process left
snapshots     writes the books for whoever asks, a little at a time
tracer        tells one listener of everything that happens
watchdog      tells of handlers that do not return

services      map, unmap, query and the like: a table of functions (books, process, request)
view          ProcessView: a process as handlers see it, by the books
given_up      handlers that nobody waits for any more, bounded
running       a call that does not have the loop
dump          stats, and the books as plain data

books         Books: what the kernel knows. No sockets, no threads, no clock
processes     who is connected, and what each holds
handles       what is shared between processes, and until when
circles       services whose threads wait for one another, as their servers tell
ports         which processes serve which names, who calls whom, and what is granted
inheritance   what a process that had forked left to its children
budgets       what each peer has at a time, and what a uid's ended processes left
limits        what each may have
observer      what is told of while somebody looks

The loop itself, its threads, and how a handler is run, are in `realmap/serving/`, which serves user processes as well.
Only whoever has the loop changes or reads the books. A worker thread, or one that has lost the loop, sees a call's
buffers (pinned before anybody else has the loop) and KernelMemory (made for that), and posts its answer when done.
"""

from realmap.kernel.kernel import Kernel
from realmap.kernel.limits import Limits
from realmap.serving.registry import syscall
from realmap.serving.syscalls import Call
from realmap.serving.user_buffer import UserBuffer

__all__ = ["Call", "Kernel", "Limits", "UserBuffer", "syscall"]
