"""What a forked child has of its parent's memory, once it uses it; whoever ends first."""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
from contextlib import suppress

import pytest
from conftest import BOUND, PAGE, land_maps, wait_until
from forked import in_a_child

import realmap
from realmap import InvalidHandle, KernelHandle, Process
from realmap.host import forks
from realmap.memory.lands import HEAP_SHARE, USER_LAND
from realmap.user import inheritance


def test_a_child_that_touches_nothing_costs_nothing(kernel: KernelHandle, me: Process) -> None:
    buffer = me.map(PAGE)
    calls = kernel.stats()["calls"]

    def work() -> None:
        assert kernel.path
        buffer[0] = 7

    in_a_child(work)
    assert (kernel.stats()["processes"], kernel.stats()["calls"]) == (1, calls)
    assert buffer[0] == 7


def test_a_child_has_what_its_parent_had(kernel: KernelHandle, me: Process) -> None:
    buffers = [me.map(2 * PAGE, fragment=PAGE), me.map(PAGE, rights=realmap.u_r), me.map(PAGE)]
    buffers[0][:5] = b"hello"
    gone = buffers.pop()

    def work() -> None:
        gone.unmap()  # before a word was said: its own copy, and nobody else's business
        assert me.call("peek", buffers[0], 5, 0) == b"hello"
        report = realmap.connect(kernel.path)
        assert me.call("who")[0] == os.getpid()
        found = me.query(buffers[0].address)
        assert (found.length, found.refcount) == (2 * PAGE, 2)
        with pytest.raises(realmap.AccessDenied):
            me.call("poke", buffers[1], b"x", 0)
        own = me.map(PAGE)
        assert own.address not in [buffer.address for buffer in buffers]
        buffers[0].unmap()
        report.close()

    in_a_child(work)
    wait_until(lambda: kernel.stats()["processes"] == 1)
    assert me.call("peek", buffers[0], 5, 0) == b"hello"
    assert gone[0] == 0
    assert kernel.audit()


