"""The live view: by Textual's pilot on real kernels, and as a real process in a pseudo-terminal."""

from __future__ import annotations

import asyncio
import mmap
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import BOUND, PAGE, wait_until
from pilot import drive, loaded, papers, screen_text, until
from rich.segment import Segment

import realmap
from realmap.cli.top import paint
from realmap.cli.top.app import Fresh, Top
from realmap.cli.top.feed import Feed, Seen
from realmap.cli.top.screens import Help, Main, OneProcess, OneSegment
from realmap.cli.top.view import fitting
from realmap.observe.picture import LENT, WINDOW, draw, lit

__all__ = ["loaded"]
#: Screens take their time; CI runs them with the other long ones.
pytestmark = pytest.mark.slow


def test_a_view_that_comes_as_it_ends(kernel: realmap.KernelHandle) -> None:
    async def run() -> None:
        app = Top(kernel.path, 0.1)
        async with app.run_test() as pilot:
            await until(pilot, lambda: app.view is not None, "the first view")
        assert app.view is not None
        app.on_fresh(Fresh(app.view))

    asyncio.run(run())


@pytest.mark.parametrize("size", [(80, 24), (20, 10), (200, 60), (1, 1)])
def test_sizes(me: realmap.Process, loaded: realmap.KernelHandle, size: tuple[int, int]) -> None:
    async def steps(app: Top, pilot: Any) -> None:
        with me.map(5 * PAGE) as buffer:
            me.call("keep", "shown", buffer.slice(PAGE, PAGE))
            seen = app.shown
            await until(pilot, lambda: app.shown > seen + 1, "a later view")
            text = screen_text(app)
            if size[0] >= 20:
                assert all(str(process.pid) in text for process in app.view.snapshot.processes)  # type: ignore[union-attr]
                assert lit(1) in papers(app) or lit(2) in papers(app)
            if size[0] >= 80:
                assert "3 processes" in text
                assert f"kernel {loaded.pid}" in text
                assert text.count(" busy ") == 2
                assert "calls/s" in text
                assert "KernelLand" in text
            for key in ("2", "enter", "escape", "1", "enter", "enter", "escape", "escape", "question_mark", "escape"):
                await pilot.press(key)
                await pilot.pause()
                assert all(len(line) <= size[0] for line in screen_text(app).splitlines())
            assert isinstance(app.screen, Main)
            me.call("read_kept", "shown")

    drive(loaded.path, steps, size)


def test_another_size_while_it_runs(loaded: realmap.KernelHandle) -> None:
    async def steps(app: Top, pilot: Any) -> None:
        for size in ((20, 10), (120, 40), (1, 1), (80, 24)):
            await pilot.resize_terminal(*size)
            seen = app.shown
            await until(pilot, lambda seen=seen: app.shown > seen, "another view")
        assert "UserLand" in screen_text(app)

    drive(loaded.path, steps)


def test_sort_filter_pause(loaded: realmap.KernelHandle) -> None:
    async def steps(app: Top, pilot: Any) -> None:
        table = app.screen.query_one("#processes")
        assert [row.process.pid for row in table.shown] == sorted(row.process.pid for row in table.shown)
        await pilot.press("s", "s")  # calls, then mappings
        assert [row.lane.ranges for row in table.shown] == [8, 3]
        await pilot.press("S")
        assert [row.lane.ranges for row in table.shown] == [3, 8]
        assert "maps▲" in screen_text(app)
        pid = table.shown[1].process.pid
        await pilot.press("slash", *str(pid))
        await until(pilot, lambda: len(table.shown) == 1, "the filter")
        await pilot.press("enter")
        assert table.has_focus
        assert [row.process.pid for row in table.shown] == [pid]
        assert f'["{pid}": 1 of 2, Esc ends it]' in screen_text(app)
        await pilot.press("slash", *"busx", "enter")
        assert table.shown == []
        assert '["busx": 0 of 2, Esc ends it]' in screen_text(app)
        await pilot.press("escape")
        assert len(table.shown) == 2
        assert "Esc ends it" not in screen_text(app)
        await pilot.press("slash", *"busy")
        assert len(table.shown) == 2  # by the program, too
        await pilot.press("escape")
        await pilot.press("p")
        await until(pilot, lambda: "PAUSED" in screen_text(app), "the pause")
        calls, seen = loaded.stats()["calls"], app.shown
        wait_until(lambda: loaded.stats()["calls"] > calls + 20, "calls while it is paused")
        await pilot.pause(0.5)
        assert app.shown <= seen + 1  # one may have been on its way
        await pilot.press("p")
        await until(pilot, lambda: app.shown > seen + 1 and "PAUSED" not in screen_text(app), "going on")

    drive(loaded.path, steps)


