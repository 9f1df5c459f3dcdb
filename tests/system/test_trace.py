"""A trace against what was done, and against the books."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import syscalls
from conftest import PAGE, in_threads, wait_until
from forked import in_a_child
from trace_format import TraceFile

import realmap
from realmap import Kernel, KernelHandle, Process
from realmap._core import Events
from realmap.errors import AccessDenied, InvalidMemState, InvalidSize, LimitReached, UnknownSyscall
from realmap.observe.control import Control
from realmap.observe.trace import Trace
from realmap.wire import messages
from realmap.wire.records import RECORD


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "trace.json"


def map_and_wait(me: Process, length: int) -> None:
    """A user that holds a mapping until it is killed."""
    held = me.map(length)
    signal.pause()
    held.unmap()


def test_every_step_is_in_it_with_its_facts(kernel: KernelHandle, file: Path) -> None:
    with kernel.trace(file) as trace:
        with kernel.connect() as me:
            data = me.map(3 * PAGE + 1)
            other = me.map(PAGE)
            address, mirrored, length, *_ = me.call("reverse", data, 5, 100)
            me.call("slow_sha256", other)
            me.call("copy", data.slice(7, 10), other.slice(100, 10))
            with pytest.raises(InvalidMemState):
                me.call("our_error")
            with pytest.raises(UnknownSyscall):
                me.call("no such")
            books = kernel.snapshot()
            where = other.address
            other.unmap()
        wait_until(lambda: not kernel.stats()["processes"])
    assert (trace.lost, trace.died) == (0, None)
    found, pid = TraceFile(file), os.getpid()
    assert found.totals == {"events": trace.events, "lost": 0}
    (process,) = books.processes
    serials = [mapping.frames for mapping in process.mappings]

    # Its memory: what came and went, as the books have it.
    maps = [(event["args"]["address"], event["args"]["bytes"], event["args"]["frames"]) for event in found.named("map")]
    assert maps == [
        (f"{mapping.address:#x}", mapping.length, mapping.frames)
        for mapping in sorted(process.mappings, key=lambda mapping: mapping.frames or 0)
    ]
    first, second = found.named("unmap")
    assert first["args"]["address"] == f"{where:#x}"
    assert "reaped" not in first["args"]
    assert second["args"]["address"] == f"{data.address:#x}"
    assert second["args"]["reaped"] is True
    assert found.counted("mappings", pid) == [1, 2, 1, 0]
    assert found.counted("mapped bytes", pid) == [4 * PAGE, 5 * PAGE, 4 * PAGE, 0]

    # Its life.
    (connect,) = found.named("connect", pid=pid, uid=os.geteuid(), process=process.number)
    (leave,) = found.named("leave", pid=pid)
    (reap,) = found.named("reap", pid=pid, mappings=1, bytes=4 * PAGE)
    assert connect["begin"] < leave["begin"] < second["begin"] < reap["begin"]
    assert not found.named("death")

    # Its calls, in order, with what became of them.
    calls = found.calls(pid)
    names = [(call["name"], call["args"].get("error")) for call in calls]
    assert names == [
        ("map", None),
        ("map", None),
        ("reverse", None),
        ("slow_sha256", None),
        ("copy", None),
        ("our_error", "InvalidMemState"),
        ("no such", "UnknownSyscall"),
        ("open", "UnknownSyscall"),  # no process serves it either
        ("unmap", None),
    ]
    reverse, digest, copy = calls[2:5]
    assert reverse["args"]["address"] == f"{data.address:#x}"
    assert reverse["args"]["bytes"] == len(data)
    assert copy["args"]["buffers"] == 2

    # The mirrors, each inside of its call.
    one, two = found.mirrors()
    assert one["args"] == {
        "process": process.number,
        "pid": pid,
        "address": f"{mirrored:#x}",
        "bytes": length,
        "user_address": f"{address + 5:#x}",
        "frames": min(serial for serial in serials if serial),
        "offset": 5,
        "rights": "k_rw",
    }
    assert (two["args"]["user_address"], two["args"]["bytes"]) == (f"{where:#x}", PAGE)
    for mirror, call in ((one, reverse), (two, digest)):
        assert call["begin"] < mirror["begin"] < mirror["end"] < call["end"]
    assert found.counted("mirrors", kernel.pid) == [1, 0, 1, 0]

    # The copies, and where each handler ran.
    copies = [span for span in found.of("X") if span["cat"] == "copy"]
    assert [(span["name"], span["args"]["address"], span["args"]["bytes"]) for span in copies] == [
        ("copy_in", f"{data.address + 7:#x}", 10),
        ("copy_out", f"{where + 100:#x}", 10),
    ]
    on_kernel = {track: [span["name"] for span in spans] for track, spans in found.by_track("X").items()}
    assert "slow_sha256" not in on_kernel[kernel.pid, 1]
    assert on_kernel[kernel.pid, 2] == ["slow_sha256"]
    assert len(found.of("s")) == len(calls)


def test_a_killed_process_dies_and_is_reaped(kernel: KernelHandle, file: Path) -> None:
    child = kernel.spawn(map_and_wait, 5 * PAGE)
    wait_until(lambda: kernel.stats()["mappings"] == 1)
    with kernel.trace(file):
        child.kill()
        wait_until(lambda: not kernel.stats()["processes"])
    child.join()
    found = TraceFile(file)
    (before,) = found.named("map", already=True, bytes=5 * PAGE)
    (death,) = found.named("death", pid=child.pid)
    (unmap,) = found.named("unmap", reaped=True, bytes=5 * PAGE)
    (reap,) = found.named("reap", pid=child.pid, mappings=1, bytes=5 * PAGE)
    assert before["begin"] < death["begin"] < unmap["begin"] < reap["begin"]


def test_what_forked_children_may_come_for_is_reaped_later(kernel: KernelHandle, file: Path) -> None:
    with kernel.trace(file), kernel.connect() as me:
        buffer = me.map(2 * PAGE)
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
        os.close(reader)
        me.call("echo", buffer)
        me.close()
        wait_until(lambda: kernel.stats()["inheritances"] == 1)
        os.close(writer)
        os.waitpid(child, 0)
        wait_until(lambda: not kernel.stats()["inheritances"])
    found = TraceFile(file)
    kept, gone = found.named("reap")
    assert (kept["args"]["mappings"], gone["args"]["mappings"], gone["args"]["bytes"]) == (0, 1, 2 * PAGE)
    (unmap,) = found.named("unmap")
    assert kept["begin"] < unmap["begin"] < gone["begin"]


def test_what_was_there_before_and_what_is_open_in_the_end(kernel: KernelHandle, file: Path) -> None:
    with kernel.connect() as me:
        data = me.map(PAGE)
        call = threading.Thread(target=me.call, args=("hold", "early", data))
        call.start()
        wait_until(lambda: me.call("state", "early") == "waiting")
        with kernel.trace(file):
            me.call("keep", "late", data)
        found = TraceFile(file)
        me.call("go")
        call.join()
        me.call("read_kept", "late")
    early, late = found.mirrors()
    assert early["args"]["already"] is True
    assert "already" not in late["args"]
    for span in (early, late, *found.named("hold", "X")):
        assert span["args"]["unfinished"] == "was still open when the trace ended"
        assert span["args"].get("user_address", f"{data.address:#x}") == f"{data.address:#x}"
    assert len(found.named("hold", "X")) == 1
    assert found.counted("mirrors", kernel.pid) == [1, 2]


def test_many_at_once_side_by_side(kernel: KernelHandle, file: Path) -> None:
    """Flows pair up and spans nest (the checker) where calls of many threads, on many workers, overlap."""
    with kernel.connect() as me, kernel.trace(file) as trace:

        def work(_: int) -> None:
            mine = me.map(20 * PAGE)
            for _ in range(30):
                me.call("slow_sha256", mine)
                me.call("sha256", mine)
                me.call("copy", mine.slice(0, PAGE), mine.slice(PAGE, PAGE))
            mine.unmap()

        in_threads(4, work)
    assert trace.lost == 0
    found, pid = TraceFile(file), os.getpid()
    calls = found.calls(pid)
    assert len(calls) == 4 * (2 + 3 * 30)
    assert len(found.of("s")) == len(calls)
    assert len({call["tid"] for call in calls}) > 1
    assert not [call for call in calls if "unfinished" in call["args"] or "error" in call["args"]]
    assert len(found.mirrors()) == 2 * 4 * 30
    assert len([span for span in found.of("X") if span["cat"] == "copy"]) == 2 * 4 * 30
    values = found.counted("mirrors", kernel.pid)
    assert all(abs(after - before) == 1 for before, after in zip([0, *values], values, strict=False))
    assert values[-1] == 0


def test_kept_windows(file: Path) -> None:
    with realmap.boot(syscalls=[syscalls.sha256], lazy_unmap=4 * PAGE) as kernel, kernel.connect() as me:
        one, two = me.map(3 * PAGE), me.map(3 * PAGE)
        with kernel.trace(file):
            for buffer in (one, one, two):
                me.call("sha256", buffer)
    found = TraceFile(file)
    first, again, other = found.mirrors()
    assert all(mirror["args"]["kept"] is True for mirror in (first, again, other))
    assert [mirror["args"].get("window") for mirror in (first, again, other)] == [None, "kept", None]
    assert first["args"]["address"] == again["args"]["address"]
    (evicted,) = found.named("kept window unmapped")
    assert evicted["args"]["address"] == first["args"]["address"]


def test_what_is_lost_is_counted_and_told_where(kernel: KernelHandle, file: Path) -> None:
    calls = 2000
    with kernel.connect() as me:
        data = me.map(PAGE)
        with kernel.trace(file, events=16) as trace:
            for _ in range(calls):
                me.call("sha256", data)
    found = TraceFile(file)
    assert trace.lost > 0
    # CONNECT and MAP of what was there; of each call: arrival, mirror, drop, answer.
    assert trace.events + trace.lost == 2 + 4 * calls
    assert found.totals == {"events": trace.events, "lost": trace.lost}
    told = sum(event["args"]["lost"] for event in found.named("events lost"))
    assert 0 < told <= trace.lost
    assert kernel.stats()["calls"] >= calls


def test_a_listener_that_does_not_read_costs_bounded_memory(kernel: KernelHandle) -> None:
    def resident() -> int:
        return int(Path(f"/proc/{kernel.pid}/statm").read_text().split()[1]) * PAGE

    with kernel.connect() as me, Control(kernel.path) as control:
        for _ in range(2000):
            me.call("nop")
        before = resident()
        control._ask("trace-start", 8000)
        for _ in range(20_000):
            me.call("nop")
        grown = resident() - before
        records, lost, _ = control._ask("trace-read")
        assert len(records) == 8000 * RECORD.size
        assert lost == 1 + 2 * 20_000 - 8000
        assert grown < 8000 * RECORD.size + (2 << 20)


def test_the_ring_keeps_order_and_says_where_something_is_missing() -> None:
    events = Events(4)
    taken = []
    for number in range(10):
        events.note(20, 1, number, -1, 2)
        if number == 6:
            taken += RECORD.iter_unpack(events.take(3))
    taken += RECORD.iter_unpack(events.take(100))
    assert [(record[1], record[3], record[4]) for record in taken] == [
        (20, 0, 2**64 - 1),
        (20, 1, 2**64 - 1),
        (20, 2, 2**64 - 1),
        (20, 3, 2**64 - 1),
        (0, 0, 3),  # 4, 5 and 6 are missing
        (20, 7, 2**64 - 1),
        (20, 8, 2**64 - 1),
    ]
    assert [record[0] for record in taken] == sorted(record[0] for record in taken)
    assert events.lost == 4
    assert events.take(5) == b""
    with pytest.raises(TypeError):
        events.note(1, 2)
    with pytest.raises(TypeError):
        events.note(1, 2, "three")
    with pytest.raises(MemoryError):
        Events(0)


@pytest.fixture
def here() -> Iterator[Kernel]:
    with Kernel(syscalls=syscalls.ALL) as serving:
        yield serving


def test_off_it_is_as_it_never_was(here: Kernel, file: Path) -> None:
    def parts() -> list[object]:
        told = [process.memory.told for process in here.books.processes]
        return [here.books.observer, here.tracer.events, here.tracer.listener, *told]

    with Process(here.path) as me:
        data = me.map(PAGE)
        off = [None] * 4
        assert parts() == off
        with Trace(here.path, file) as trace:
            assert None not in parts()
            me.call("sha256", data)
        assert parts() == off
        assert trace.is_over
        me.call("sha256", data)
        trace.close()
    found = TraceFile(file)
    assert [call["name"] for call in found.of("X") if call["cat"] == "call"] == ["sha256"] * 2
    assert len(found.mirrors()) == 1


def test_one_trace_at_a_time_and_only_by_a_control_connection(kernel: KernelHandle, file: Path) -> None:
    with kernel.connect() as me, kernel.trace(file) as first:
        file_too = file.with_name("too.json")
        with pytest.raises(LimitReached, match="one trace at a time"):
            kernel.trace(file_too)
        assert not file_too.exists()
        me.call("nop")
        first.close()
        with kernel.trace(file_too):  # at once
            me.call("nop")
        for what in ("trace-start", "trace-read", "trace-stop"):
            ask = messages.Ask(me._client.next_id(), what, 100)
            if what == "trace-stop":
                me._client.request(ask)  # of somebody else's trace: nothing
            else:
                with pytest.raises((AccessDenied, realmap.InvalidHandle)):
                    me._client.request(ask)
    for events in (0, 15, 1 << 30, -1):
        with pytest.raises(InvalidSize):
            kernel.trace(file_too, events=events)
    assert len(TraceFile(file).named("nop", "X")) == len(TraceFile(file_too).named("nop", "X")) == 2


def test_a_forked_child_leaves_it_alone(kernel: KernelHandle, file: Path) -> None:
    with kernel.trace(file) as trace, kernel.connect() as me:
        me.call("nop")

        def work() -> None:
            trace.close()
            assert trace.is_over

        in_a_child(work)
        me.call("nop")
    assert len(TraceFile(file).named("nop", "X")) == 4


def test_a_pid_that_connects_twice_has_one_track_for_each(kernel: KernelHandle, file: Path) -> None:
    with kernel.trace(file), kernel.connect() as one, kernel.connect() as two:
        one.call("nop")
        two.call("nop")
    found = TraceFile(file)
    tracks = {span["pid"] for span in found.named("nop", "X")} - {kernel.pid}
    assert len(tracks) == 2
    assert {span["args"]["pid"] for span in found.named("nop", "X")} == {os.getpid()}
