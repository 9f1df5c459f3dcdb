"""The guard where Linux has no more maps, or the signal is blocked; and the bound on the maps of a land."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import syscalls
from conftest import BOUND, PAGE, land_maps

import realmap
from realmap import VirtualMemoryExhaustion
from realmap.host import procfs
from realmap.kernel import Kernel
from realmap.memory import CrossProcessMapping, KernelMemory, Mapping, SharedFrames

Make = Callable[..., Mapping]
mirror_mapping = CrossProcessMapping.mirror_mapping
LIMIT = procfs.map_limit()
#: What Linux is said to allow here; what a land then takes at most.
FEW, MOST = 32, 30

SETUP = """
    import os, signal, sys, threading
    import realmap
    from realmap._core import Window
    from realmap.memory import *

    P = realmap.PAGE_SIZE
    mapping = Mapping(0x200000000000, FrameAllocator().allocate(4 * P), 0, 4 * P, realmap.MemoryType.HEAP, realmap.u_rw)
    land = KernelMemory()

    def truncated_mirror():
        mirror = CrossProcessMapping.mirror_mapping(mapping, 5, 4 * P - 5, kernel=land)
        mirror[:] = bytes([7]) * len(mirror)
        os.truncate(f"/proc/self/fd/{mapping.frames.segments[0].fd}", P)
        return mirror

    def touch(mirror, at):
        try:
            mirror[at]
        except realmap.MemoryFault as fault:
            return fault.address - mapping.address
"""


def _run(code: str) -> str:
    script = textwrap.dedent(SETUP) + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=BOUND)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- at Linux's limit of maps -------------------------------------------------------------


@pytest.mark.process
@pytest.mark.skipif(LIMIT > 100_000, reason=f"vm.max_map_count is {LIMIT}: too many to reach here")
@pytest.mark.parametrize(("fewer", "first"), [(0, 5), (2, 2 * PAGE)])
def test_where_no_map_is_left_the_whole_window_gives_way(fewer: int, first: int) -> None:
    """`first`: where the fault is, in the mapping. The last of all maps is one more than Linux says that it allows."""
    out = _run(
        f"""
        mirror = truncated_mirror()
        others = []
        address = 0x210000000000
        try:
            while True:
                others.append(Window._map(address + len(others) * 2 * P, 1, [(-1, 0, P)], 0, P, 0))
        except OSError:
            pass
        for _ in range({fewer}):
            others.pop()._unmap()
        with memoryview(mirror) as view:
            there = view[0]
            gone = view[2 * P - 5]
            front = view[0]
        where = mirror.fault - mirror._base
        for other in others:
            other._unmap()
        try:
            mirror.drop()
        except realmap.MemoryFault as fault:
            print(len(others) > 1000, there, gone, front, where, fault.address - mapping.address, land._maps)
        """
    )
    assert out.split() == ["True", "7", "0", "0" if first < PAGE else "7", str(first), str(first), "0"]


# ---- what a land takes at most ------------------------------------------------------------


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux allows so few maps, as far as a land knows."""
    monkeypatch.setattr(procfs, "map_limit", lambda: FEW)


def test_a_part_of_what_linux_allows_is_left_to_others(kernel_memory: KernelMemory) -> None:
    assert 0 < LIMIT - kernel_memory._most <= LIMIT // 10
    assert int(Path("/proc/sys/vm/max_map_count").read_text()) == LIMIT


def test_live_mirrors_are_bounded(few: None, make_mapping: Make) -> None:
    land, mapping = KernelMemory(), make_mapping(PAGE)
    live = [mirror_mapping(mapping, 0, 9, kernel=land) for _ in range(MOST)]
    for _ in range(2):
        with pytest.raises(VirtualMemoryExhaustion, match=r"vm\.max_map_count") as caught:
            mirror_mapping(mapping, 0, 9, kernel=land)
        assert caught.value.size == PAGE
        assert isinstance(mapping.frames, SharedFrames)
        assert (land.live, land._maps, len(land_maps()), mapping.frames.refcount) == (MOST, MOST, MOST, MOST + 1)
    live.pop().drop()
    live.append(mirror_mapping(mapping, 0, 9, kernel=land))
    for mirror in live:
        mirror.drop()
    assert (land.live, land._maps, land_maps()) == (0, 0, [])


