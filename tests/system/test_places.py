"""A handler is a handler, wherever it runs: the same calls to a kernel's loop, its workers, a process that serves, a
pool of them, and the caller itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
import placed
import pytest
from conftest import BOUND, PAGE, in_threads, tried_with, wait_until
from forked import in_a_child

import realmap
from realmap import AccessDenied, Buffer, InvalidAddress, InvalidSize, KernelHandle, Process, SyscallFailed
from realmap.user.buffer import UserWindow

#: Where the handlers run: how many processes serve them; "itself": the caller serves.
SERVERS = {"loop": 0, "workers": 0, "process": 1, "pool": 3, "itself": 0}
CARRIERS = tuple(SERVERS)
HELD = ("processes", "mappings", "mirrors", "segments", "bytes", "handles")


@pytest.fixture(scope="module")
def kernel(request: pytest.FixtureRequest) -> Iterator[KernelHandle]:
    """A kernel, and whoever serves."""
    where = request.param
    placed.gates.clear()  # of a module that handlers are sent with, and queues cannot travel
    inside = {"loop": placed.HANDLERS, "workers": placed.ON_WORKERS}.get(where, [])
    with realmap.boot(syscalls=inside) as handle:
        servers = [handle.spawn(placed.serve) for _ in range(SERVERS[where])]
        wait_until(lambda: handle.stats()["seats"] == len(servers), "their service")
        handle.itself = where == "itself"  # type: ignore[attr-defined]
        yield handle
        for server in servers:
            server.kill()
            server.join()


def held(kernel: KernelHandle) -> list[int]:
    stats = kernel.stats()
    return [stats[name] for name in HELD]


@pytest.fixture
def me(kernel: KernelHandle) -> Iterator[Process]:
    """This process as a user; afterwards nothing is left of it."""
    kernel.settle(timeout=BOUND)
    before = held(kernel)
    with ExitStack() as stack:
        process = stack.enter_context(kernel.connect())
        if kernel.itself:  # type: ignore[attr-defined]
            stack.enter_context(process.serve(*placed.HANDLERS, threads=2))
        yield process
        report = kernel.audit()
        assert report, str(report)
    wait_until(lambda: held(kernel) == before, "the end of everything that the test had")


def filled(me: Process, length: int, **options: Any) -> Buffer:
    """A buffer of bytes that tell where they are."""
    buffer = me.map(length, **options)
    buffer[:] = random.Random(length).randbytes(length)
    return buffer


def sha(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()


# ---- arguments and answers ----------------------------------------------------------------


def test_values_travel_both_ways(me: Process) -> None:
    values = [None, True, -(1 << 63), (1 << 64) - 1, 1.5, "täxt", b"\0\xff", [1, [2, {"x": None}]], {"a": [b""]}]
    assert me.call("echo", *values) == [values, {}]
    assert me.call("echo", first=1, second=[2]) == [[], {"first": 1, "second": [2]}]
    assert me.call("echo", np.int16(3), (1, 2)) == [[3, [1, 2]], {}]


def test_arguments_by_keyword_and_their_types(me: Process) -> None:
    buffer = me.map(123)
    assert me.call("typed", buffer, 5) == [123, 5, "none"]
    assert me.call("typed", count=5, name="some", data=buffer) == [123, 5, "some"]
    for args, kwargs in [((buffer,), {}), ((buffer, "five"), {}), ((5, 5), {}), ((buffer, 5), {"other": 1})]:
        with pytest.raises(realmap.WrongArguments):
            me.call("typed", *args, **kwargs)


@pytest.mark.parametrize("value", [{1}, 1 << 64, object(), 1j, {1: 2}])
def test_what_cannot_travel_is_a_type_error(me: Process, value: Any) -> None:
    with pytest.raises(TypeError):
        me.call("echo", value)
    assert me.call("nop") is None


def test_what_nobody_serves_is_unknown(me: Process) -> None:
    for _ in range(2):
        with pytest.raises(realmap.UnknownSyscall, match="nobody_has_this") as caught:
            me.call("nobody_has_this", me.map(10))
        assert caught.value.name == "nobody_has_this"
    for odd in (None, 5, b"nop", ["nop"]):
        with pytest.raises(TypeError, match="str"):
            me.call(odd)  # type: ignore[arg-type]
    for odd in ("", "x" * 10_000):
        with pytest.raises(realmap.UnknownSyscall):
            me.call(odd)


def test_a_handler_knows_who_calls(me: Process, kernel: KernelHandle) -> None:
    pid, uid, name, where, cancelled, has_deadline = me.call("who")
    assert (pid, uid, name, cancelled, has_deadline) == (os.getpid(), os.getuid(), "who", False, False)
    assert me.call("who", timeout=BOUND)[-1] is True
    if kernel.itself:  # type: ignore[attr-defined]
        assert where == os.getpid()
    else:
        assert where != os.getpid()


def test_errors_arrive(me: Process) -> None:
    with pytest.raises(SyscallFailed, match="a reason") as caught:
        me.call("explode", "ValueError")
    assert caught.value.name == "explode"
    assert caught.value.type == "ValueError"
    assert "in explode" in caught.value.traceback
    with pytest.raises(SyscallFailed, match="SystemExit"):
        me.call("explode", "SystemExit")
    with pytest.raises(realmap.InvalidHandle, match="one of ours") as ours:
        me.call("explode", "ours")
    assert ours.value.facts() == realmap.InvalidHandle("odd").facts()
    with pytest.raises(SyscallFailed, match="cannot travel"):
        me.call("unsendable")
    assert me.call("nop") is None


def test_long_messages(me: Process) -> None:
    data = os.urandom(300_001)
    assert me.call("echo", data) == [[data], {}]
    with pytest.raises(InvalidSize, match="1048576"):
        me.call("long_text", 1 << 20)
    with pytest.raises(InvalidSize, match="1048576"):
        me.call("echo", bytes(1 << 20))
    assert me.call("nop") is None


# ---- buffers ------------------------------------------------------------------------------


RANGES = [(0, 1), (5, 100), (0, PAGE), (1, PAGE), (PAGE - 1, 2), (PAGE, 3 * PAGE), (17, 5 * PAGE + 3), (0, 100_001)]


@pytest.mark.parametrize("fragment", [None, PAGE, 3 * PAGE])
def test_a_mirror_shows_the_callers_bytes_and_no_others_change(me: Process, fragment: int | None) -> None:
    for offset, length in RANGES:
        with tried_with(offset, length), filled(me, 100_001, fragment=fragment) as buffer:
            before = buffer[:]
            part = buffer.slice(offset, length)
            assert me.call("digest", part) == sha(before[offset : offset + length])
            assert me.call("reverse", part) == length
            after = before[:offset] + before[offset : offset + length][::-1] + before[offset + length :]
            assert buffer[:] == after
            me.call("fill", part, 9)
            assert buffer[:] == before[:offset] + b"\x09" * length + before[offset + length :]


def test_a_part_of_a_buffer_by_the_handler(me: Process) -> None:
    buffer = filled(me, 30_000)
    before = buffer[:]
    part = buffer.slice(100, 20_000)
    assert me.call("digest", part, 5_000, 9_999) == sha(before[5_100:15_099])
    assert me.call("reverse", part, length=PAGE + 1, offset=1) == PAGE + 1
    assert buffer[:] == before[:101] + before[101 : 102 + PAGE][::-1] + before[102 + PAGE :]
    for offset, length in [(20_001, 1), (0, 20_001), (19_999, 2), ((1 << 64) - 1, 1), (-1, 1)]:
        with pytest.raises(InvalidSize):
            me.call("digest", part, offset, length)
    with pytest.raises(InvalidSize):
        me.call("digest", part, 0, 0)


def test_more_fragments_than_one_message_has_descriptors(me: Process) -> None:
    buffer = filled(me, 150 * PAGE - 7, fragment=PAGE)
    before = buffer[:]
    assert me.call("digest", buffer) == sha(before)
    assert me.call("digest", buffer.slice(70 * PAGE - 1, PAGE + 2)) == sha(before[70 * PAGE - 1 : 71 * PAGE + 1])
    assert me.call("peek", buffer.slice(64 * PAGE - 3, 6)) == before[64 * PAGE - 3 : 64 * PAGE + 3]


def test_copies(me: Process) -> None:
    buffer = filled(me, 50_000, fragment=PAGE)
    before = buffer[:]
    part = buffer.slice(3, 40_000)
    assert me.call("peek", part) == before[3:40_003]
    assert me.call("peek", part, 5, PAGE - 4) == before[PAGE - 1 : PAGE + 4]
    assert me.call("peek", part, 0, 40_000) == b""
    me.call("poke", part, b"across a page", PAGE - 8)
    assert buffer[:] == before[: PAGE - 5] + b"across a page" + before[PAGE + 8 :]
    for name, args in [("peek", (1, 40_000)), ("poke", (b"xy", 39_999)), ("peek", (-1, 0))]:
        with pytest.raises(InvalidSize):
            me.call(name, part, *args)


def test_arrays_and_access(me: Process) -> None:
    buffer = me.map(8 * 5_000 + 64)
    values = np.asarray(buffer.slice(32, 40_000)).view("float64")
    values[:] = np.arange(5_000)
    assert me.call("scale", buffer.slice(32, 40_000), 2.0) == 2.0 * sum(range(5_000))
    assert values[-1] == 2.0 * 4_999
    del values
    small = buffer.slice(PAGE - 2, 4)
    small[:] = b"\x01\x02\x03\xff"
    assert me.call("access", small) == 4
    assert small[:] == b"\x02\x03\x04\x00"


def test_several_buffers_are_each_their_own(me: Process) -> None:
    buffers = [filled(me, length) for length in (10, PAGE, 20_001)]
    parts = {"x": [buffers[1], {"y": buffers[2].slice(5, 7)}]}
    assert me.call("echo", buffers[0], parts, 1) == [[10, {"x": [PAGE, {"y": 7}]}, 1], {}]
    target = me.map(20_001)
    assert me.call("copy", source=buffers[2], target=target) == 20_001
    assert target[:] == buffers[2][:]
    assert me.call("copy", target.slice(0, 5), target.slice(7, 5)) == 5
    assert target[7:12] == target[0:5]
    assert me.call("two_mirrors", target, PAGE + 5) == b"\x01\x02"
    assert target[PAGE + 4 : PAGE + 6] == b"\x01\x02"


def test_one_window_over_several_mappings(me: Process) -> None:
    first, second = filled(me, 3 * PAGE), filled(me, 5 * PAGE, fragment=2 * PAGE)
    if second.address < first.address:
        first, second = second, first
    assert first.address + len(first) == second.address
    windows = (*first._windows, *second._windows)
    assert all(isinstance(window, UserWindow) for window in windows)
    both = Buffer._over(windows, first.address + 5, 6 * PAGE, 1)
    both.process, both.rights = me, realmap.u_rw
    before = first[5:] + second[: 3 * PAGE + 5]
    assert me.call("digest", both) == sha(before)
    assert me.call("reverse", both) == 6 * PAGE
    assert first[5:] + second[: 3 * PAGE + 5] == before[::-1]
    assert me.call("peek", both, 6, 3 * PAGE - 8) == before[::-1][3 * PAGE - 8 : 3 * PAGE - 2]


@pytest.mark.parametrize(
    ("rights", "may_read", "may_write"),
    [(realmap.u_r, True, False), (realmap.u_rw, True, True), (realmap.u_w, False, True)],
)
def test_rights_are_the_callers(
    me: Process, rights: realmap.MappingAccessRights, may_read: bool, may_write: bool
) -> None:
    buffer = me.map(2 * PAGE + 3, rights=rights)

    def allowed(name: str, part: Buffer, *args: Any) -> bool:
        try:
            me.call(name, part, *args)
        except AccessDenied as error:
            assert error.allowed == rights
            return False
        return True

    for part in (buffer, buffer.slice(7, PAGE), buffer.slice(0, PAGE)):
        assert allowed("peek", part, 5, 0) == may_read
        assert allowed("poke", part, b"x", 0) == may_write
        assert allowed("mirror_with", part, 1) == may_read
        assert allowed("mirror_with", part, 2) == may_write
        assert allowed("fill", part, 3) == may_write
        assert allowed("mirror_with", part, 3) == (may_read and may_write)
    for odd, error in [(5, AccessDenied), (11, AccessDenied), (0, realmap.InvalidRights), (64, realmap.InvalidRights)]:
        with pytest.raises(error):
            me.call("mirror_with", buffer, odd)


def test_what_a_handler_leaves_mapped_is_there_and_then_gone(me: Process, kernel: KernelHandle) -> None:
    buffer = me.map(30_000)
    part = buffer.slice(PAGE - 1, 9_000)
    assert me.call("leave_mapped", part) == 9_000
    assert (buffer[PAGE - 2], part[0]) == (0, 77)
    assert "still live" in me.call("drop_under_view", part)
    buffer.unmap()
    wait_until(lambda: kernel.stats()["mirrors"] == 0)


def test_bytes_that_are_gone(me: Process) -> None:
    name = f"placed.{os.getpid()}"
    buffer = filled(me, 4 * PAGE, name=name)
    before = buffer[: 2 * PAGE]
    os.truncate(f"/dev/shm/{name}", 2 * PAGE)
    assert me.call("digest", buffer, 0, 2 * PAGE) == sha(before)
    for part in (buffer, buffer.slice(3, 3 * PAGE), buffer.slice(2 * PAGE, PAGE)):
        for call, args in [("digest", ()), ("peek", ()), ("reverse", ())]:
            with pytest.raises(realmap.MemoryFault):
                me.call(call, part, *args)
    assert me.call("digest", buffer.slice(5, PAGE)) == sha(before[5 : PAGE + 5])
    assert me.call("nop") is None


def test_private_unmapped_foreign_and_kept_buffers(me: Process, kernel: KernelHandle) -> None:
    private = me.map(PAGE, type=realmap.MemoryType.NORMAL)
    for name in ("digest", "peek", "access"):
        with pytest.raises(realmap.InvalidMemState):
            me.call(name, private)
    buffer = me.map(100)
    part = buffer.slice(5, 5)
    buffer.unmap()
    for gone in (buffer, part):
        with pytest.raises(InvalidAddress, match="unmapped"):
            me.call("digest", [gone])
    with kernel.connect() as other:
        theirs = other.map(100)
        assert me.call("digest", theirs) == sha(theirs[:])  # by that one
        with pytest.raises(InvalidAddress, match="another Process"):
            me.call("digest", [theirs, me.map(100)])
    kept = me.map(100)
    with OneServer(me) as same:
        same.call("keep", kept)
        with pytest.raises(InvalidAddress, match="ended"):
            same.call("use_kept")


class OneServer:
    """One server for what is kept in between; the kernel itself is one."""

    def __init__(self, me: Process) -> None:
        self.me = me

    def __enter__(self) -> Any:
        try:
            self.session: Any = self.me.session("keep")
        except realmap.UnknownSyscall:
            return self.me
        return self.session

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "session"):
            self.session.close()


def test_a_mapping_at_an_address_that_was_lent_before(me: Process) -> None:
    """What is unmapped is nobody's; what comes there is another mapping."""
    for length in (PAGE, 100_000):
        for turn in range(20):
            with me.map(length) as buffer:
                buffer[:3] = bytes([turn, 2, 3])
                assert me.call("peek", buffer, 3) == bytes([turn, 2, 3])
                assert me.call("digest", buffer.slice(0, 3)) == sha(bytes([turn, 2, 3]))


