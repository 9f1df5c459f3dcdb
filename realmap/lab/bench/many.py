"""Many processes that call one kernel at once: calls in all, and how they are shared out."""

from __future__ import annotations

from contextlib import closing

import psutil

from realmap.lab.bench import programs
from realmap.lab.bench.handlers import bench_nop
from realmap.lab.bench.measure import Batch, Contender, Plan
from realmap.lab.bench.programs import Program
from realmap.lab.bench.run import Bench
from realmap.observe import words
from realmap.system import boot

CROWDS = (1, 2, 8, 64)
#: How long a crowd calls at a time, in milliseconds.
WINDOW, QUICK_WINDOW = 150, 60
FULL, QUICK = Plan(rounds=15, batch_ns=0, race_seconds=14.0), Plan(rounds=5, batch_ns=0, race_seconds=3.0)
#: Of what is called, and its server's script among the peers.
SERVERS = {"call": None, "bare SEQPACKET": "seqpacket", "pyzmq REQ-REP": "pyzmq"}


def measure(bench: Bench) -> None:
    """Each crowd has a server of its own, and waits while it is not its turn."""
    bench.say(f"many: up to {words.counted(CROWDS[-1], 'process')}")
    window = QUICK_WINDOW if bench.quick else WINDOW
    contenders, kernels = [], {}
    shares: dict[str, list[float]] = {}
    for size in CROWDS:
        kernels[size] = kernel = bench.enter_context(boot(syscalls=[bench_nop]))
        for server, script in SERVERS.items():
            crowd = bench.enter_context(closing(programs.crowd(size, kernel.path, script)))
            name = f"{words.counted(size, 'process')}, {server}"
            floor = f"{words.counted(size, 'process')}, bare SEQPACKET" if script is None else None
            batch = _batch(crowd, window, shares.setdefault(name, []))
            contenders.append(Contender(name, batch, floor, window))
    race = bench.race("many", contenders, plan=QUICK if bench.quick else FULL)
    for name, found in shares.items():
        if name in race and not name.startswith("1 "):
            bench.note("many", name, "calls of the slowest / of the fastest", found)
    own = {size: psutil.Process(kernel.pid).memory_full_info().uss for size, kernel in kernels.items()}
    few, most = CROWDS[0], CROWDS[-1]
    bench.note("many", "a process", "the kernel's memory", [(own[most] - own[few]) / (most - few)], "B")


def _batch(crowd: Program, window: int, shares: list[float]) -> Batch:
    def batch(count: int) -> int:
        took = crowd.ask("all", count)
        if count == window:  # the others are to warm up
            shares.append(crowd.ask("share", 1000) / 1000)
        return took

    return batch
