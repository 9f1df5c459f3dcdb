"""realmap.shared_memory: what peer_shared_memory.py does with the standard module, but for the handover."""

from _protocol import serve
from peer_shared_memory import operations

from realmap.shared_memory import SharedMemory

if __name__ == "__main__":
    serve(operations(SharedMemory))