def test_the_cursor_stays_with_its_process(kernel: realmap.KernelHandle, loaded: realmap.KernelHandle) -> None:
    async def steps(app: Top, pilot: Any) -> None:
        table = app.screen.query_one("#processes")
        await pilot.press("down")
        pid = table.shown[table.cursor].process.pid
        await pilot.press("s", "s", "S")
        assert table.shown[table.cursor].process.pid == pid
        await pilot.press("end", "home", "pagedown", "pageup", "up")
        assert table.cursor == 0

    drive(loaded.path, steps)


def test_a_process_a_segment_and_their_end(kernel: realmap.KernelHandle) -> None:
    with kernel.connect() as me:
        shared = me.map(5 * PAGE, fragment=2 * PAGE)
        me.call("keep", "detail", shared.slice(PAGE, 3333))

        async def steps(app: Top, pilot: Any) -> None:
            await pilot.press("enter")
            assert isinstance(app.screen, OneProcess)
            text = screen_text(app)
            assert f"process {os.getpid()}" in text
            assert f"{shared.address:#x}" in text
            assert "HEAP" in text
            assert "u_rw" in text
            (row,) = app.screen.query_one("Rows").shown  # type: ignore[attr-defined]
            assert row.mirrors == (1,)
            assert row.frames.refcount == 2
            await pilot.press("enter")
            assert isinstance(app.screen, OneSegment)
            text = screen_text(app)
            assert "2 references" in text
            assert f"mapping {shared.address:#x} of process" in text
            assert "mirror 0x3" in text
            assert text.count("inode") == 3
            me.call("read_kept", "detail")
            await until(pilot, lambda: "1 reference" in screen_text(app), "the end of the mirror")
            me.close()
            await until(pilot, lambda: "are gone" in screen_text(app), "the end of the frames")
            await pilot.press("escape")
            assert "has gone" in screen_text(app)
            await pilot.press("escape")
            assert isinstance(app.screen, Main)

        drive(kernel.path, steps)


def test_a_kernel_that_dies_and_comes_back(tmp_path: Path) -> None:
    """What was looked at is not taken for what has its number now."""
    path = str(tmp_path / "k.sock")
    first = realmap.boot(path=path)

    async def steps(app: Top, pilot: Any) -> None:
        await pilot.press("enter", "enter")
        assert isinstance(app.screen, OneSegment)
        assert "1 reference" in screen_text(app)
        os.kill(first.pid, signal.SIGKILL)
        await until(pilot, lambda: "NO KERNEL" in screen_text(app), "word of its death")
        assert app.screen.has_class("lost")
        assert "1 reference" not in screen_text(app)  # what it had is not shown as if it were there
        assert "nothing to show; a kernel that starts appears here" in screen_text(app)
        user.close()
        first.shutdown()
        with realmap.boot(path=path) as second, second.connect() as me, me.map(PAGE):
            await until(pilot, lambda: f"kernel {second.pid}" in screen_text(app), "the next kernel")
            assert app.view is not None
            assert app.view.seen.snapshot.pid == second.pid
            (process,) = app.view.seen.snapshot.processes
            assert (process.number, process.mappings[0].frames) == before
            assert "are gone" in screen_text(app)
            await pilot.press("escape")
            assert isinstance(app.screen, OneProcess)
            assert "has gone" in screen_text(app)
            await pilot.press("escape")
            assert f"{PAGE >> 10} KiB" in screen_text(app)
            os.kill(second.pid, signal.SIGKILL)
            await until(pilot, lambda: "nothing to show" in screen_text(app), "that there is nothing")
            assert f"{PAGE >> 10} KiB" not in screen_text(app)
            await pilot.press("q")

    with first.connect() as user, user.map(PAGE):
        (process,) = first.snapshot().processes
        before = (process.number, process.mappings[0].frames)
        drive(path, steps)


