"""What recycling is bounded by: limits, need, forks, the ends of those who have parked, and peers that lie."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from conftest import BOUND, PAGE, in_threads, land_maps, wait_until
from forked import in_a_child, said_in_a_child
from parked import inode, park, parked, segment_of, stock

import realmap
from realmap import InvalidAddress, InvalidSize, KernelHandle, Limits, MemoryType, PhysicalMemoryExhaustion, Process
from realmap.host import forks
from realmap.memory.stock import PLACES
from realmap.wire import messages

# ---- bounds, and need -------------------------------------------------------------------------


def test_so_many_and_no_more(me: Process, kernel: KernelHandle) -> None:
    addresses = park(me, *[PAGE] * (PLACES + 5))
    assert stock(kernel) == (PLACES, PLACES * PAGE)
    assert parked() == addresses[:PLACES]
    assert kernel.audit()
    assert me.map(PAGE).address == addresses[0]


def test_another_kind_takes_the_place_of_what_was_parked_first(me: Process, kernel: KernelHandle) -> None:
    addresses = park(me, *[PAGE] * PLACES)
    park(me, 2 * PAGE)
    assert parked() == addresses[1:]
    (address,) = park(me, 2 * PAGE)
    assert parked() == [*addresses[1:], address]
    assert stock(kernel) == (PLACES, (PLACES + 1) * PAGE)
    assert park(me, 2 * PAGE) == [address]


def test_its_limit_in_bytes() -> None:
    with realmap.boot(limits=Limits(stock=5 * PAGE)) as kernel, kernel.connect() as me:
        park(me, 6 * PAGE)
        assert stock(kernel) == (0, 0)
        first, second, _ = park(me, 2 * PAGE, 2 * PAGE, 2 * PAGE)
        assert stock(kernel) == (2, 4 * PAGE)
        assert first not in parked()
        assert second in parked()
        assert kernel.audit()
        snapshot = kernel.snapshot()
        assert [each.address for each in snapshot.processes[0].stock] == parked()
        assert snapshot.limits.stock == 5 * PAGE


def test_none_at_all() -> None:
    with realmap.boot(limits=Limits(stock=0)) as kernel, kernel.connect() as me:
        park(me, PAGE, PAGE)
        assert (parked(), stock(kernel)) == ([], (0, 0))


def test_a_limit_of_its_process_refuses_nothing_for_it() -> None:
    with realmap.boot(process_limit=8 * PAGE) as kernel, kernel.connect() as me:
        park(me, *[PAGE] * 8)
        assert stock(kernel) == (8, 8 * PAGE)
        buffer = me.map(8 * PAGE)
        assert bytes(buffer) == bytes(8 * PAGE)
        assert stock(kernel) == (0, 0)
        assert kernel.audit()  # the windows are bare
        assert len(parked()) == 8
        buffer.unmap()  # its process is told
        assert (parked(), stock(kernel)) == ([buffer.address], (1, 8 * PAGE))
        assert kernel.audit()


def test_large_frames_are_taken_again_once_there_is_room() -> None:
    size = 5 << 20
    with realmap.boot(process_limit=size) as kernel, kernel.connect() as me:
        park(me, PAGE, PAGE)
        buffer = me.map(size)
        assert buffer[size - 1] == 0
        with pytest.raises(PhysicalMemoryExhaustion):
            me.map(size)
        assert kernel.audit()


def test_everybodys_gives_way_to_anybody() -> None:
    with realmap.boot(memory_limit=9 * PAGE) as kernel, kernel.connect() as rich, kernel.connect() as poor:
        (address,) = park(rich, 4 * PAGE)
        (own,) = park(poor, 2 * PAGE)
        with segment_of(kernel, address) as fd:
            assert os.fstat(fd).st_size == 4 * PAGE
            buffer = poor.map(5 * PAGE)  # its own is enough
            assert stock(kernel) == (1, 4 * PAGE)
            more = poor.map(4 * PAGE)
            assert os.fstat(fd).st_size == 0  # its pages are free, whoever maps it
        assert stock(kernel) == (0, 0)
        assert (parked(), bool(kernel.audit())) == ([address], True)  # its process has not looked yet
        with pytest.raises(PhysicalMemoryExhaustion):
            rich.map(PAGE)
        more.unmap()
        assert own not in parked()
        rich.map(PAGE).unmap()
        assert address not in parked()
        assert kernel.audit()
        buffer.unmap()


def test_a_limit_of_segments_refuses_nothing_for_it() -> None:
    with realmap.boot(limits=Limits(segments=3)) as kernel, kernel.connect() as me:
        park(me, PAGE, PAGE, PAGE)
        assert len(me.map(3 * PAGE, fragment=PAGE)) == 3 * PAGE
        assert stock(kernel) == (0, 0)


def test_a_truncated_one_is_not_given_out(me: Process, kernel: KernelHandle) -> None:
    (address,) = park(me, 3 * PAGE)
    with segment_of(kernel, address) as fd:
        os.ftruncate(fd, PAGE)
    buffer = me.map(3 * PAGE)
    assert (bytes(buffer), buffer.fault) == (bytes(3 * PAGE), None)
    assert buffer.address != address
    assert parked() == []
    me.call("poke", buffer, b"x", 2 * PAGE)
    assert buffer[2 * PAGE] == ord("x")


def test_a_truncated_one_that_was_not_committed_says_so_when_it_is_touched(me: Process, kernel: KernelHandle) -> None:
    me.map(3 * PAGE, commit=False).unmap()
    (address,) = parked()
    with segment_of(kernel, address) as fd:
        os.ftruncate(fd, PAGE)
    buffer = me.map(3 * PAGE, commit=False)
    assert (buffer.address, buffer[0]) == (address, 0)
    with pytest.raises(realmap.MemoryFault):
        buffer[2 * PAGE]
    buffer.unmap()
    assert (parked(), stock(kernel)) == ([], (0, 0))


def test_large_ones_take_their_part(me: Process, kernel: KernelHandle) -> None:
    large = messages.RECYCLED
    most = kernel.snapshot().limits.stock
    assert most is not None and most == 2 * large
    _, second = park(me, large, large)
    assert stock(kernel) == (2, most)
    (page,) = park(me, PAGE)
    assert (sorted(parked()), stock(kernel)) == (sorted([second, page]), (2, large + PAGE))
    assert me.map(large).address == second


def test_a_faulted_one_is_not_parked(me: Process, kernel: KernelHandle) -> None:
    buffer = me.map(2 * PAGE)
    with segment_of(kernel, buffer.address) as fd:
        os.ftruncate(fd, 0)
    with pytest.raises(realmap.MemoryFault):
        buffer[0]
    buffer.unmap()
    assert (parked(), stock(kernel)) == ([], (0, 0))


# ---- ends and forks ---------------------------------------------------------------------------


def test_all_of_it_goes_with_the_connection(kernel: KernelHandle) -> None:
    with kernel.connect() as me:
        park(me, PAGE, 2 * PAGE)
        assert len(parked()) == 2
    assert parked() == []
    wait_until(lambda: stock(kernel) == (0, 0))


def test_all_of_it_goes_with_the_kernel() -> None:
    kernel = realmap.boot()
    me = kernel.connect()
    park(me, PAGE)
    live = me.map(PAGE)
    os.kill(kernel.pid, signal.SIGKILL)
    with pytest.raises(realmap.KernelDied):
        me.query(0x2000_0000_0000)
    assert parked() == []
    live.unmap()  # nobody is there to keep it
    assert land_maps(parked=True) == []
    me.close()
    kernel.shutdown()


def test_all_of_it_goes_with_its_process(kernel: KernelHandle) -> None:
    program = f"""
        import os, signal, realmap
        me = realmap.connect({kernel.path!r})
        me.map(100).unmap()
        print(flush=True)
        signal.pause()
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert stock(kernel) == (1, PAGE)
        child.kill()
    wait_until(lambda: stock(kernel) == (0, 0))
    wait_until(lambda: not kernel.stats()["processes"])


