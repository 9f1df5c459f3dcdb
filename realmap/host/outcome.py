"""What a function in another process came to: its value, or its exception, as bytes.

An exception has the traceback of its own process as its cause, as in concurrent.futures: its text, for frames do not
travel. Bytes of any length go to a process that may not read them for long, or never: in a memfd, which it is sent.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import traceback
from typing import Any

from realmap.host import files, interpreter


class RemoteTraceback(Exception):
    """Where an exception was raised, in the process that it came from."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


def of_value(value: Any, what: str) -> bytes:
    """Of a function that returned. TypeError: `what` cannot be sent."""
    return interpreter.dumps((True, value, ""), what)


def of_error(error: BaseException, where: str) -> bytes:
    """Of one that raised; `where` it did, in words; "": it does not matter."""
    text = f"In {where}:\n{text_of(error)}" if where else ""
    try:
        data = interpreter.dumps((False, error, text), "the exception")
        pickle.loads(data)  # some are made of other arguments than they take
        return data
    except Exception:
        return pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}"), text))


def text_of(error: BaseException) -> str:
    """Its traceback from below the function that called what raised it."""
    frames = error.__traceback__.tb_next if error.__traceback__ is not None else None
    return "".join(traceback.format_exception(type(error), error, frames))


def read(data: bytes) -> Any:
    """The value. The exception: raised."""
    ok, value, text = pickle.loads(data)
    if ok:
        return value
    raise value from (RemoteTraceback(text) if text else None)


def send(sock: socket.socket, data: bytes) -> None:
    """Never waits for who reads it. OSError: Linux has no memory or no descriptors for it, or nobody is there."""
    fd = os.memfd_create("realmap-outcome")
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
        socket.send_fds(sock, [b"\0"], [fd])
    finally:
        files.close(fd)


def receive(sock: socket.socket) -> bytes | None:
    """What was sent. None: nothing was, so far."""
    with contextlib.suppress(BlockingIOError, ConnectionResetError):
        data, descriptors = files.receive(sock, 1 << 16, 1)
        for fd in descriptors:
            with open(fd, "rb") as file:
                return os.pread(file.fileno(), os.fstat(fd).st_size, 0)
        return data or None  # it could not even begin
    return None


def ended(exitcode: int) -> str:
    """How a process ended, in words."""
    if exitcode >= 0:
        return f"ended with exit status {exitcode}"
    try:
        return f"was killed by {signal.Signals(-exitcode).name}"
    except ValueError:  # a real-time one
        return f"was killed by signal {-exitcode}"
