"""Calls: arguments, answers, errors, buffers, threads, timeouts."""

from __future__ import annotations

import asyncio
import datetime
import enum
import gc
import hashlib
import math
import os
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest
from conftest import BOUND, PAGE, in_threads, wait_until

import realmap
from realmap import (
    AccessDenied,
    InvalidAddress,
    InvalidMemState,
    InvalidRights,
    InvalidSize,
    KernelHandle,
    MemoryType,
    Process,
    SyscallFailed,
    SyscallTimeout,
    UnknownSyscall,
)
from realmap.observe.control import Control

CARRIERS = ("ring", "socket")


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ---- arguments and answers ----------------------------------------------------------------


PLAIN: list[Any] = [
    None,
    True,
    0,
    -(1 << 63),
    (1 << 64) - 1,
    1.5,
    math.inf,
    "",
    "ünïcode \0 text",
    b"",
    bytes(range(256)),
    [],
    [1, [2, [3]]],
    {"a": {"b": [None]}},
    {"1": 2},
]


def test_plain_values_travel_both_ways(me: Process) -> None:
    for value in PLAIN:
        assert me.call("echo", value, [value]) == [value, [value]]


def test_bytearrays_travel_as_bytes_and_tuples_as_lists(me: Process) -> None:
    assert me.call("echo", bytearray(b"x"), (1, (2,))) == [b"x", [1, [2]]]


def test_a_name_may_be_of_a_kind_of_text(me: Process) -> None:
    name = enum.StrEnum("Name", ["echo"]).echo
    assert me.call(name, 1) == [1] == asyncio.run(me.acall(name, 1))


def test_buffers_travel_as_address_and_length_wherever_they_stand(me: Process) -> None:
    buffer = me.map(3 * PAGE)
    part = buffer.slice(PAGE + 1, 7)
    assert me.call("echo", part) == [[buffer.address + PAGE + 1, 7]]


@pytest.mark.parametrize("value", [object(), 1 << 64, -(1 << 63) - 1, {1, object()}, np.zeros(3), lambda: 0, [print]])
def test_arguments_that_cannot_travel(me: Process, value: Any) -> None:
    with pytest.raises(TypeError, match=r"travel|argument"):
        me.call("echo", value)
    assert me.call("nop") is None


