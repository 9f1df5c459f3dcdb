"""A sender and a receiver of a buffer, as processes of multiprocessing; test_travel.py holds the strings.

Run as a script, it is the sender: METHOD WAY KERNEL CONTROL. The receiver tells CONTROL (a socket) what it has got,
waits for a word, and tells again.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import socket
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import realmap

SIZE = 5 * 4096 + 77
WAYS = ("args", "queue", "pipe", "pool", "executor", "joblib")


def talk(control: str, who: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(control)
    say(sock, who)
    return sock


def say(sock: socket.socket, *words: object) -> None:
    sock.sendall((" ".join(map(str, [os.getpid(), *words])) + "\n").encode())


def receive(buffer: realmap.Buffer, control: str) -> str:
    """What the receiver does with it: digests it here and in the kernel, writes a word, and once more after a while."""
    sock = talk(control, "receiver")
    say(sock, hashlib.sha256(buffer).hexdigest(), buffer.process.call("sha256", buffer))
    buffer[:8] = b"received"
    say(sock, "written")
    sock.recv(1)
    say(sock, hashlib.sha256(buffer).hexdigest(), buffer.process.call("sha256", buffer))
    sock.close()
    return "done"


def receive_from(source: Any, control: str) -> None:
    """The same, of what comes through a queue or a pipe."""
    buffer = source.get() if hasattr(source, "get") else source.recv()
    receive(buffer, control)


def send(method: str, way: str, kernel: str, control: str) -> None:
    """The sender: it maps, writes, sends, and waits for a word before it ends."""
    context = multiprocessing.get_context(method)
    me = realmap.connect(kernel)
    buffer = me.map(SIZE, fragment=2 * 4096)
    buffer[:] = bytes(number % 253 for number in range(SIZE))
    sock = talk(control, "sender")
    results: list[str] = []
    if way == "args":
        child = context.Process(target=receive, args=(buffer, control))
        child.start()
    elif way in ("queue", "pipe"):
        source, target = (context.Queue(),) * 2 if way == "queue" else context.Pipe(duplex=False)
        child = context.Process(target=receive_from, args=(source, control))
        child.start()
        target.put(buffer) if way == "queue" else target.send(buffer)
    elif way == "pool":
        pool = context.Pool(1)
        answer = pool.apply_async(receive, (buffer, control))
    elif way == "joblib":
        os.environ["JOBLIB_START_METHOD"] = method  # read when it is imported
        import joblib

        parallel = joblib.Parallel(n_jobs=2, backend="multiprocessing")
        thread = threading.Thread(target=lambda: results.extend(parallel([joblib.delayed(receive)(buffer, control)])))
        thread.start()
    else:
        executor = ProcessPoolExecutor(1, mp_context=context)
        future = executor.submit(receive, buffer, control)
    sock.recv(1)
    if way == "pool":
        answer.get(60)
        pool.close()
        pool.join()
    elif way == "joblib":
        thread.join(60)
        assert results == ["done"]
    elif way == "executor":
        future.result(60)
        executor.shutdown()
    else:
        child.join()
        assert child.exitcode == 0
    say(sock, buffer[:8].decode())
    buffer.unmap()
    me.close()
    sock.close()


if __name__ == "__main__":
    send(*sys.argv[1:])
    time.sleep(0)
