"""A user's half of a connection: what is asked of a kernel, and what its answers mean. Knows no memory.

handshake  how a connection begins
requester  requests and answers, for threads
client     the connection to a kernel; what its end is called
waiter     the same in an asyncio loop

Sending, receiving and waiting are the C core's (`_core/endpoint.c`).
"""

from realmap.wire.client.client import Client

__all__ = ["Client"]
