"""A kernel in this process, and raw clients that play server and caller. Fixtures, for who imports them."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import syscalls
from conftest import PAGE, wait_until
from raw_client import RawClient, RawServer, RawSession

from realmap import Kernel, Limits
from realmap.wire import channel
from realmap.wire.news import News, Opened
from realmap.wire.seat import SeatPage

TOTALS = ("seats", "sessions", "grants")


@pytest.fixture
def run() -> Iterator[Callable[..., Kernel]]:
    """Kernels in this process, without rings unless asked for; at the end nothing is left in their books."""
    made: list[Kernel] = []

    def make(spin: float = 0, **limits: Any) -> Kernel:
        made.append(Kernel(syscalls=syscalls.ALL, spin=spin, limits=Limits(**limits)).start())
        return made[-1]

    yield make
    for kernel in made:
        try:
            wait_until(lambda kernel=kernel: not len(kernel.books.processes), "everybody's end")
            assert kernel.books.peers.totals() | dict.fromkeys(TOTALS, 0) == kernel.books.peers.totals()
            assert not list(kernel.books.ports)
        finally:
            kernel.stop()


class Stage(contextlib.ExitStack):
    """A kernel, a server of "name", and a caller with a session and a mapping of three pages in pieces of one."""

    def __init__(self, kernel: Kernel, threads: int = 2) -> None:
        super().__init__()
        self.kernel = kernel
        self.host = self.enter_context(RawClient(kernel.path))
        self.server = self.enter_context(RawServer(self.host, "name", threads=threads))
        self.caller = self.enter_context(RawClient(kernel.path))
        self.session = self.enter_context(RawSession(self.caller, "name"))
        opened, fds = self.server.hear()
        assert isinstance(opened, Opened)
        self.opened = opened
        self.line = self.enter_context(socket.socket(fileno=fds[0]))
        self.callback(channel.close_all, fds[1:])
        self.address = self.caller.map(3 * PAGE, fragment=PAGE)

    def hear(self) -> News:
        """What the server is told next, without descriptors."""
        news, fds = self.server.hear()
        channel.close_all(fds)
        return news


@pytest.fixture
def stage(run: Callable[..., Kernel]) -> Iterator[Stage]:
    """One, without rings."""
    with Stage(run()) as made:
        yield made


def word(fd: int, which: int) -> int:
    """A word of a seat's page."""
    page = SeatPage(fd, writable=False)
    value = page.words[which]
    page.close()
    return value