def test_a_forked_child_has_none_of_it(me: Process, kernel: KernelHandle) -> None:
    (address,) = park(me, PAGE)
    assert said_in_a_child(lambda: str(land_maps(parked=True))) == "[]"
    assert parked() == []
    assert me.query(address).type == MemoryType.UNMAPPED  # behind what was said of the fork
    assert stock(kernel) == (0, 0)
    assert bytes(me.map(PAGE)) == bytes(PAGE)


def test_a_child_recycles_what_it_maps_itself(me: Process, kernel: KernelHandle) -> None:
    before = me.map(PAGE)
    before[0] = 1

    def work() -> None:
        park(me, PAGE)
        ours = me.map(PAGE)
        before.unmap()  # inherited, so its parent's as well
        assert (ours[0], parked()) == (0, [])

    in_a_child(work)
    assert before[0] == 1
    wait_until(lambda: kernel.stats()["processes"] == 1)


def test_what_is_used_again_is_inherited(me: Process) -> None:
    park(me, PAGE)
    buffer = me.map(PAGE)
    buffer[:3] = b"abc"
    assert said_in_a_child(lambda: me.call("peek", buffer, 3, 0).decode()) == "abc"
    assert me.call("peek", buffer, 3, 0) == b"abc"
    buffer.unmap()
    assert parked() == []


