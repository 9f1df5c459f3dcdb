"""What commands and snapshots tell of services, and of what is lent; and a server that keeps what it was lent."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import BOUND, PAGE, wait_until
from raw_client import RawClient, RawServer, RawSession
from trace_format import TraceFile

import realmap
from realmap import KernelHandle, UserBuffer, k_r, k_rw
from realmap.cli import command
from realmap.memory import CrossProcessMapping
from realmap.memory.grants import Grants
from realmap.memory.lending import LentLand, LentMapping
from realmap.rights import MemoryType
from realmap.wire import messages
from realmap.wire.news import Granted, Served

SIZE = 5 * PAGE + 333
kept: list[CrossProcessMapping] = []
gate = threading.Event()


def hold(call: realmap.Call, data: UserBuffer) -> int:
    """A window, until it is let go."""
    with data.mirror(k_rw) as mirror:
        assert gate.wait(BOUND)
        return len(mirror)


def keep_window(call: realmap.Call, data: UserBuffer) -> None:
    """Does not give it back."""
    kept.append(data.mirror(k_r))


@pytest.fixture(scope="module")
def kernel() -> Iterator[KernelHandle]:
    """One that nobody else uses."""
    with realmap.boot() as handle:
        handle.stats()  # its connection stays
        yield handle


def shown(kernel: KernelHandle, *arguments: str) -> str:
    """What a command prints."""
    done = CliRunner().invoke(command, arguments, env={"REALMAP_KERNEL": kernel.path})
    assert done.exit_code == 0, done.output
    return done.output


def test_a_call_at_work_and_what_is_lent_to_it(kernel: KernelHandle) -> None:
    gate.clear()
    with kernel.connect() as host, kernel.connect() as me, host.serve(hold, keep_window, threads=2):
        buffer = me.map(SIZE + PAGE, fragment=2 * PAGE)
        part = buffer.slice(100, SIZE)
        thread = threading.Thread(target=me.call, args=("hold", part))
        thread.start()
        try:
            wait_until(lambda: kernel.stats()["lent"] == 1)
            (row,) = [row for row in json.loads(shown(kernel, "ps", "--json")) if row["running"]]
            assert (row["running"], row["waits_for"]) == (["hold"], [os.getpid()])
            assert "hold,keep_window" in shown(kernel, "ps")
            (call,) = [call for call in json.loads(shown(kernel, "stats", "--json"))["calls"] if call["name"] == "hold"]
            assert (call["count"], call["servers"]) == (1, 1)
            text = shown(kernel, "snapshot")
            said = f"pid {os.getpid()} serves hold, keep_window: 1 of 2 threads at work, 0 waiting, 1 window of {SIZE} "
            assert f"{said}bytes lent to it, called by pid {os.getpid()}" in text
            metrics = shown(kernel, "stats", "--prometheus")
            assert 'realmap_servers{syscall="hold"} 1.0' in metrics and "realmap_lent_windows 1.0" in metrics
            (window,) = [
                row for row in json.loads(shown(kernel, "maps", str(os.getpid()), "--json")) if row["type"] == "lent"
            ]
            assert (window["length"], window["linux"], len(window["segments"])) == (SIZE, "agrees", 3)
            report = kernel.audit()
            assert report and not report.withheld, report
        finally:
            gate.set()
            thread.join(BOUND)
        wait_until(lambda: not kernel.stats()["lent"])
        (call,) = [call for call in kernel.snapshot().calls if call.name == "hold"]
        assert call.p50 is not None and call.count == 1
        assert not kernel.snapshot().running and kernel.audit()


def test_a_trace_has_calls_from_caller_to_server_and_back(kernel: KernelHandle, tmp_path: Path) -> None:
    def fast(call: realmap.Call, number: int) -> int:
        return number

    @realmap.syscall(blocking=True)
    def slow(call: realmap.Call) -> None:
        gate.wait(BOUND)

    def no(call: realmap.Call) -> None:
        raise realmap.InvalidHandle("x", why="no")

    gate.clear()
    file = tmp_path / "trace.json"
    with kernel.connect() as host, kernel.connect() as me, host.serve(fast, slow, no, threads=2) as service:
        me.call("fast", 0)  # before it
        threads = [threading.Thread(target=me.call, args=("slow",)) for _ in range(3)]
        with kernel.trace(file):
            for number in range(200):
                assert me.call("fast", number) == number
            with pytest.raises(realmap.InvalidHandle):
                me.call("no")
            for thread in threads:
                thread.start()
            wait_until(lambda: sum(call.seconds is None for call in kernel.snapshot().running) == 1)
            gate.set()
            for thread in threads:
                thread.join(BOUND)
            wait_until(lambda: file.read_text().count('"server":') == 2 * 204, "all of them in the file")
        me.call("fast", 0)  # and after it
        assert service.calls == 206
    found = TraceFile(file)
    tracks = {
        (each["pid"], each["tid"]): each["args"]["name"] for each in found.of("M") if each["name"] == "thread_name"
    }
    spans = [each for each in found.of("X") if each["args"].get("server") == os.getpid()]
    asked = [each for each in spans if tracks[each["pid"], each["tid"]].startswith("calls to services")]
    served = [each for each in spans if tracks[each["pid"], each["tid"]].startswith("serves")]
    names = ["fast"] * 200 + ["no"] + ["slow"] * 3
    assert sorted(each["name"] for each in asked) == sorted(each["name"] for each in served) == names
    (failed,) = [each for each in served if "error" in each["args"]]
    assert (failed["name"], failed["args"]["error"]) == ("no", "InvalidHandle")
    by_id = {each["args"]["id"]: each for each in asked}
    for each in served:
        mine = by_id[each["args"]["id"]]
        assert mine["begin"] <= each["begin"] <= each["end"] == mine["end"]
    waited = [by_id[each["args"]["id"]]["begin"] < each["begin"] for each in served if each["name"] == "slow"]
    assert sum(waited) >= 1, "one waited for a thread"
    starts = {(each["pid"], each["tid"], each["begin"]) for each in found.of("s")}
    steps = {(each["pid"], each["tid"], each["begin"]) for each in found.of("t")}
    assert starts >= {(each["pid"], each["tid"], each["begin"]) for each in asked}
    assert steps >= {(each["pid"], each["tid"], each["begin"]) for each in served}


def test_a_handler_that_keeps_what_it_was_lent_is_named(kernel: KernelHandle) -> None:
    with kernel.connect() as host, kernel.connect() as me, host.serve(keep_window):
        buffer = me.map(3 * PAGE)
        me.call("keep_window", buffer)
        try:
            wait_until(lambda: kernel.stats()["lent"] == 1)
            report = kernel.audit()
            assert report, report
            (found,) = report.withheld
            assert (found.pid, found.address, found.length) == (os.getpid(), kept[0].address, 3 * PAGE)
            assert f"keeps {3 * PAGE} bytes at {kept[0].address:#x} that it was lent: the call" in shown(
                kernel, "audit"
            )
        finally:
            kept.pop().drop()


def test_windows_that_are_kept_for_their_next_use_are_known(kernel: KernelHandle) -> None:
    gate.set()
    with kernel.connect() as host, kernel.connect() as me, host.serve(hold, lazy_unmap=1 << 20):
        buffer = me.map(3 * PAGE)
        me.call("hold", buffer)
        wait_until(lambda: any(each.kept for each in kernel.snapshot().lent))
        report = kernel.audit()
        assert report and not report.withheld, report
        assert "kept" in shown(kernel, "maps", str(os.getpid()))


def test_a_server_that_maps_more_than_it_tells_is_found_out(kernel: KernelHandle) -> None:
    with RawClient(kernel.path) as host, RawServer(host, "name") as server, RawClient(kernel.path) as caller:
        with RawSession(caller, "name") as session:
            session.lend(caller.map(3 * PAGE))
            _, fds = server.hear()
            granted, frames = server.hear()
            assert isinstance(granted, Granted)
            mine, land = Grants(), LentLand()
            kind, pieces = MemoryType(granted.kind), [(offset, length) for offset, length in granted.pieces]
            rights = realmap.MappingAccessRights(granted.rights)
            mapping = mine.enter(granted.address, granted.length, kind, rights, pieces, frames, granted.serial)
            (mapped,) = kernel.snapshot().processes[-1].mappings[:1]
            # These raw clients have no memory mapped, which is a difference of its own.
            before = {each.where for each in kernel.audit().differences}
            with LentMapping.mirror_mapping(mapping, PAGE, PAGE, kernel=land, rights=k_r) as window:
                place = f"LentLand of pid {os.getpid()}"
                (found,) = [each for each in kernel.audit().differences if each.where not in before]
                assert (found.where, found.address) == (place, window.address)

                def tell(at: int) -> None:
                    lent = (caller.number, mapped.address + PAGE, PAGE, at, int(k_r))
                    server.tell(Served({}, [], [lent]))

                tell(window.address)
                wait_until(lambda: kernel.stats()["lent"] == 1)
                report = kernel.audit()
                assert {each.where for each in report.differences} == before and not report.withheld
                caller.ask(messages.Unmap, mapped.address, 3 * PAGE)
                (found,) = kernel.audit().withheld
                assert (found.address, found.why) == (window.address, "it is lent no more")
            report = kernel.audit()
            assert place in {each.where for each in report.differences} or report.withheld
            mine.clear()
            for fd in fds:
                os.close(fd)
