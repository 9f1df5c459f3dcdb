"""share and attach: the same frames in several processes; rights only narrow; what ends a handle, ends it."""

from __future__ import annotations

import fcntl
import os
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import PAGE, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st

import realmap
from realmap import AccessDenied, Handle, InvalidHandle, InvalidSize, KernelHandle, Limits, Process
from realmap.kernel import watchdog
from realmap.wire import messages

CARRIERS = ("ring", "socket")


@pytest.fixture
def other(kernel: KernelHandle, me: Process) -> Iterator[Process]:
    """Another user, in the same process for the test's sake: to the kernel it is another one."""
    with kernel.connect() as process:
        yield process


@pytest.fixture
def buffer(me: Process) -> Iterator[realmap.Buffer]:
    """Five pages in segments of two, of bytes that differ."""
    with me.map(5 * PAGE, fragment=2 * PAGE) as found:
        found[:] = bytes(number % 251 for number in range(5 * PAGE))
        yield found


def test_the_same_memory_at_another_address(me: Process, other: Process, buffer: realmap.Buffer) -> None:
    handle = me.share(buffer)
    assert buffer.refcount == 2
    theirs = other.attach(handle)
    assert theirs.address != buffer.address
    assert buffer.refcount == theirs.refcount == 3
    assert theirs[:] == buffer[:]
    theirs[3 * PAGE] = 99
    assert buffer[3 * PAGE] == 99
    assert other.call("sha256", theirs) == me.call("sha256", buffer)
    theirs.unmap()
    assert buffer.refcount == 2
    me.revoke(handle)
    assert buffer.refcount == 1


def test_in_another_process(kernel: KernelHandle, me: Process, buffer: realmap.Buffer) -> None:
    def work(them: Process, text: str) -> None:
        found = them.attach(text)
        assert found[:3] == bytes([0, 1, 2])
        found[:5] = b"hello"
        assert them.call("peek", found, 5, 0) == b"hello"

    handle = me.share(buffer)
    child = kernel.spawn(work, str(handle))
    assert child.join(60) == 0
    assert buffer[:5] == b"hello"
    assert me.call("peek", buffer, 5, 0) == b"hello"


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_range(data: st.DataObject) -> None:
    kernel, me, other, buffer, model = _stage
    start = data.draw(st.integers(0, len(model) - 1))
    size = data.draw(st.integers(1, len(model) - start))
    handle = me.share(buffer.slice(start, size))
    offset = data.draw(st.integers(0, size - 1))
    length = data.draw(st.none() | st.integers(1, size - offset))
    with other.attach(handle, offset, length) as found:
        assert len(found) == (size - offset if length is None else length)
        assert found[:] == model[start + offset : start + offset + len(found)]
        assert (found.address - start - offset) % PAGE == buffer.address % PAGE
        data_ = bytes([data.draw(st.integers(0, 255))])
        found[len(found) - 1] = data_[0]
        model[start + offset + len(found) - 1] = data_[0]
        assert buffer[:] == model
        assert kernel.audit()
    me.revoke(handle)


_stage: Any = None


@pytest.fixture(autouse=True, scope="module")
def stage() -> Iterator[None]:
    global _stage
    with realmap.boot() as kernel, kernel.connect() as me, kernel.connect() as other:
        kernel.stats()  # its own connection stays open
        buffer = me.map(7 * PAGE, fragment=2 * PAGE)
        model = bytearray(os.urandom(7 * PAGE))
        buffer[:] = model
        _stage = (kernel, me, other, buffer, model)
        yield
        buffer.unmap()
        _stage = None
        del buffer


def test_rights_only_narrow(me: Process, other: Process, buffer: realmap.Buffer) -> None:
    read_only = me.share(buffer, realmap.u_r)
    found = other.attach(read_only)
    assert found.rights == realmap.u_r
    assert memoryview(found).readonly
    with pytest.raises(AccessDenied):
        found[0] = 1
    with pytest.raises(AccessDenied):
        other.call("poke", found, b"x", 0)
    with pytest.raises(AccessDenied, match="no more rights"):
        other.attach(read_only, rights=realmap.u_rw)
    with pytest.raises(AccessDenied, match="no more than its maker"):
        other.share(found, realmap.u_rw)
    narrower = other.attach(me.share(buffer), rights=realmap.u_r)
    with pytest.raises(AccessDenied):
        narrower[0] = 1
    again = other.share(found)
    assert again.rights == realmap.u_r
    assert me.attach(again)[:] == buffer[:]


