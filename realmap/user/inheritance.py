"""What a fork leaves to the child: the connections of its parent, and what they have mapped.

before it      the parent tells its kernels: what it has may be somebody else's, too
in the child   nothing happens until it uses a connection: that is made anew then, and what is still there is adopted
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from realmap.host import forks
from realmap.host.signals import Living
from realmap.wire import messages

if TYPE_CHECKING:
    from realmap.user.process import Process
    from realmap.wire.client import Client

#: How much of what it inherited a forked child tells in one message.
AT_ONCE = 1000

_living: Living[Process] = Living()


def add(process: Process) -> None:
    """This process has that connection, and so have children that it forks."""
    _living.add(process)
    forks.lose_in_child(process)


def living() -> list[Process]:
    """The connections that this process has made, or inherited, and that have not ended."""
    return [process for process in _living.all() if not process._client.has_ended]


def adopt(process: Process, before: Client, client: Client) -> None:
    """In a forked child: what was mapped by the connection `before` is from now on by its own, `client`."""
    windows = process._windows()
    adopted: list[bool] = []
    for start in range(0, max(1, len(windows)), AT_ONCE):  # once at least: it wants no more
        places = [(each._base, each._span, each._serial) for each in windows[start : start + AT_ONCE]]
        more = start + AT_ONCE < len(windows)
        adopted += client.request(messages.Adopt(client.next_id(), before.secret, places, more))[0]
    for window, known in zip(windows, adopted, strict=True):
        # What the parent had unmapped by now is memory still, but none that the kernel knows.
        if known:
            window._farewell(client.endpoint, process._farewell(window._base, window._span), None)
        else:
            window._farewell(None, None, None)


def _tell_of_fork() -> None:
    """In the parent, before it forks: what it has may be somebody else's, too, from then on. Not after: it may die."""
    for process in living():
        client = process._client
        inherits = not client.lost_in_child and bool(process._windows())
        if inherits or client.endpoint.has_stock:
            client.endpoint.empty_stock(client.encode(messages.Forked(0, inherits)))


os.register_at_fork(before=_tell_of_fork)
