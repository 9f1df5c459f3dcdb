"""What a snapshot tells: limits and their use, calls by name, bytes by kind; as JSON; of another version. And logs."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
import syscalls
from conftest import BOUND, PAGE, wait_until

import realmap
from realmap import Kernel, KernelHandle, VersionMismatch
from realmap.kernel import snapshots
from realmap.memory import MemoryType, OwnedFrames
from realmap.observe.control import Control
from realmap.observe.snapshot import FORM, Snapshot
from realmap.serving import logs
from realmap.wire import messages
from realmap.wire.records import CallInfo

SIZE = 3 * PAGE


@pytest.fixture
def limited() -> Iterator[KernelHandle]:
    limits = realmap.Limits(
        processes=7, mappings=8, segments=9, calls=10, handles=11, running=12, seconds=13.5, connections=14
    )
    options = {"memory_limit": 64 * PAGE, "process_limit": 32 * PAGE, "kernel_land": 1 << 30, "lazy_unmap": 1 << 16}
    with realmap.boot(syscalls=syscalls.ALL, limits=limits, **options) as kernel:
        yield kernel


def test_limits_are_told_as_they_are_in_force(limited: KernelHandle) -> None:
    found = limited.snapshot().limits
    assert msgspec.structs.asdict(found) == {
        "processes": 7,
        "mappings": 8,
        "segments": 9,
        "calls": 10,
        "handles": 11,
        "running": 12,
        "seconds": 13.5,
        "memory_limit": 64 * PAGE,
        "process_limit": 32 * PAGE,
        "kernel_land": 1 << 30,
        "lazy_unmap": 1 << 16,
        "connections": 14,
        "half_sent": 8 << 20,
        "unread": 32 << 20,
        "undecoded": 16 << 20,
        "buffers": 1024,
        "given_up": 64,
        "orphans": 4096,
        "inheritances": 256,
        "reserve": 32,
        "stock": 2 << 20,
        "seats": 64,
        "sessions": 256,
        "grants": 4096,
    }
    with realmap.boot() as plain:
        found = plain.snapshot().limits
        assert (found.memory_limit, found.process_limit, found.seconds, found.lazy_unmap) == (None, None, None, 0)
        assert found.segments > 100


def test_calls_and_bytes_are_counted_by_kind(limited: KernelHandle) -> None:
    before = limited.stats()
    with limited.connect() as me, me.map(SIZE) as one, me.map(SIZE, fragment=PAGE) as two:
        for buffer, times in ((one, 3), (two, 2)):
            for _ in range(times):
                me.call("sha256", buffer.slice(1, SIZE - 1))
            me.call("slow_sha256", buffer)
        me.call("copy", one, two)
        assert me.call("peek", one, 100, 7) == bytes(100)
        for name, arguments in (("explode", ("ValueError", "x")), ("sha256", (5,)), ("nothing", ())):
            with pytest.raises(realmap.KernelError):
                me.call(name, *arguments)
        with pytest.raises(realmap.KernelError):  # before its handler began
            me._client.request(messages.Call(me._client.next_id(), "sha256", [messages.buffer_ext(16, 1)]))
        handle = me.share(one)
        taken = limited.snapshot()
        (process,) = taken.processes
        assert handle
    calls = {each.name: (each.count, each.failed) for each in taken.calls if each.count}
    assert calls == {
        "sha256": (7, 2), "slow_sha256": (2, 0), "copy": (1, 0), "peek": (1, 0), "explode": (1, 1)
    }  # fmt: skip
    done = {name: taken.stats[name] - before[name] for name in before}
    assert (done["calls"], done["failed"]) == (12, 3)
    assert (done["mirrored"], done["mirrored_bytes"]) == (7, 5 * (SIZE - 1) + 2 * SIZE)
    assert (done["copied_in"], done["copied_in_bytes"]) == (2, SIZE + 100)
    assert (done["copied_out"], done["copied_out_bytes"]) == (1, SIZE)
    assert (process.bytes, process.limit, len(process.mappings)) == (2 * SIZE, 32 * PAGE, 2)
    assert [each.maker for each in taken.handles] == [process.number]


def test_calls_on_worker_threads_are_named(kernel: KernelHandle, me: realmap.Process) -> None:
    assert kernel.snapshot().running == []
    with me.map(SIZE) as buffer, ThreadPoolExecutor(1) as pool:
        call = pool.submit(me.call, "hold", "named", buffer)
        wait_until(lambda: me.call("state", "named") == "waiting", "the handler")
        taken = kernel.snapshot()
        (running,), (process,) = taken.running, taken.processes
        assert (running.process, running.syscall) == (process.number, "hold")
        assert running.seconds is not None
        assert 0 <= running.seconds < BOUND
        assert taken.running_by_process() == {process.number: ["hold"]}
        me.call("go")
        call.result(BOUND)
    assert kernel.snapshot().running == []


def test_the_same_as_json_and_back(limited: KernelHandle) -> None:
    with limited.connect() as me, me.map(SIZE, fragment=PAGE) as buffer:
        me.call("keep", "json", buffer)
        me.call("sha256", buffer.slice(0, 10))
        handle = me.share(buffer, uses=3, seconds=100)
        taken = limited.snapshot()
        assert handle
    text = msgspec.json.encode(taken)
    assert json.loads(text)["processes"][0]["mappings"][0]["type"] == "HEAP"
    assert msgspec.json.decode(text, type=Snapshot) == taken
    assert taken.form == FORM == 10
    assert taken.mirrors[0].parts[0].frames == taken.frames[0].serial
    assert taken.frames[0].refcount == len(taken.frames[0].holders) == 3
    assert taken.handles[0].uses == 3


@pytest.mark.parametrize("books", [{"form": 3}, {"form": FORM + 1, "pid": 1}, {}, None, [1]])
def test_one_of_another_version_is_refused_in_a_line(books: object) -> None:
    with pytest.raises(VersionMismatch, match="another version") as caught:
        Snapshot.read(books)
    assert "\n" not in str(caught.value)


@realmap.syscall
def fill(call: realmap.Call, count: int) -> None:
    """Has its caller have so many mappings in the books."""
    memory = call.process.memory
    for index in range(count):
        frames = OwnedFrames(PAGE)
        memory.create_regular_mapping(memory.start + index * PAGE, PAGE, MemoryType.NORMAL, realmap.u_rw, frames=frames)


def test_one_that_is_longer_than_a_message_may_be() -> None:
    @realmap.syscall
    def books(call: realmap.Call) -> int:
        assert isinstance(call.kernel, Kernel)
        (process,) = Snapshot.read(msgspec.msgpack.decode(b"".join(call.kernel._picture().written()))).processes
        return len(process.mappings)

    with Kernel(syscalls=[fill, books]) as kernel, realmap.connect(kernel.path) as me, Control(kernel.path) as control:
        me.call("fill", 60_000)
        with ThreadPoolExecutor(4) as pool:
            taken = [pool.submit(control.snapshot) for _ in range(4)]
            assert me.call("books") == 60_000
            for each in taken:
                (process,) = each.result(BOUND).processes
                assert [mapping.type for mapping in process.mappings] == ["NORMAL"] * 60_000


def test_a_kernel_that_ends_in_the_middle_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless:
        def written(self) -> Iterator[bytes]:
            while True:
                yield b"x"

    monkeypatch.setattr(snapshots, "SLICE", -1)
    with Kernel() as kernel, Control(kernel.path) as control, ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(kernel.snapshots, "_take", Endless)
        asked = pool.submit(control.snapshot)
        wait_until(lambda: kernel.snapshots._file >= 0, "the file")
        with realmap.connect(kernel.path) as me:  # others are served all the while
            with me.map(PAGE) as buffer:
                assert buffer.refcount == 1
        kernel.stop()
        with pytest.raises(realmap.KernelDied):
            asked.result(BOUND)
        assert kernel.snapshots._file == -1


# ---- logging --------------------------------------------------------------------------------


def test_logging_is_structured_and_left_to_the_program(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "realmap"), Kernel(syscalls=syscalls.ALL) as kernel:
        with realmap.connect(kernel.path):
            pass
        wait_until(lambda: "has ended" in caplog.text)
    about = [record for record in caplog.records if hasattr(record, "user")]
    assert [(record.user, record.user_pid) for record in about] == [(1, os.getpid())] * 2
    assert [record.levelname for record in about] == ["INFO"] * 2


def test_the_kernel_command_says_what_it_is_asked_to(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = str(tmp_path_factory.mktemp("l") / "k.sock")
    said = {}
    for level in ("warning", "info"):
        words = [sys.executable, "-m", "realmap", "kernel", "--path", path, "--log", level]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            assert "ready" in child.stdout.readline()
            realmap.connect(path).close()
            child.send_signal(signal.SIGTERM)
            _, said[level] = child.communicate(timeout=BOUND)
        assert child.returncode == 0
    assert said["warning"] == ""
    assert "has connected" in said["info"]
    assert f"pid {os.getpid()}" in said["info"]


def test_a_booted_kernel_logs_where_the_environment_says(capfd: pytest.CaptureFixture[str]) -> None:
    for word, wanted in (("", False), ("info", True), ("nonsense", False)):
        os.environ[logs.VARIABLE] = word
        try:
            with realmap.boot() as kernel:
                kernel.connect().close()
                wait_until(lambda kernel=kernel: not kernel.stats()["processes"])
        finally:
            del os.environ[logs.VARIABLE]
        said = capfd.readouterr().err
        assert ("has connected" in said) is wanted
        assert ("a level of logging is one of" in said) is (word == "nonsense")


@realmap.syscall
def quick(call: realmap.Call) -> None:
    """Nothing."""


@realmap.syscall
def late(call: realmap.Call, seconds: float) -> None:
    """Loses the loop, where it takes long enough."""
    time.sleep(seconds)


@realmap.syscall(blocking=True)
def beside(call: realmap.Call, seconds: float) -> None:
    """On a worker thread; it may fail."""
    time.sleep(seconds)
    raise ValueError(seconds)


def test_how_long_handlers_took_wherever_they_run() -> None:
    with realmap.boot(syscalls=[quick, late, beside]) as kernel, kernel.connect() as me:
        assert {(each.p50, each.p99, each.longest) for each in kernel.snapshot().calls} == {(None, None, None)}
        for _ in range(9):
            me.call("quick")
        me.call("late", 0.2)
        for seconds in [0.01] * 8 + [0.3]:
            with pytest.raises(realmap.SyscallFailed):
                me.call("beside", seconds)
        took = {each.name: each for each in kernel.snapshot().calls}
    assert took_at_least(took["late"], 0.2)
    assert took_at_least(took["beside"], 0.3)
    assert took["beside"].p50 is not None
    assert 0.009 < took["beside"].p50 < 0.3
    assert took["quick"].p50 is not None
    assert 0 < took["quick"].p50 < 0.2


def took_at_least(call: CallInfo, seconds: float) -> bool:
    return (
        call.longest is not None and seconds <= call.longest < BOUND and call.p99 == pytest.approx(call.longest, 0.07)
    )