def test_read_only_is_so_for_linux(me: Process, other: Process, buffer: realmap.Buffer) -> None:
    import ctypes

    found = other.attach(me.share(buffer, realmap.u_r))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(found.address), ctypes.c_size_t(PAGE), 3) == -1
    assert ctypes.get_errno() == 13


def test_what_ends_a_handle(kernel: KernelHandle, me: Process, buffer: realmap.Buffer) -> None:
    with kernel.connect() as maker, kernel.connect() as user:
        own = maker.map(PAGE)
        own[:4] = b"mine"
        spent = maker.share(own, uses=2)
        kept = [user.attach(spent), user.attach(spent)]
        revoked = maker.share(own)
        maker.revoke(revoked)
        mortal = maker.share(own)
        outliving = maker.share(own, keep=True)
        address = own.address
        for handle, word in ((spent, "spent"), (revoked, "revoked")):
            with pytest.raises(InvalidHandle, match=word):
                user.attach(handle)
        maker.close()
        wait_until(lambda: kernel.stats()["processes"] == 2)
        with pytest.raises(InvalidHandle, match="its maker, process"):
            user.attach(mortal)
        found = user.attach(outliving)
        assert found[:4] == b"mine"
        assert address
        assert kernel.stats()["handles"] == 1
        user.revoke(outliving)
        assert kernel.stats()["handles"] == 0
        assert found[:4] == kept[0][:4] == b"mine"
        with pytest.raises(InvalidHandle, match="revoked"):
            user.revoke(outliving)


def test_time_ends_a_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "TICK", 0.02)
    with realmap.Kernel() as kernel, realmap.connect(kernel.path) as me:
        buffer = me.map(PAGE)
        handle = me.share(buffer, seconds=0.05)
        wait_until(lambda: not len(kernel.handles))
        with pytest.raises(InvalidHandle, match="expired"):
            me.attach(handle)
        assert buffer.refcount == 1
        long = me.share(buffer, seconds=3600)
        assert me.attach(long)[:] == buffer[:]


def test_only_its_maker_revokes(me: Process, other: Process, buffer: realmap.Buffer) -> None:
    handle = me.share(buffer)
    with pytest.raises(AccessDenied, match="process"):
        other.revoke(handle)
    assert other.attach(handle)[:] == buffer[:]


def test_a_handle_holds_what_nobody_maps(kernel: KernelHandle, me: Process) -> None:
    buffer = me.map(3 * PAGE)
    buffer[:3] = b"abc"
    handle = me.share(buffer)
    buffer.unmap()
    snapshot = kernel.snapshot()
    assert [frames.refcount for frames in snapshot.frames] == [1]
    assert snapshot.frames[0].holders[0].startswith("handle ")
    assert [(found.length, found.uses) for found in snapshot.handles] == [(3 * PAGE, None)]
    assert handle.token not in repr(snapshot)
    assert kernel.audit()
    assert me.attach(handle)[:3] == b"abc"
    me.revoke(handle)


def test_it_can_be_printed_read_and_pickled(me: Process, other: Process, buffer: realmap.Buffer) -> None:
    handle = me.share(buffer)
    for again in (Handle.parse(str(handle)), pickle.loads(pickle.dumps(handle)), Handle.parse(f"  {handle}\n")):
        assert again == handle
        assert other.attach(again)[:] == buffer[:]
    assert handle.token not in repr(handle)
    assert len({me.share(buffer).token for _ in range(50)}) == 50


def forged(handle: Handle) -> list[Handle | str]:
    """Near misses."""
    flipped = "".join("0" if letter != "0" else "1" for letter in handle.token)
    return [
        Handle(handle.path, flipped, handle.length, handle.rights),
        Handle(handle.path, handle.token[:-1], handle.length, handle.rights),
        Handle(handle.path, "", handle.length, handle.rights),
        Handle(handle.path + ".other", handle.token, handle.length, handle.rights),
        "realmap:zz:1:1@/x",
        f"realmap:{handle.token}:1:16@{handle.path}",
        f"realmap:{handle.token}:{'9' * 5000}:1@{handle.path}",
        "",
        str(handle)[:-5].replace("realmap:", "realmap"),
    ]


