"""Whether it stays as fast with many mappings and many live mirrors; what a kernel and a mapping take."""

from __future__ import annotations

import itertools
import time

import psutil

from realmap.lab.bench.measure import Batch, Contender, timed
from realmap.lab.bench.run import Bench
from realmap.memory.cross_process import CrossProcessMapping
from realmap.memory.frames import FrameAllocator
from realmap.memory.kernel_memory import KernelMemory
from realmap.memory.lands import KERNEL_LAND, USER_LAND
from realmap.memory.process_memory import ProcessMemory
from realmap.pages import PAGE_SIZE
from realmap.rights import MemoryType, u_rw
from realmap.system import boot

FEW, MANY = 100, 100_000
#: Beside one live mirror each takes an entry of vm.max_map_count (65 530), and a hole behind it.
MIRRORS = 30_000
#: Of one process, whose kernel is asked what it takes for them.
HELD = 2000


def measure(bench: Bench) -> None:
    _mappings(bench)
    _mirrors(bench)
    _boot(bench)


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


def _boot(bench: Bench) -> None:
    bench.say("scale: boot, memory of a mapping")
    times = []
    for _ in range(5):
        start = time.perf_counter_ns()
        with boot() as kernel:
            times.append(time.perf_counter_ns() - start)
    bench.note("scale", "boot", "a kernel", times, "ns")
    with boot() as kernel, kernel.connect() as me:
        memory = psutil.Process(kernel.pid).memory_full_info
        held = [me.map(PAGE_SIZE) for _ in range(FEW)]  # what the first ones take is not of the others
        before = memory().uss
        held += [me.map(PAGE_SIZE) for _ in range(HELD)]
        bench.note("scale", "a mapping", "the kernel's memory", [(memory().uss - before) / HELD], "B")
