"""The library in a user process.

client    the connection: requests, answers, waiting (interruptible), what happens when the kernel is gone
process   Process: map, call, query
buffer    Buffer: bytes in this process's UserLand
"""

from realmap.user.buffer import Buffer
from realmap.user.process import Process

__all__ = ["Buffer", "Process"]