def test_what_is_no_handle(me: Process, other: Process, buffer: realmap.Buffer) -> None:
    handle = me.share(buffer)
    for wrong in forged(handle):
        with pytest.raises(InvalidHandle):
            other.attach(wrong)
    for odd in (None, 3, b"realmap:"):
        with pytest.raises(TypeError):
            other.attach(odd)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            me.revoke(odd)  # type: ignore[arg-type]
    # Length and rights of a handle are only told; the kernel knows them.
    stretched = Handle(handle.path, handle.token, 1 << 40, handle.rights)
    assert len(other.attach(stretched)) == len(buffer)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((5 * PAGE, None), InvalidSize),
        ((0, 5 * PAGE + 1), InvalidSize),
        ((4 * PAGE, PAGE + 1), InvalidSize),
        ((0, 0), InvalidSize),
        ((-1, 1), InvalidSize),
        ((1 << 63, 1), InvalidSize),
        (("x", 1), TypeError),
    ],
)
def test_beyond_what_was_shared(
    kernel: KernelHandle, me: Process, other: Process, buffer: realmap.Buffer, arguments: Any, error: type[Exception]
) -> None:
    handle = me.share(buffer, uses=1)
    with pytest.raises(error):
        other.attach(handle, *arguments)
    assert other.attach(handle)[:] == buffer[:]  # a failure is no use
    assert kernel.audit()


def test_what_cannot_be_shared(kernel: KernelHandle, me: Process, other: Process, buffer: realmap.Buffer) -> None:
    with pytest.raises(realmap.InvalidAddress, match="another Process"):
        other.share(buffer)
    private = me.map(PAGE, type=realmap.MemoryType.NORMAL)
    with pytest.raises(realmap.InvalidMemState):
        me.share(private)
    gone = me.map(PAGE)
    gone.unmap()
    with pytest.raises(realmap.InvalidAddress):
        me.share(gone)
    for wrong in ({"uses": 0}, {"uses": -1}, {"seconds": 0}, {"seconds": -1.0}, {"seconds": float("inf")}):
        with pytest.raises(InvalidSize):
            me.share(buffer, **wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        me.share(b"bytes")  # type: ignore[arg-type]
    assert kernel.stats()["handles"] == 0


def test_a_limit_of_handles() -> None:
    with realmap.boot(limits=Limits(handles=2)) as kernel, kernel.connect() as me:
        buffer = me.map(PAGE)
        handles = [me.share(buffer) for _ in range(2)]
        with pytest.raises(realmap.LimitReached, match="2 handles"):
            me.share(buffer)
        me.revoke(handles[0])
        me.share(buffer)


def test_many_segments_and_huge_frames(kernel: KernelHandle, me: Process, other: Process) -> None:
    with me.map(300 * PAGE, fragment=PAGE) as buffer:
        buffer[:] = os.urandom(300 * PAGE)
        with other.attach(me.share(buffer), 70 * PAGE + 5, 150 * PAGE) as found:
            assert found[:] == buffer[70 * PAGE + 5 : 220 * PAGE + 5]
            assert kernel.audit()
    with me.map(4 << 20, huge=True) as large:
        large[3 << 20] = 7
        with other.attach(me.share(large), (3 << 20) - 10, 20) as found:
            assert found[10] == 7
            if large.huge:
                assert found.huge == large.huge
            assert kernel.audit()


def test_a_crowd(kernel: KernelHandle, me: Process, buffer: realmap.Buffer) -> None:
    """Processes that attach, write their own byte and are killed: the others' bytes stay, and nothing else does."""
    handle = me.share(buffer)

    def work(number: int) -> Callable[[Process], None]:
        def run(them: Process) -> None:
            them.attach(handle)[number] = 200 + number
            if number % 2:
                os.kill(os.getpid(), 9)

        return run

    crowd = [kernel.spawn(work(number)) for number in range(4)]
    assert [child.join(60) for child in crowd] == [0, -9, 0, -9]
    assert buffer[:4] == bytes([200, 201, 202, 203])
    wait_until(lambda: buffer.refcount == 2)


def test_what_a_peer_does_to_its_descriptor_changes_nobody_elses(
    me: Process, other: Process, buffer: realmap.Buffer
) -> None:
    """O_APPEND on a shared open file description would have the kernel write elsewhere, for everybody."""
    request = messages.Attach(other._own_client.next_id(), me.share(buffer).token, 0, None, None)
    place, answer = other._own_client.request(request)
    fd = answer.descriptors[0]
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_APPEND)
    size = os.fstat(fd).st_size
    me.call("poke", buffer, b"here", 3)
    assert buffer[3:7] == b"here"
    assert os.fstat(fd).st_size == size
    other._own_client.request(messages.Unmap(other._own_client.next_id(), place[0], place[1]))
