"""The library in a user process.

client    the connection: requests, answers, waiting (interruptible), what happens when the kernel is gone
process   Process: map, share, attach, call, query
handle    Handle: what stands for shared memory while it travels
buffer    Buffer: bytes in this process's UserLand
"""

from realmap.user.buffer import Buffer
from realmap.user.handle import Handle
from realmap.user.process import Process

__all__ = ["Buffer", "Handle", "Process"]
