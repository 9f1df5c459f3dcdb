"""Whether it stays as fast with many mappings, many live mirrors, many processes."""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import time

from realmap.errors import KernelError
from realmap.host import forks
from realmap.lab.bench.call import timed
from realmap.lab.bench.measure import STEADY, Absent, Batch, Contender, spread
from realmap.lab.bench.report import Figure, Spread
from realmap.lab.bench.run import Bench
from realmap.memory.cross_process import CrossProcessMapping
from realmap.memory.frames import FrameAllocator
from realmap.memory.kernel_memory import KernelMemory
from realmap.memory.lands import KERNEL_LAND, USER_LAND
from realmap.memory.process_memory import ProcessMemory
from realmap.pages import PAGE_SIZE
from realmap.rights import MemoryType, u_rw
from realmap.system import boot
from realmap.user.process import Process

FEW, MANY = 100, 100_000
#: Beside one live mirror each takes an entry of vm.max_map_count (65 530), and a hole behind it.
MIRRORS = 30_000
#: How long 64 processes may take to connect, and how long a change in who is stopped takes to settle. Seconds.
PATIENCE, SETTLE = 60.0, 0.02
PR_SET_PDEATHSIG = 1
CROWDS = [1, 2, 4, 8, 16, 32, 64]
QUICK_CROWDS = [1, 2, 8, 64]


def measure(bench: Bench) -> None:
    """Each against the same with few."""
    _mappings(bench)
    _mirrors(bench)
    _processes(bench)


def _land(part: int) -> KernelMemory:
    """A KernelLand of this process's own, apart from the others."""
    length = KERNEL_LAND.length // 4
    return KernelMemory(KERNEL_LAND.start + part * length, length)


def _mappings(bench: Bench) -> None:
    bench.say(f"scale: {MANY} mappings")
    kernel = _land(0)
    memories = {}
    for count in (FEW, MANY):
        memory = memories[count] = ProcessMemory()
        frames = memory.allocator.allocate(16 * PAGE_SIZE)
        for index in range(count):
            memory.map_partial_shared_mapping(
                frames,
                USER_LAND.start + index * 2 * PAGE_SIZE,
                index % 16 * PAGE_SIZE,
                PAGE_SIZE,
                MemoryType.SHARED_MEMORY,
                u_rw,
            )

    def batch(memory: ProcessMemory, count: int) -> Batch:
        # Spread over all of them; every address is looked up anew.
        spread_out = range(0, count, max(1, count // FEW))
        addresses = itertools.cycle([USER_LAND.start + index * 2 * PAGE_SIZE + 8 for index in spread_out])
        return timed(lambda: memory.mirror_mapping(next(addresses), 64, kernel=kernel).drop())

    few, many = f"lookup + mirror + drop, {FEW} mappings", f"lookup + mirror + drop, {MANY} mappings"
    bench.race(
        "scale",
        [
            Contender("C map plain", bench.floor.batch("map", PAGE_SIZE, after=("none", "plain"))),
            Contender(few, batch(memories[FEW], FEW), "C map plain"),
            Contender(many, batch(memories[MANY], MANY), few),
        ],
        work="mappings",
    )
    for memory in memories.values():
        memory.release_all()


def _mirrors(bench: Bench) -> None:
    bench.say(f"scale: {MIRRORS} live mirrors")
    frames = FrameAllocator().allocate(16 * PAGE_SIZE)
    memory = ProcessMemory()
    mapping = memory.create_regular_mapping(
        USER_LAND.start, frames.length, MemoryType.SHARED_MEMORY, u_rw, frames=frames
    )
    alone, crowded = _land(1), _land(2)

    def batch(kernel: KernelMemory) -> Batch:
        return timed(lambda: CrossProcessMapping.mirror_mapping(mapping, 8, 64, kernel=kernel).drop())

    none, beside = "mirror + drop, no others", f"mirror + drop beside {MIRRORS}"
    held: list[CrossProcessMapping] = []

    def with_others(times: int) -> int:
        while len(held) < MIRRORS:
            held.append(CrossProcessMapping.mirror_mapping(mapping, 0, 1, kernel=crowded))
        return batch(crowded)(times)

    def without(times: int) -> int:
        held.clear()
        return batch(alone)(times)

    bench.race("scale", [Contender(none, without), Contender(beside, with_others, none)], work="mirrors")
    held.clear()
    memory.release_all()


# ---- processes ----------------------------------------------------------------------------


def crowd(me: Process, count: int) -> None:
    """`count` forked users of the kernel of `me`, which call as fast as they can until this process ends."""
    for _ in range(count):
        if forks.fork() == 0:
            # Also where it is stopped at that moment: the end of its parent is its end.
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            try:
                with Process(me.path) as user:
                    while True:
                        user.call("bench_nop")
            except KernelError:
                pass
            finally:
                os._exit(0)
    signal.pause()


def _processes(bench: Bench) -> None:
    """All of them are there from the start; those whose turn it is not are stopped."""
    from realmap.lab.bench.handlers import HANDLERS  # needs numpy

    sizes = QUICK_CROWDS if bench.quick else CROWDS
    window, rounds = (0.08, 5) if bench.quick else (0.25, 15)
    bench.say(f"scale: {sizes[-1]} processes")
    rates: dict[int, list[float]] = {size: [] for size in sizes}
    with boot(syscalls=HANDLERS) as kernel:
        spawned = kernel.spawn(crowd, sizes[-1])
        end = time.monotonic() + PATIENCE
        while kernel.stats()["processes"] < sizes[-1] + 1:
            if time.monotonic() > end:
                raise Absent(f"{sizes[-1]} processes did not connect within {PATIENCE} s")
            time.sleep(0.01)
        pids = [process.pid for process in kernel.snapshot().processes if process.pid != spawned.pid]
        for _ in range(rounds):
            for size in sizes:
                for rank, pid in enumerate(pids):
                    try:
                        os.kill(pid, signal.SIGCONT if rank < size else signal.SIGSTOP)
                    except ProcessLookupError:
                        raise Absent(f"one of {sizes[-1]} processes has died") from None
                time.sleep(SETTLE)
                start, before = time.monotonic(), kernel.stats()["calls"]
                time.sleep(window)
                calls = kernel.stats()["calls"] - before
                rates[size].append(max(1, calls) / (time.monotonic() - start))
    names = {size: f"a call, {size} process{'es' if size > 1 else ''} calling" for size in sizes}
    times = {names[size]: [1e9 / rate for rate in found] for size, found in rates.items()}

    def ratio(name: str, floor: str) -> Spread:
        return spread([mine / theirs for mine, theirs in zip(times[name], times[floor], strict=True)])

    two = names[2]
    for name, found in times.items():
        took = spread(found)
        unsteady = took.p90 - took.p10 > STEADY * took.median
        floor, against = (None, None) if name == two else (two, ratio(name, two))
        figure = Figure("scale", name, None, "processes", floor, took, against, rounds, 1, unsteady)
        bench.report.figures.append(figure)
    bench.hold("scale", None, "processes", ratio)
