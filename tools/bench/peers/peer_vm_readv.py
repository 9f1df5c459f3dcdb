"""process_vm_readv and process_vm_writev: the kernel copies between the memories of two processes, no mapping needed.

There is no Python binding of it in common use, so this is ctypes, as sparing as ctypes allows: prototypes declared
once, one iovec on each side, made once. The other process need do nothing; it must let itself be traced (same user,
and kernel.yama.ptrace_scope at most 1, since it is a child).

    access LENGTH COUNT WORK    copied into a warm buffer, WORK there (write: fill the buffer, copied into the partner)
"""

import ctypes
import mmap
import os
from multiprocessing.connection import Connection

from _protocol import numpy, partner, require, serve, timed, worker


class Piece(ctypes.Structure):
    """struct iovec"""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


libc = ctypes.CDLL(None, use_errno=True)
for function in (libc.process_vm_readv, libc.process_vm_writev):
    pieces = ctypes.POINTER(Piece)
    function.argtypes = (ctypes.c_int, pieces, ctypes.c_ulong, pieces, ctypes.c_ulong, ctypes.c_ulong)
    function.restype = ctypes.c_ssize_t


def have_bytes(channel: Connection, length: int) -> None:
    memory = mmap.mmap(-1, length)
    data = numpy.frombuffer(memory, numpy.uint8)
    data.fill(1)
    channel.send(data.ctypes.data)
    channel.recv()  # until the peer ends


addresses: dict[int, int] = {}  # pid -> where its bytes are


def access(length: int, count: int, work: str) -> int:
    require("numpy")
    other = partner(have_bytes, length)
    if other.pid not in addresses:
        addresses[other.pid] = other.channel.recv()
    buffer = numpy.zeros(length, numpy.uint8)
    do_work = worker(work, buffer, length)
    here = Piece(buffer.ctypes.data, length)
    there = Piece(addresses[other.pid], length)
    ours, theirs, pid = ctypes.byref(here), ctypes.byref(there), other.pid
    transfer = libc.process_vm_writev if work == "write" else libc.process_vm_readv

    def go_on(done: int) -> None:
        while done < length:
            rest = length - done
            pieces = Piece(here.base + done, rest), Piece(there.base + done, rest)
            more = transfer(pid, pieces[0], 1, pieces[1], 1, 0)
            if more <= 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            done += more

    def copy() -> None:
        done = transfer(pid, ours, 1, theirs, 1, 0)
        if done != length:
            go_on(max(done, 0))

    def fetch() -> None:
        copy()
        do_work()

    def store() -> None:
        do_work()
        copy()

    return timed(store if work == "write" else fetch, count)


if __name__ == "__main__":
    serve({"access": access})