def nested(depth: int) -> list[Any]:
    """Lists within one another, that many."""
    found: list[Any] = []
    for _ in range(depth - 1):
        found = [found]
    return found


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({1: 2}, "make it one"),
        ([{"x": {None: 1}}], "make it one"),
        (datetime.datetime.now(datetime.UTC), "isoformat"),
        (nested(100), "flatter"),
        (nested(100_000), "flatter"),
    ],
)
def test_what_a_kernel_would_not_read_is_said_at_the_call(me: Process, value: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        me.call("echo", value)
    assert me.call("echo", nested(60)) == [nested(60)]


def test_what_takes_much_more_memory_than_bytes_is_too_large(me: Process) -> None:
    with pytest.raises(InvalidSize, match="buffer"):
        me.call("echo", [[]] * 100_000)
    assert me.call("echo", list(range(60_000))) == [list(range(60_000))]


def test_an_answer_may_have_keys_that_are_no_text(me: Process) -> None:
    assert me.call("numbered", ["a", "b"]) == {0: "a", 1: "b"}


def test_long_messages_both_ways(me: Process) -> None:
    text = "x" * 1_000_003
    assert me.call("echo", text) == [text]
    assert len(me.call("long_text", 1_000_003)) == 1_000_003
    with pytest.raises(InvalidSize, match="buffer"):
        me.call("echo", bytes(1 << 20))
    with pytest.raises(InvalidSize, match="buffer"):
        me.call("long_text", 1 << 20)
    assert me.call("nop") is None


def test_who_calls(me: Process, kernel: KernelHandle) -> None:
    assert me.call("who") == [os.getpid(), "who", kernel.pid, "realmap-kernel"]


def test_an_unknown_syscall_names_the_known_ones(me: Process) -> None:
    with pytest.raises(UnknownSyscall, match="sha256") as caught:
        me.call("sha512")
    assert caught.value.name == "sha512"
    assert isinstance(caught.value, LookupError)
    with pytest.raises(TypeError):
        me.call(b"nop")  # type: ignore[arg-type]


# ---- handlers that fail -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ValueError", "SystemExit", "KeyboardInterrupt", "KernelPanic"])
def test_a_handler_that_raises_fails_its_call_and_nothing_else(me: Process, kind: str) -> None:
    with pytest.raises(SyscallFailed, match="a reason") as caught:
        me.call("explode", kind, "a reason")
    assert (caught.value.name, caught.value.type, caught.value.text) == ("explode", kind, "a reason")
    assert "raise kinds[kind](text)" in caught.value.traceback
    assert "dispatch.py" not in caught.value.traceback
    assert me.call("nop") is None


def test_an_error_of_ours_reaches_the_caller_as_itself(me: Process) -> None:
    with pytest.raises(InvalidMemState, match="says a handler") as caught:
        me.call("our_error")
    assert (caught.value.address, caught.value.type) == (0x1234, MemoryType.STACK)


def test_an_answer_that_cannot_travel(me: Process) -> None:
    with pytest.raises(SyscallFailed, match="lock cannot travel as the answer of 'unsendable'") as caught:
        me.call("unsendable")
    assert (caught.value.type, caught.value.traceback) == ("TypeError", "")


# ---- buffers ------------------------------------------------------------------------------


@pytest.mark.parametrize("fragment", [None, PAGE, 3 * PAGE])
def test_a_digest_in_place(me: Process, fragment: int | None) -> None:
    buffer = me.map(33333, fragment=fragment)
    content = os.urandom(33333)
    buffer[:] = content
    for offset, length in [(0, 1), (PAGE - 1, 2), (5, 3333), (0, 33333), (33332, 1)]:
        for name in ("sha256", "slow_sha256"):
            found = me.call(name, buffer.slice(offset, length))
            assert found == sha(content[offset : offset + length]), (name, offset, length)


def test_a_mirror_is_the_users_own_bytes(me: Process) -> None:
    buffer = me.map(PAGE + 9, fragment=PAGE)
    buffer[:] = content = os.urandom(PAGE + 9)
    address, mirrored, length, before, during = me.call("reverse", buffer.slice(PAGE - 3, 10), 1, 7)
    assert buffer[:] == content[: PAGE - 2] + content[PAGE - 2 : PAGE + 5][::-1] + content[PAGE + 5 :]
    assert (address, length, before, during) == (buffer.address + PAGE - 3, 7, 1, 2)
    assert mirrored % PAGE == (address + 1) % PAGE
    assert mirrored >= 0x3000_0000_0000


def test_copies(me: Process) -> None:
    source, target = me.map(9999, fragment=PAGE), me.map(9999)
    source[:] = content = os.urandom(9999)
    assert me.call("copy", source, target) == 9999
    assert target[:] == content
    assert me.call("peek", source, 5, PAGE - 2) == content[PAGE - 2 : PAGE + 3]
    assert me.call("peek", source, None, 9998) == content[9998:]
    assert me.call("peek", source, 0, 9999) == b""
    me.call("poke", target.slice(10, 100), b"abc", 97)
    assert target[105:112] == content[105:107] + b"abc" + content[110:112]


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 101), (100, 1), (1, 100), (101, None), (1 << 63, 1 << 63), (-1, 5), (0, -1)]
)
def test_ranges_beyond_the_buffer(me: Process, offset: int, length: int | None) -> None:
    buffer = me.map(100)
    for name, args in [
        ("peek", (buffer, length, offset)),
        ("mirror_with", (buffer, 3, offset, length)),
        ("poke", (buffer, b"x" * 101, 0)),
    ]:
        with pytest.raises(InvalidSize):
            me.call(name, *args)