def test_without_a_ring_nothing_is_parked() -> None:
    with realmap.boot(spin=0) as kernel, kernel.connect() as me:
        park(me, PAGE, PAGE)
        assert (parked(), stock(kernel)) == ([], (0, 0))


# ---- together ---------------------------------------------------------------------------------


def test_many_threads(me: Process, kernel: KernelHandle) -> None:
    def work(number: int) -> None:
        for turn in range(150):
            length = (PAGE, 2 * PAGE, 3333)[turn % 3]
            with me.map(length) as buffer:
                assert bytes(buffer) == bytes(length)
                buffer[:] = bytes([number + 1]) * length
                assert me.call("peek", buffer, 2, length - 2) == bytes([number + 1]) * 2
                assert bytes(buffer) == bytes([number + 1]) * length

    in_threads(4, work)
    assert not kernel.stats()["mappings"]
    assert kernel.stats()["stock"] == len(parked()) > 0


def test_the_kernel_looks_while_all_places_are_taken_again(me: Process, kernel: KernelHandle) -> None:
    """What it looks at while it is parked goes back by a message, or away; never into a place beyond the last."""
    ended = threading.Event()

    def look(_: int) -> None:
        while not ended.is_set():
            kernel.stats()

    def use(_: int) -> None:
        try:
            for _ in range(300):
                buffers = [me.map(PAGE) for _ in range(PLACES)]
                assert not any(buffer[0] for buffer in buffers)
                for buffer in buffers:
                    buffer[0] = 1
                    buffer.unmap()
        finally:
            ended.set()

    in_threads(2, lambda number: (look, use)[number](number))
    assert not kernel.stats()["mappings"]
    assert kernel.stats()["stock"] == len(parked()) > 0


def test_a_call_that_was_given_up_never_has_the_next_buffer(me: Process, kernel: KernelHandle) -> None:
    """It names an address that is somebody else's by the time that it is heard: only a message says so in time."""
    park(me, PAGE)
    with kernel.connect() as other, ThreadPoolExecutor(1) as pool:
        for _ in range(20):
            buffer = me.map(PAGE)
            buffer[:] = bytes(PAGE)
            busy = pool.submit(other.call, "spin", 0.015)
            with suppress(realmap.SyscallTimeout):
                me.call("poke", buffer, b"late", 0, timeout=0.002)
            buffer.unmap()
            with me.map(PAGE) as later:
                busy.result(BOUND)
                me.call("nop")  # whatever was said before has been heard
                assert bytes(later) == bytes(PAGE)


def test_a_buffer_that_was_unmapped_since_it_was_looked_at_is_not_sent(me: Process) -> None:
    """Another thread may have done that: its place may be another one's by now."""
    buffer, client = me.map(PAGE), me._client
    number = client.next_id()
    message = client.encode(messages.Call(number, "nop", (buffer,), None, None))
    buffer.unmap()
    with pytest.raises(InvalidAddress, match="unmapped"):
        client.endpoint.request(number, message, 1.0, (buffer,), None)


