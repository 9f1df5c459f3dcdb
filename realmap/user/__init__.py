"""The library in a user process.

process   Process: map, share, attach, call, query
sessions  Session, and which server takes a call
handle    Handle: what stands for shared memory while it travels
buffer    Buffer: bytes in this process's UserLand
"""

from realmap.user.buffer import Buffer
from realmap.user.handle import Handle
from realmap.user.process import Process
from realmap.user.sessions import Session

__all__ = ["Buffer", "Handle", "Process", "Session"]