@pytest.mark.parametrize(
    ("rights", "may_read", "may_write"),
    [(realmap.u_r, True, False), (realmap.u_rw, True, True), (realmap.u_w, False, True)],
)
def test_the_callers_rights_are_enforced(
    me: Process, rights: realmap.MappingAccessRights, may_read: bool, may_write: bool
) -> None:
    buffer = me.map(100, rights=rights)

    def allowed(name: str, *args: Any) -> bool:
        try:
            me.call(name, buffer, *args)
        except AccessDenied as error:
            assert error.allowed == rights
            assert error.address == buffer.address
            return False
        return True

    assert allowed("peek", 5, 0) == may_read
    assert allowed("poke", b"x", 0) == may_write
    assert allowed("mirror_with", 1, 0, None) == may_read
    assert allowed("mirror_with", 2, 0, None) == may_write
    assert allowed("mirror_with", 3, 0, None) == (may_read and may_write)
    assert allowed("mirror_with", 3, 1, 9) == (may_read and may_write) if rights == realmap.u_rw else True


def test_rights_that_no_mirror_has(me: Process) -> None:
    buffer = me.map(100)
    for rights, error in [(5, AccessDenied), (11, AccessDenied), (0, InvalidRights), (64, InvalidRights)]:
        with pytest.raises(error):
            me.call("mirror_with", buffer, rights, 0, None)


def test_private_memory_is_never_mirrored(me: Process) -> None:
    buffer = me.map(PAGE, type=MemoryType.NORMAL)
    buffer[0:3] = b"own"
    for name, args in [("sha256", ()), ("peek", (1, 0)), ("poke", (b"x", 0)), ("access", ())]:
        with pytest.raises(InvalidMemState) as caught:
            me.call(name, buffer, *args)
        assert caught.value.type is MemoryType.NORMAL


def test_a_buffer_is_good_until_its_call_ends(me: Process) -> None:
    buffer = me.map(100)
    me.call("keep_buffer", buffer)
    with pytest.raises(InvalidAddress, match="ended"):
        me.call("use_kept_buffer")


def test_unmapped_and_foreign_buffers(me: Process, kernel: KernelHandle) -> None:
    buffer = me.map(100)
    part = buffer.slice(5, 5)
    buffer.unmap()
    for gone in (buffer, part):
        with pytest.raises(InvalidAddress, match="unmapped"):
            me.call("sha256", gone)


def test_buffers_of_another_process_are_called_with_by_that(me: Process, kernel: KernelHandle) -> None:
    mine = me.map(100)
    with kernel.connect() as other, realmap.boot() as elsewhere, elsewhere.connect() as stranger:
        theirs = other.map(100)
        assert me.call("sha256", theirs) == me.call("sha256", data=theirs) == sha(bytes(100))
        assert asyncio.run(me.acall("echo", theirs)) == [[theirs.address, 100]]
        for several in ([mine, theirs], [theirs, mine], [stranger.map(100)]):
            with pytest.raises(InvalidAddress, match=r"buffer\.process\.call"):
                me.call("echo", *several)
        with pytest.raises(realmap.WrongArguments) as wrong:
            me.call("sha256", theirs, 1, 2)
        assert wrong.value.__context__ is None  # that it was another one's is not told
        other.close()
        with pytest.raises(InvalidAddress, match="unmapped"):
            me.call("echo", theirs)


def test_dropping_under_a_view_in_a_handler(me: Process) -> None:
    buffer = me.map(100)
    said, alive = me.call("drop_with_view", buffer)
    assert "still live" in said
    assert (buffer[0], alive) == (77, False)


def test_access_from_another_process_is_a_mirror(me: Process) -> None:
    buffer = me.map(100)
    kind, address, live = me.call("access", buffer)
    assert (kind, live) == ("CrossProcessMapping", 1)
    assert address >= 0x3000_0000_0000
    assert buffer[0] == 1


# ---- threads, timeouts, Ctrl-C ------------------------------------------------------------