def test_forks_beside_threads_that_map_and_unmap(me: Process, kernel: KernelHandle) -> None:
    ended = threading.Event()

    def work(number: int) -> None:
        while not ended.is_set():
            with me.map(PAGE) as one, me.map(2 * PAGE) as two:
                assert (bytes(one), bytes(two)) == (bytes(PAGE), bytes(2 * PAGE))
                one[:], two[:] = bytes([number]) * PAGE, bytes([number]) * 2 * PAGE
                if number % 2:
                    assert me.call("peek", two, 1, PAGE) == bytes([number])
                assert (one[5], two[5]) == (number, number)

    threads = [threading.Thread(target=work, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(30):
            pid = forks.fork()
            if not pid:
                os._exit(len([entry for entry in land_maps(parked=True) if entry.perms == "---s"]))
            assert os.waitpid(pid, 0)[1] == 0
    finally:
        ended.set()
        for thread in threads:
            thread.join(BOUND)
    assert kernel.audit()
    wait_until(lambda: not kernel.stats()["mappings"])
    assert kernel.stats()["stock"] == len(parked())


def test_memory_is_taken_back_while_it_is_used_again() -> None:
    """Both at once, again and again: whose a window is never is in doubt."""
    with realmap.boot(memory_limit=8 * PAGE) as kernel, kernel.connect() as me, kernel.connect() as greedy:
        ended = threading.Event()
        seen: set[bytes] = set()

        def take_back() -> None:
            while not ended.is_set():
                with suppress(PhysicalMemoryExhaustion):
                    greedy.map(8 * PAGE, fragment=2 * PAGE).unmap()

        thread = threading.Thread(target=take_back)
        thread.start()
        try:
            for number in range(1, 3000):
                with suppress(PhysicalMemoryExhaustion), me.map(PAGE) as buffer:
                    seen.add(bytes(buffer[:]))
                    buffer[:] = bytes([number % 255 + 1]) * PAGE
                    assert buffer[:] == bytes([number % 255 + 1]) * PAGE
        finally:
            ended.set()
            thread.join(BOUND)
        assert seen == {bytes(PAGE)}
        assert kernel.audit()


def test_two_processes_have_each_their_own(me: Process, kernel: KernelHandle) -> None:
    (address,) = park(me, PAGE)
    with kernel.connect() as other:
        assert other.map(PAGE).address != address or inode(address) != 0
        assert parked() == [address]
    assert me.map(PAGE).address == address


def test_who_lies_about_parking_hurts_only_itself(me: Process, kernel: KernelHandle) -> None:
    with kernel.connect() as liar:
        client = liar._own_client

        def say(kind: Any, *what: Any) -> Any:
            return client.request(kind(client.next_id(), *what))[0]

        buffer = liar.map(PAGE)
        buffer[:3] = b"abc"
        address = buffer.address
        for place in (PLACES, 1 << 60):
            with pytest.raises(InvalidSize):
                say(messages.Unmap, address, PAGE, place)
        with pytest.raises(InvalidSize):
            say(messages.Unmap, address, 2 * PAGE, 3)
        say(messages.Unmap, address, PAGE, 3)  # it has it mapped as before
        assert stock(kernel) == (1, PAGE)
        with pytest.raises(InvalidAddress):
            say(messages.Unmap, address, PAGE, 4)
        with pytest.raises(InvalidAddress):
            liar.call("peek", buffer, 3, 0)
        other = liar.map(PAGE)
        with pytest.raises(InvalidSize):
            say(messages.Unmap, other.address, PAGE, 3)
        # What it has parked is not in the way of what it says that it inherited.
        assert say(messages.Adopt, me._own_client.secret, [(address, PAGE, 1)]) == [False]
        client.notice(messages.Forked(0, False))  # it has not
        liar.query(address)
        assert stock(kernel) == (0, 0)
        buffer._window._farewell(None, None, None)
    assert me.call("echo", 1) == [1]
    assert bytes(me.map(PAGE)) == bytes(PAGE)


def test_it_is_shown(me: Process, kernel: KernelHandle) -> None:
    (address,) = park(me, 3 * PAGE)
    (process,) = kernel.snapshot().processes
    (row,) = process.stock
    assert (row.address, row.length, row.inode) == (address, 3 * PAGE, inode(address))
    assert (process.bytes, process.mappings) == (0, [])
    command = [sys.executable, "-m", "realmap", "maps", str(os.getpid()), "--kernel", kernel.path]
    text = subprocess.run(command, capture_output=True, text=True, timeout=BOUND).stdout
    assert "parked" in text, text