def test_kept_windows_go_first_and_the_ones_kept_longest(few: None, make_mapping: Make) -> None:
    land, mapping = KernelMemory(lazy_unmap=1 << 30), make_mapping(100 * PAGE)
    for page in range(100):
        mirror_mapping(mapping, page * PAGE, 1, kernel=land).drop()
    assert [window.start // PAGE for window in land.kept_windows()] == list(range(100 - MOST, 100))
    assert (land.kept_counts().evictions, len(land_maps())) == (100 - MOST, MOST)
    live = [mirror_mapping(mapping, page * PAGE, 1, kernel=land) for page in range(20)]
    assert [window.start // PAGE for window in land.kept_windows()] == list(range(100 - MOST + 20, 100))
    live += [mirror_mapping(mapping, page * PAGE, 1, kernel=land) for page in range(90, 100)]  # by what is kept
    assert (land.live, land._maps, land.kept_windows(), land.kept_counts().hits) == (MOST, MOST, [], 10)
    with pytest.raises(VirtualMemoryExhaustion):
        mirror_mapping(mapping, 0, 1, kernel=land)
    for mirror in live:
        mirror.drop()
    land._clear_kept()
    assert (land._maps, land_maps()) == (0, [])


def test_each_segment_takes_one(few: None, make_mapping: Make) -> None:
    land, mapping = KernelMemory(lazy_unmap=1 << 30), make_mapping(8 * PAGE, PAGE)
    live = [mirror_mapping(mapping, 0, 8 * PAGE, kernel=land) for _ in range(MOST // 8)]
    with pytest.raises(VirtualMemoryExhaustion, match="wants 8"):
        mirror_mapping(mapping, 0, 8 * PAGE, kernel=land)
    live.append(mirror_mapping(mapping, 0, 6 * PAGE, kernel=land))
    assert (land._maps, len(land_maps())) == (MOST, MOST)
    for mirror in live:
        mirror.drop()
    assert land._maps == len(land_maps()) == 14  # of one range one window is kept
    land._clear_kept()
    assert (land._maps, land_maps()) == (0, [])


@pytest.mark.parametrize("seed", range(5))
def test_the_count_is_that_of_what_is_mapped(few: None, make_mapping: Make, seed: int) -> None:
    rng = random.Random(seed)
    land = KernelMemory(lazy_unmap=40 * PAGE)
    mappings = [make_mapping(40 * PAGE), make_mapping(12 * PAGE, PAGE), make_mapping(12 * PAGE, 3 * PAGE)]
    live: list[CrossProcessMapping] = []
    refused = 0
    for _ in range(400):
        if live and rng.random() < 0.45:
            live.pop(rng.randrange(len(live))).drop()
        else:
            mapping = rng.choice(mappings)
            start = rng.randrange(mapping.length // PAGE)
            length = rng.randint(1, mapping.length // PAGE - start)
            try:
                live.append(mirror_mapping(mapping, start * PAGE, length * PAGE, kernel=land))
            except VirtualMemoryExhaustion:
                refused += 1
        assert land._maps == len(land_maps()) <= MOST
    assert refused
    for mirror in live:
        mirror.drop()
    assert land._clear_kept()
    assert (land._maps, land_maps()) == (0, [])


def test_a_call_is_told(few: None) -> None:
    with Kernel(syscalls=syscalls.ALL, lazy_unmap=1 << 30) as kernel, realmap.connect(kernel.path) as me:
        buffer = me.map(64 * PAGE)
        for page in range(64):
            assert me.call("mirror_with", buffer.slice(page * PAGE, 9), int(realmap.k_r), 0, None)
        assert kernel.memory._maps == MOST
        pieces = me.map(40 * PAGE, fragment=PAGE)
        with pytest.raises(VirtualMemoryExhaustion, match=r"vm\.max_map_count"):
            me.call("mirror_with", pieces, int(realmap.k_r), 0, None)
        assert me.call("mirror_with", pieces.slice(0, 9), int(realmap.k_r), 0, None)


@pytest.mark.slow
@pytest.mark.skipif(LIMIT > 100_000, reason=f"vm.max_map_count is {LIMIT}: too many to reach here")
def test_a_kernel_that_a_client_fills_with_kept_windows() -> None:
    with realmap.boot(syscalls=syscalls.ALL, lazy_unmap=1 << 30) as kernel, kernel.connect() as me:
        buffer = me.map((LIMIT + 500) * PAGE, commit=False)
        short = me.map(3 * PAGE)
        for page in range(LIMIT):
            me.call("mirror_with", buffer.slice(page * PAGE, 9), int(realmap.k_r), 0, None)
        assert LIMIT // 2 < len(procfs.maps(kernel.pid)) < LIMIT - 2000
        for page in range(LIMIT, LIMIT + 100):
            with pytest.raises(realmap.MemoryFault):
                me.call("truncate_and_sum", short, PAGE, "dropped")
            me.call("resize", short, 3 * PAGE)
            me.call("mirror_with", buffer.slice(page * PAGE, 9), int(realmap.k_r), 0, None)
        stats = kernel.stats()
        assert stats["kept_windows"] + stats["kept_evictions"] == LIMIT + 100


# ---- where the signal is blocked ----------------------------------------------------------


@pytest.mark.process
@pytest.mark.parametrize("where", ["here", "in a thread", "once more"])
def test_a_thread_that_blocks_all_signals(where: str) -> None:
    """As a program does that waits for them by sigwait. All but this one stay blocked."""
    out = _run(
        f"""
        def work():
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            print(touch(mirror, 2 * P))
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
            print(*(signal.valid_signals() - blocked - {{signal.SIGKILL, signal.SIGSTOP}}))
        if {where!r} == "once more":
            mirror = truncated_mirror()
            work()
            try:
                mirror.drop()
            except realmap.MemoryFault:
                os.truncate(f"/proc/self/fd/{{mapping.frames.segments[0].fd}}", 4 * P)
        mirror = truncated_mirror()
        if {where!r} == "in a thread":
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        else:
            work()
        """
    )
    told = f"{PAGE + PAGE}\n{int(signal.SIGBUS)}\n"
    assert out == told * (2 if where == "once more" else 1)


@pytest.mark.process
def test_a_users_own_buffer_where_it_is_blocked() -> None:
    name = f"realmap-test-{os.getpid()}-blocked"
    out = _run(
        f"""
        with realmap.boot() as kernel, kernel.connect() as me:
            buffer = me.map(4 * P, name={name!r})
            os.truncate("/dev/shm/{name}", 0)
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            for use in (lambda: buffer[P], lambda: buffer.slice(3 * P, 5)[:], lambda: buffer.__setitem__(0, 1)):
                try:
                    use()
                except realmap.MemoryFault as fault:
                    print(fault.address - buffer.address)
        """
    )
    assert out.split() == [str(PAGE), str(3 * PAGE), str(PAGE)]
