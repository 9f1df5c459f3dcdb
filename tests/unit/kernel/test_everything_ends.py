"""Whatever a client is at when it goes, or the kernel ends: nothing of it is counted afterwards."""

from __future__ import annotations

import gc
import math
import os
import random
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from conftest import BOUND, PAGE, long, scaled, wait_until
from raw_client import RawClient

import realmap
from realmap import Call, Kernel, Limits, UserBuffer, syscall
from realmap.kernel import heirs, watchdog
from realmap.observe.control import Control
from realmap.rights import MemoryType, u_rw
from realmap.wire import channel, messages

#: Handlers at work wait for it.
gate = threading.Event()


@syscall
def late(call: Call, *buffers: UserBuffer) -> None:
    """Loses the loop."""
    gate.wait(BOUND)


@syscall(blocking=True)
def beside(call: Call, size: int) -> bytes:
    """Is at work, or waits for its turn."""
    gate.wait(BOUND)
    return bytes(size)


@syscall(blocking=True)
def large(call: Call, size: int) -> bytes:
    """Nobody may read it."""
    return bytes(size)


@syscall
def fails(call: Call) -> None:
    """Raises."""
    raise ValueError("it does")


def call(name: str, *args: Any, timeout: float | None = None) -> messages.Call:
    return messages.Call(random.randrange(1, 1 << 30), name, msgspec.Raw(msgspec.msgpack.encode(args)), timeout)


class Talker(RawClient):
    """Says what it likes by the socket, and reads nothing."""

    def say(self, message: Any) -> None:
        for part in channel.datagrams(msgspec.msgpack.encode(message)):
            self.sock.send(part)


def mapping(length: int) -> messages.Map:
    return messages.Map(1, length, int(MemoryType.HEAP), int(u_rw), None, None, True)


def half(client: Talker) -> None:
    client.sock.send(bytes([channel.FIRST]) + bytes(channel.CHUNK))


#: What a client is at when it goes.
WAYS: dict[str, Callable[[Talker], object]] = {
    "late": lambda client: client.say(call("late")),
    "late with a deadline": lambda client: client.say(call("late", timeout=0.01)),
    "beside": lambda client: [client.say(call("beside", 9)) for _ in range(7)],
    "beside with a deadline": lambda client: [client.say(call("beside", 9, timeout=0.01)) for _ in range(7)],
    "large": lambda client: [client.say(call("large", 555_555)) for _ in range(5)],
    "half sent": half,
    "no message": lambda client: client.sock.send(b"\0nonsense"),
    "fails": lambda client: client.say(call("fails")),
    "no such": lambda client: client.say(call("there is no such")),
    "large mappings": lambda client: [client.say(mapping(5 << 20)) for _ in range(3)],
    "small mapping": lambda client: client.say(mapping(PAGE)),
    "snapshots": lambda client: [client.say(messages.Ask(1, "books")) for _ in range(40)],
    "forked": lambda client: (client.say(mapping(PAGE)), client.say(messages.Forked(0))),
}


def share_and_go(kernel: Kernel) -> None:
    """Handles of each kind, and a late handler, of a client that goes in good order."""
    with realmap.connect(kernel.path) as me:
        memory = me.map(3 * PAGE)
        for keep in (False, 60.0, True):
            me.share(memory, keep=keep)
        with pytest.raises(realmap.SyscallTimeout):
            me.call("late", memory, timeout=0.05)


def storm(kernel: Kernel, seed: int, turns: int) -> None:
    chosen = random.Random(seed)
    clients: list[Talker] = []
    for _ in range(turns):
        client = Talker(kernel.path)
        clients.append(client)
        try:
            for way in chosen.sample(sorted(WAYS), 3):
                WAYS[way](client)
        except OSError:
            pass  # it was sent away
        while len(clients) > chosen.randrange(4):
            clients.pop(0).__exit__()
    for client in clients:
        client.__exit__()


def check_nothing_is_counted(kernel: Kernel, peers: list[Any]) -> None:
    dispatch, books = kernel.dispatch, kernel.books
    given_up = dispatch.given_up
    # Once the kernel has ended, each handler counts itself out on its own thread: all of it is waited for.
    wait_until(lambda: not (dispatch.running or dispatch._late or len(given_up) or given_up._of_uid), "the handlers")
    wait_until(lambda: not any(syscall.given_up for syscall in books.syscalls.values()))
    wait_until(lambda: not any(any(peer.used.values()) or peer.calls or peer.maps for peer in peers), "the counts")
    peers.clear()
    wait_until(lambda: bool(gc.collect() + 1) and not books.peers._processes.data, "the peers' own end")
    assert not books.peers._users.data
    assert not kernel.snapshots._waiting
    assert kernel.snapshots._file < 0
    assert not kernel.frames.segments


@pytest.mark.parametrize("seed", [0, 1, long(2)])
@pytest.mark.parametrize("ends", ["clients", "kernel"])
def test_nothing_is_counted_afterwards(seed: int, ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heirs, "REST", 0)
    monkeypatch.setattr(watchdog, "TICK", 0.05)
    monkeypatch.setattr(watchdog, "REPORT", math.inf)  # pytest keeps what is logged, and with it whose call it was
    gate.clear()
    with Kernel(syscalls=[late, beside, large, fails], limits=Limits(given_up=500, running=3)) as kernel:
        peers = [kernel.books.peers.process(os.getpid()), kernel.books.peers.user(os.geteuid())]
        share_and_go(kernel)
        storm(kernel, seed, scaled(40))
        if ends == "clients":
            gate.set()
            wait_until(lambda: not kernel.clients.all(), "the clients' ends")
            wait_until(lambda: not len(kernel.books.inheritance), "that nobody comes")
            with Control(kernel.path) as control:
                for token in [shared.name for shared in kernel.handles]:
                    assert control._ask("revoke-orphans", int(token[:8], 16)) == 1
            wait_until(lambda: not kernel.clients.all(), "the end of that, too")
            check_nothing_is_counted(kernel, peers)
    gate.set()
    if ends == "kernel":
        check_nothing_is_counted(kernel, peers)


@pytest.mark.parametrize("name", ["fails", "large"])
def test_a_call_whose_arguments_are_no_list_has_failed_once(name: str) -> None:
    with Kernel(syscalls=[large, fails], spin=0) as kernel, realmap.connect(kernel.path) as me:
        request = messages.Call(5, name, msgspec.Raw(msgspec.msgpack.encode({"size": 1})))
        kernel.loop.post(lambda: kernel.dispatch.handle(kernel.clients.all()[0], request, ()))
        wait_until(lambda: kernel.books.syscalls[name].calls and not kernel.dispatch.running)
        with Control(kernel.path) as control:
            assert (control.stats()["calls"], control.stats()["failed"]) == (1, 1)
        del me
