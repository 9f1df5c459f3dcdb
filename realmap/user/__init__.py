"""The library in a user process.

process     Process: map, share, attach, call, query
arguments   what a call takes along
sessions    Session, and which server takes a call
service/    Service: handlers that this process runs for others
handle      Handle: what stands for shared memory while it travels, and how one is made
buffer      Buffer: bytes in this process's UserLand
windows     mapping what the kernel answered; attached: what is attached again without asking
inheritance what a forked child has of its parent's connections
"""

from realmap.user.buffer import Buffer
from realmap.user.handle import Handle
from realmap.user.process import Process
from realmap.user.sessions import Session

__all__ = ["Buffer", "Handle", "Process", "Session"]