def test_where_none_is_named_the_next_one_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REALMAP_DIR", str(tmp_path))

    async def steps(app: Top, pilot: Any) -> None:
        for _ in range(2):
            await until(pilot, lambda: "no kernel of yours runs; start one" in screen_text(app), "that there is none")
            assert "nothing to show" in screen_text(app)
            with realmap.boot() as kernel:
                await until(pilot, lambda: f"kernel {kernel.pid} " in screen_text(app), "a kernel")
                assert kernel.path in screen_text(app)
                with realmap.boot() as other:  # what is shown stays
                    await pilot.pause(0.5)
                    assert f"kernel {kernel.pid} " in screen_text(app)
                    with realmap.boot():
                        kernel.shutdown()
                        await until(pilot, lambda: "several kernels run" in screen_text(app), "that there are several")
                    await until(pilot, lambda: f"kernel {other.pid} " in screen_text(app), "the one that is left")

    drive("", steps, size=(200, 20))


def test_a_kernel_that_does_not_answer_stops_nobody(kernel: realmap.KernelHandle) -> None:
    async def steps(app: Top, pilot: Any) -> None:
        os.kill(kernel.pid, signal.SIGSTOP)
        try:
            start = time.monotonic()
            await pilot.press("2", "1", "question_mark", "escape", "s")
            assert time.monotonic() - start < BOUND / 4
            await until(pilot, lambda: f"kernel {kernel.pid} is stopped" in screen_text(app), "word of it")
            assert "NO KERNEL" not in screen_text(app)
            assert app.screen.has_class("lost")
            os.kill(kernel.pid, signal.SIGCONT)
            await until(pilot, lambda: "is stopped" not in screen_text(app), "a view")
            assert not app.screen.has_class("lost")
            os.kill(kernel.pid, signal.SIGSTOP)
            start = time.monotonic()
            app.exit()
            await pilot.pause()
            assert time.monotonic() - start < BOUND / 4
        finally:
            os.kill(kernel.pid, signal.SIGCONT)

    drive(kernel.path, steps)