@pytest.mark.parametrize("said", ["nothing", "that it is there", "something else"])
def test_an_orphan_still_has_it(kernel: KernelHandle, me: Process, said: str) -> None:
    """The parent is killed before its child has come for what it had; the books keep that for the child, and then no
    more. Meanwhile the child has connected, or has a connection of its own, or not."""
    reader, writer = os.pipe()
    go, gone = os.pipe()
    parent = os.fork()
    if not parent:
        with suppress(BaseException):
            mine = kernel_connect(kernel.path)
            buffer = mine.map(3 * PAGE, fragment=PAGE)
            buffer[:] = b"heirloom" * (3 * PAGE // 8)
            if not os.fork():
                adopt = inheritance.adopt
                own = kernel_connect(kernel.path) if said == "something else" else None

                def wait() -> None:
                    os.write(writer, b"child")
                    os.read(go, 1)

                if said == "that it is there":
                    inheritance.adopt = lambda *args: [wait(), adopt(*args)][1]
                else:
                    wait()
                found = mine.call("sha256", buffer) == hashlib.sha256(buffer).hexdigest()
                os.write(writer, b"right" if found and (own is None or own.pid) else b"wrong")
                os._exit(0)
            os.read(go, 1)
        os._exit(1)
    assert os.read(reader, 5) == b"child"
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    wait_until(lambda: kernel.stats()["processes"] == (1 if said == "nothing" else 2))
    kernel.settle(BOUND)
    assert kernel.stats()["segments"] == 3
    assert said != "nothing" or kernel.audit()  # a process that is here is to adopt what it has
    os.write(gone, b"!")
    assert os.read(reader, 5) == b"right"
    wait_until(lambda: kernel.stats()["segments"] == 0, "the end of the child, and of what it had")
    for fd in (reader, writer, go, gone):
        os.close(fd)


def test_what_was_attached_and_is_parked_inherits_nothing(kernel: KernelHandle, me: Process) -> None:
    """Its maker has forked, and dies; who has attached it is no child of that."""
    said, says = os.pipe()
    heard, tells = os.pipe()
    maker = os.fork()
    if not maker:
        with suppress(BaseException):
            buffer = kernel_connect(kernel.path).map(PAGE)
            in_a_child(lambda: None)
            os.write(says, pickle.dumps(buffer.process.share(buffer)))
            os.read(heard, 1)
        os._exit(0)
    handle = pickle.loads(os.read(said, 10_000))
    me.attach(handle).unmap()
    assert any(entry.perms == "---s" for entry in land_maps(parked=True))
    os.write(tells, b"!")
    os.waitpid(maker, 0)
    wait_until(lambda: kernel.stats()["segments"] == 0, "the end of what the maker had")
    for fd in (said, says, heard, tells):
        os.close(fd)


def kernel_connect(path: str) -> Process:
    """By name, for a child that must not inherit `me`."""
    return realmap.connect(path)


def test_nobody_adopts_without_the_secret(kernel: KernelHandle, me: Process) -> None:
    from realmap.wire.messages import Adopt

    buffer = me.map(PAGE)
    with kernel.connect() as other:
        for secret in ("", "0" * 32, other._own_client.secret):
            places = [(buffer._window._base, PAGE, buffer._window._serial)]
            answer, _ = other._own_client.request(Adopt(other._own_client.next_id(), secret, places))
            assert answer == [False]
        base, serial = buffer._window._base, buffer._window._serial
        places = [
            (base, PAGE, serial + 1),
            (base, PAGE, serial),
            (base, PAGE, serial),
            (base, 2 * PAGE, serial),
            (5, 7, 1),
        ]
        answer, _ = other._own_client.request(Adopt(other._own_client.next_id(), me._own_client.secret, places))
        assert answer == [False, True, False, False, False]


def test_a_forked_child_never_gets_what_came_to_lie_there_since(kernel: KernelHandle) -> None:
    with kernel.connect() as me:
        old = me.map(3 * PAGE)
        kept = me.map(PAGE)
        old[:5], kept[:4] = b"child", b"kept"
        (go_on, gone), (said, saying) = os.pipe(), os.pipe()
        pid = os.fork()
        if not pid:
            try:
                os.read(go_on, 1)
                found = me.call("peek", kept, 4, 0)
                try:
                    found += me.call("peek", old, 5, 0)
                except realmap.InvalidAddress as error:
                    found += b", " + type(error).__name__.encode()
                os.write(saying, found + b", " + old[:5])
            finally:
                os._exit(0)
        address = old.address
        old.unmap()
        # Where it was is what the search for space comes to next, when all behind it is taken.
        behind = me.map(realmap.PAGE_SIZE)
        rest = USER_LAND.end - USER_LAND.length // HEAP_SHARE - behind.address - PAGE
        far = [me.map(rest // 2 // PAGE * PAGE, commit=False), me.map(rest - rest // 2 // PAGE * PAGE, commit=False)]
        new = me.map(3 * PAGE)
        assert new.address == address
        new[:13] = b"parent secret"
        os.write(gone, b"!")
        assert os.read(said, 100) == b"kept, InvalidAddress, child"
        os.waitpid(pid, 0)
        for fd in (go_on, gone, said, saying):
            os.close(fd)
        assert kernel.audit()
        assert len(far) == 2


def test_a_forked_child_adopts_in_several_messages(
    kernel: KernelHandle, me: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inheritance, "AT_ONCE", 3)
    buffers = [me.map(PAGE) for _ in range(7)]

    def work() -> None:
        for number, buffer in enumerate(buffers):
            buffer[0] = number
        assert b"".join(me.call("peek", buffer, 1, 0) for buffer in buffers) == bytes(range(7))

    in_a_child(work)


def test_a_handler_that_forks_in_a_call(me: Process) -> None:
    """The child has called by then: what it was in the middle of is its parent's, and its own connection goes on."""
    pid, said = os.getpid(), os.pipe()
    children: list[int] = []

    def fork(*_: object) -> None:
        children.append(forks.fork())
        if children[-1]:
            me.call("go_by_name", "the fork")
        else:
            signal.alarm(int(BOUND))
            me.call("who")

    before = signal.signal(signal.SIGALRM, fork)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            came = me.call("wait_for", "the fork")
        except BaseException as error:
            came = type(error).__name__
        if os.getpid() != pid:
            try:
                os.write(said[1], f"{came}, {me.call('who')[0] == os.getpid()}".encode())
            finally:
                os._exit(0)
    finally:
        signal.signal(signal.SIGALRM, before)
    os.close(said[1])
    with open(said[0]) as words:
        assert words.read() == f"{InvalidHandle.__name__}, True"
    os.waitpid(children[0], 0)
    assert came == "the fork"