# ---- who waits ----------------------------------------------------------------------------


def test_a_timeout_gives_the_call_up(me: Process) -> None:
    buffer = me.map(PAGE)
    with OneServer(me) as same:
        began = time.monotonic()
        with pytest.raises(realmap.SyscallTimeout, match="within"):
            same.call("wait", "given up", buffer, timeout=0.1)
        assert 0.09 < time.monotonic() - began < BOUND / 2
        same.call("go", "given up")
        with suppress(realmap.SyscallTimeout):  # the handler may notice first
            same.call("until_cancelled", "cancelled", timeout=0.5)
        assert same.call("wait", "cancelled", timeout=BOUND) == "cancelled"
    for odd in (-1, float("nan")):
        with pytest.raises(ValueError, match="seconds"):
            me.call("nop", timeout=odd)


def test_ctrl_c_ends_the_wait(me: Process) -> None:
    with OneServer(me) as same:
        timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            same.call("wait", "interrupted", timeout=BOUND)
        timer.join()
        same.call("go", "interrupted")
        assert same.call("echo", 1) == [[1], {}]


def test_many_threads(me: Process) -> None:
    def work(number: int) -> None:
        buffer = filled(me, 5_000 + number)
        for turn in range(20):
            assert me.call("echo", number, turn) == [[number, turn], {}]
            assert me.call("digest", buffer.slice(turn, 4_000)) == sha(buffer[turn : turn + 4_000])
        buffer.unmap()

    in_threads(6, work)