def test_blocking_handlers_let_others_go_on(me: Process) -> None:
    slow = threading.Thread(target=me.call, args=("sleep", 0.3))
    start = time.monotonic()
    slow.start()
    for _ in range(20):
        me.call("nop")
    assert slow.is_alive() or time.monotonic() - start > 0.3
    slow.join()


def test_one_process_from_many_threads(me: Process) -> None:

    def work(seed: int) -> None:
        for turn in range(40):
            with me.map(1000 + seed) as buffer:
                buffer[:] = content = os.urandom(1000 + seed)
                name = "slow_sha256" if turn % 3 == 0 else "sha256"
                assert me.call(name, buffer) == sha(content)
                assert me.call("echo", "x" * (70_000 if turn % 10 == 0 else 5), seed)[1] == seed

    in_threads(6, work)


def given_up(me: Process, name: str, buffer: realmap.Buffer) -> SyscallTimeout:
    """How a call of `late_mirror` ended whose handler has begun. Where it came too late for that, another one."""
    while True:
        with pytest.raises(SyscallTimeout, match="late_mirror") as caught:
            me.call("late_mirror", name, buffer, timeout=0.05)
        with Control(me.path) as control:
            wait_until(lambda: me.call("state", name) == "waiting" or not control.stats()["running"], "its handler")
        if me.call("state", name) == "waiting":
            return caught.value


def test_a_timeout_abandons_the_call_and_its_buffer_is_held(me: Process, kernel: KernelHandle) -> None:
    buffer = me.map(5000)
    buffer[:] = content = os.urandom(5000)
    error = given_up(me, "timeout", buffer)
    assert (error.name, error.timeout) == ("late_mirror", 0.05)
    assert isinstance(error, TimeoutError)
    buffer.unmap()
    assert kernel.stats()["segments"] == 1
    me.call("go")
    wait_until(lambda: me.call("state", "timeout") != "waiting")
    assert me.call("state", "timeout") == sha(content)
    wait_until(lambda: kernel.stats()["segments"] == 0)


def test_a_buffer_that_is_let_go_is_held_while_its_call_is_abandoned(me: Process) -> None:
    buffer = me.map(500)
    content = bytes(500)
    given_up(me, "collected", buffer)
    del buffer
    assert me.call("state", "collected") == "waiting"
    me.call("go")
    wait_until(lambda: me.call("state", "collected") != "waiting")
    assert me.call("state", "collected") == sha(content)


@pytest.mark.parametrize("timeout", [-1, math.nan])
def test_no_timeouts(me: Process, timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout"):
        me.call("nop", timeout=timeout)


def test_ctrl_c_abandons_the_call(me: Process, kernel: KernelHandle) -> None:
    def interrupt(turn: int) -> None:
        wait_until(lambda: kernel.stats()["running"] > turn, "the call")
        os.kill(os.getpid(), signal.SIGINT)

    for turn in range(3):
        thread = threading.Thread(target=interrupt, args=(turn,))
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            me.call("wait", timeout=BOUND)
        thread.join()
        assert me.call("nop") is None
    assert kernel.stats()["processes"] == 1
    assert kernel.stats()["running"] == 3
    for _ in range(3):
        me.call("go")
    wait_until(lambda: kernel.stats()["running"] == 0)


class Interrupt(BaseException):
    """What a signal handler may raise at any moment, as Ctrl-C does."""


def test_an_interrupt_while_mapping_leaves_nothing(me: Process, kernel: KernelHandle) -> None:
    def interrupt(*_: object) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    seen = 0
    try:
        for turn in range(16):
            mapped = False
            with pytest.raises(Interrupt):
                signal.setitimer(signal.ITIMER_REAL, 0.001 + 0.001 * turn)
                me.map(32 << 20).unmap()
                mapped = True
                wait_until(lambda: False, "the signal")  # no long sleep: another thread may be who takes it
            seen += not mapped
    finally:
        signal.signal(signal.SIGALRM, before)
    assert seen > 3
    gc.collect()
    wait_until(lambda: me.call("nop") is None and kernel.stats()["segments"] == 0, "the end of what was given up")