@pytest.mark.parametrize("count", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_thousands_of_mappings(kernel: realmap.KernelHandle, count: int) -> None:
    """What a refresh of the screen costs its thread: tens of ms. The bound is for a loaded machine."""
    user = kernel.spawn(many, count)
    wait_until(lambda: kernel.stats()["mappings"] == count, "thousands of mappings")

    async def steps(app: Top, pilot: Any) -> None:
        for key in ("1", "2", "enter", "end", "escape", "1", "enter", "end", "pageup"):
            await pilot.press(key)
            await pilot.pause()
            start = time.thread_time()
            app.show()
            await pilot.pause()
            assert time.thread_time() - start < 1.0
        assert len(app.screen.query_one("Rows").shown) == count  # type: ignore[attr-defined]

    drive(kernel.path, steps)
    user.kill()
    user.join(BOUND)
    wait_until(lambda: not kernel.stats()["mappings"], "the end of the mappings")


def many(me: realmap.Process, count: int) -> None:
    """Many mappings of few segments."""
    parts = [me.map(100 * PAGE) for _ in range(100)]
    handles = [me.share(part) for part in parts]
    buffers = [me.attach(handles[at % 100], at // 100 * PAGE, PAGE) for at in range(count - 100)]
    signal.pause()
    del buffers


def test_help_screen_says_the_keys(kernel: realmap.KernelHandle) -> None:
    async def steps(app: Top, pilot: Any) -> None:
        await pilot.press("question_mark")
        assert isinstance(app.screen, Help)
        assert "pause" in screen_text(app)
        await pilot.press("question_mark")
        assert isinstance(app.screen, Main)
        await pilot.press("question_mark", "q")
        assert app._exit

    drive(kernel.path, steps)


# ---- without a screen ---------------------------------------------------------------------


def test_a_lane_is_as_wide_as_asked_and_says_numbers(me: realmap.Process) -> None:
    with me.map(64 * PAGE) as buffer, me.map(3 * PAGE):
        me.call("keep", "painted", buffer.slice(0, PAGE))
        snapshot = _snapshot(me)
        for cells in (1, 2, 3, 10, 40, 200):
            picture = draw(snapshot, cells)
            for lane in (picture.kernel, *picture.users):
                assert Segment.get_line_length(paint.lane(lane, cells)) == cells
        text = "".join(segment.text for segment in paint.lane(picture.users[0], 200))
        assert "256K" in text
        assert "1" in text
        me.call("read_kept", "painted")


def _snapshot(me: realmap.Process) -> Any:
    from realmap.observe.control import Control

    with Control(me.path) as control:
        return control.snapshot()


def test_small_words() -> None:
    assert fitting(["one", "two", "three"], 9) == "one · two"
    assert fitting(["one"], 2) == ""
    assert paint.sparkline([0, 4, 8], 2) == "▄█"
    assert paint.sparkline([0, 0], 5) == "  "
    assert paint.sparkline([1], 0) == ""


def test_the_feed_waits_until_it_is_consumed(kernel: realmap.KernelHandle) -> None:
    found: list[Seen | str] = []
    came = threading.Semaphore(0)

    def deliver(seen: Seen | str) -> None:
        found.append(seen)
        came.release()

    feed = Feed(kernel.path, 0.0, deliver)
    feed.start()
    assert came.acquire(timeout=BOUND)
    assert not came.acquire(timeout=0.5)  # nobody has looked at the first one yet
    feed.consumed()
    assert came.acquire(timeout=BOUND)
    feed.consumed()
    feed.stop()
    assert len(found) >= 2
    assert isinstance(found[0], Seen)
    assert isinstance(found[1], Seen)
    assert found[0].rates is None
    assert found[1].rates is not None


def test_how_long_handlers_took(kernel: realmap.KernelHandle, me: realmap.Process) -> None:
    for _ in range(3):
        me.call("nop")
    with pytest.raises(realmap.SyscallFailed):
        me.call("explode", "ValueError", "x")

    async def steps(app: Top, pilot: Any) -> None:
        await pilot.press("3")
        await until(pilot, lambda: "nop" in screen_text(app), "the syscalls")
        rows = [line.split() for line in screen_text(app).splitlines()]
        (head,), (nop,), (failed,) = ([row for row in rows if name in row] for name in ("p50", "nop", "explode"))
        assert head[1:] == ["failed", "p50", "p99", "longest", "blocking", "servers", "syscall"]
        assert nop[0] == "3"
        assert failed[:2] == ["1", "1"]
        await pilot.press("enter")
        assert isinstance(app.screen, Main)  # there is no more to it

    drive(kernel.path, steps)


def test_what_is_lent_to_a_service(kernel: realmap.KernelHandle, me: realmap.Process) -> None:
    go = threading.Event()

    def keep_for_a_while(call: realmap.Call, data: realmap.UserBuffer) -> None:
        with data.mirror():
            assert go.wait(BOUND)

    with kernel.connect() as host, host.serve(keep_for_a_while):
        thread = threading.Thread(target=me.call, args=("keep_for_a_while", me.map(3 * PAGE)))
        thread.start()

        async def steps(app: Top, pilot: Any) -> None:
            def ends() -> list[list[tuple[int, str]]]:
                assert app.view is not None
                return [[(light.number, light.kind) for light in row.lane.lights] for row in app.view.processes]

            await until(pilot, lambda: sorted(ends()) == [[(1, LENT)], [(1, WINDOW)]], "both ends")
            assert "1 lent to services" in screen_text(app)
            await pilot.press("3")
            await until(pilot, lambda: "keep_for_a_while" in screen_text(app), "what is served")
            (head,) = [line.split() for line in screen_text(app).splitlines() if "p50" in line]
            assert head[6:8] == ["servers", "syscall"]
            view = app.view
            assert view is not None
            (call,) = view.snapshot.running
            assert view.at_work(call).startswith(f"in keep_for_a_while of process {os.getpid()} ")
            ((names,), ()) = ([seat.names for seat in view.seats(row.process)] for row in reversed(view.processes))
            assert names == ["keep_for_a_while"]

        try:
            drive(kernel.path, steps, size=(120, 30))
        finally:
            go.set()
            thread.join(BOUND)


def test_the_machine_in_place_of_a_kernel() -> None:
    window = mmap.mmap(-1, 3 * PAGE)
    pid = os.fork()
    if not pid:
        signal.pause()
        os._exit(0)

    async def run() -> None:
        app = Top("", 0.1, machine=True)
        async with app.run_test(size=(80, 24)) as pilot:
            await until(pilot, lambda: "Shared" in screen_text(app), "the first view")
            assert app.view is not None
            lit = {row.process.pid: {light.number for light in row.lane.lights} for row in app.view.processes}
            assert lit[pid] & lit[os.getpid()]
            assert "this machine" in screen_text(app)
            assert "mirror" not in screen_text(app)
            await pilot.press("2")
            await until(pilot, lambda: "x mapped" in screen_text(app), "the segments")
            app.screen.table.set_filter(f"{pid} ")
            await pilot.press("enter")
            await until(pilot, lambda: isinstance(app.screen, OneSegment), "its holders")

    try:
        asyncio.run(run())
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        window.close()