def test_tasks(me: Process) -> None:
    buffers = [filled(me, 9_000 + number) for number in range(20)]

    async def work(number: int) -> None:
        buffer = buffers[number]
        assert await me.acall("echo", number) == [[number], {}]
        assert await me.acall("digest", data=buffer, offset=number) == sha(buffer[number:])
        with pytest.raises(SyscallFailed):
            await me.acall("explode", "ValueError")
        with pytest.raises(realmap.UnknownSyscall):
            await me.acall("nobody_has_this")

    async def give_up() -> None:
        with suppress(realmap.SyscallTimeout):
            await me.acall("until_cancelled", "a task's", timeout=0.05)

    async def main() -> None:
        await asyncio.wait_for(asyncio.gather(give_up(), *map(work, range(20))), BOUND)

    asyncio.run(main())
    for buffer in buffers:
        buffer.unmap()


def test_a_forked_child_calls_for_itself(me: Process, kernel: KernelHandle) -> None:
    if kernel.itself:  # type: ignore[attr-defined]
        pytest.skip("the child serves nothing")
    buffer = filled(me, 20_000)
    assert me.call("digest", buffer) == sha(buffer)

    def work() -> None:
        assert me.call("who", timeout=BOUND)[0] == os.getpid()
        assert me.call("digest", buffer.slice(1, 10_000), timeout=BOUND) == sha(buffer[1:10_001])

    in_a_child(work)
    assert me.call("digest", buffer) == sha(buffer)
