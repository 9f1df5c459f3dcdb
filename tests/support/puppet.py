"""A user process that does what it is told over a pipe; the stateful tests hold the strings."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import socket
import struct
from typing import Any

import realmap
from realmap.lab.stress.actor import Actor


class Puppet:
    """The puppeteer's side: a forked process with a connection of its own."""

    def __init__(self, path: str) -> None:
        self._sock, theirs = socket.socketpair()
        self._sock.settimeout(60)
        self.pid = os.fork()
        if not self.pid:
            with contextlib.suppress(BaseException):
                self._sock.close()
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                _dance(path, theirs)
            os._exit(0)
        theirs.close()
        self.forks: list[int] = []

    def do(self, what: str, *args: Any) -> Any:
        """Has it do something; its answer. An exception of its is raised here."""
        _send(self._sock, (what, args))
        answer = _receive(self._sock)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def kill(self) -> None:
        """SIGKILL, to it and its forks, and reaps it."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._end_forks()
        self._sock.close()

    def _end_forks(self) -> None:
        """SIGKILL to its forks, and waits until they are gone: what they map is theirs until then."""
        for pid in self.forks:
            pidfd = os.pidfd_open(pid)
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            select.select([pidfd], [], [], 60)
            os.close(pidfd)

    def leave(self) -> None:
        """Lets it close its connection and end."""
        self._end_forks()
        self.do("close")
        self._sock.close()
        os.waitpid(self.pid, 0)


def _send(sock: socket.socket, value: Any) -> None:
    data = pickle.dumps(value)
    sock.sendall(struct.pack("=I", len(data)) + data)


def _receive(sock: socket.socket) -> Any:
    def exactly(size: int) -> bytes:
        got = b""
        while len(got) < size:
            more = sock.recv(size - len(got))
            if not more:
                raise EOFError
            got += more
        return got

    return pickle.loads(exactly(struct.unpack("=I", exactly(4))[0]))


def _dance(path: str, sock: socket.socket) -> None:
    me = realmap.connect(path)
    actor = Actor(me)
    while True:
        what, args = _receive(sock)
        answer: Any = None
        try:
            if what == "step":
                answer = actor.perform(*args)
            elif what == "call":
                name, key, offset, length, *before = args
                answer = me.call(name, *before, actor.buffers[key].slice(offset, length))
            elif what == "fork":
                answer = os.fork()
                if not answer:
                    signal.pause()
                    os._exit(0)
            elif what == "close":
                me.close()
        except BaseException as error:
            answer = error
        _send(sock, answer)
        if what == "close":
            return
