"""Signals at every point of an operation where their handlers can run.

at(n, …)         the n-th opcode of the main thread: the handler runs where the interpreter, or the C core, asks next
while_asleep(…)  while the main thread waits in a system call of the C core: the handler runs there
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import subprocess
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from conftest import BOUND

#: Signal and system calls: ppoll(2) of who reads, futex(2) of who stands by.
SIGNAL = signal.SIGALRM
PPOLL, FUTEX = {"x86_64": ("271", "202"), "aarch64": ("73", "98")}.get(os.uname().machine, ("", ""))


@functools.cache
def _library() -> ctypes.PyDLL:
    """The tracer, built for this interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "points.so"
        include = sysconfig.get_path("include")
        source = Path(__file__).with_name("points.c")
        command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-I{include}"]
        subprocess.run([*command, str(source), "-o", str(built)], check=True)
        found = ctypes.PyDLL(str(built))
    found.begin.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_char_p]
    found.begin.restype = found.end.restype = ctypes.py_object
    return found


class Point:
    """Whether it was reached."""

    reached = False


@contextlib.contextmanager
def at(number: int, within: str = "/realmap/") -> Iterator[Point]:
    """The signal comes at this opcode of code whose file is `within` so called. By then it has been handled."""
    point, library = Point(), _library()
    library.begin(number, SIGNAL, within.encode())
    try:
        yield point
    finally:
        point.reached = library.end()


@contextlib.contextmanager
def while_asleep(call: str) -> Iterator[Point]:
    """The signal comes once the main thread has been seen in this system call, the same one, for some milliseconds."""
    point, began, ending = Point(), threading.Event(), threading.Event()
    main = threading.main_thread()

    def watch() -> None:
        path, end = Path(f"/proc/self/task/{main.native_id}/syscall"), time.monotonic() + BOUND
        began.wait(BOUND)
        seen, times = "", 0
        while not ending.wait(0.001) and time.monotonic() < end:
            now = path.read_text()
            seen, times = now, times + 1 if now == seen else 0
            if now.split()[0] == call and times > 5:  # who waits for the interpreter's lock does not for that long
                point.reached = True
                assert main.ident is not None
                signal.pthread_kill(main.ident, SIGNAL)
                return

    thread = threading.Thread(target=watch)
    thread.start()
    began.set()
    try:
        yield point
    finally:
        ending.set()
        thread.join(BOUND)
