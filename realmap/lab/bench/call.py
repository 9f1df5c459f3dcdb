"""What a call costs, there and back: spinning and blocking, pinned to two CPUs and not; in asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator

import psutil

from realmap.lab.bench.measure import Contender, timed
from realmap.lab.bench.run import Bench
from realmap.system import KernelHandle

SHORT = 64
TOGETHER = 100


@contextlib.contextmanager
def pinned(kernels: list[KernelHandle], pin: bool) -> Iterator[None]:
    """This process on one CPU and the kernels on another, and afterwards as before."""
    if not pin:
        yield
        return
    cpus = sorted(os.sched_getaffinity(0))
    others = [psutil.Process(kernel.pid) for kernel in kernels]
    for process in others:
        process.cpu_affinity([cpus[1]])
    os.sched_setaffinity(0, [cpus[0]])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cpus)
        for process in others:
            process.cpu_affinity(cpus)


def measure(bench: Bench) -> None:
    """Round trips, with every peer in the same rounds."""
    spinning, me = bench.kernel()
    blocking, blocked = bench.kernel(spin=0)
    buffer = me.map(SHORT)
    cpus = len(os.sched_getaffinity(0))
    for pin in (False, True):
        if pin and cpus < 2:
            bench.missing("calls pinned to two CPUs", "there is only one")
            break
        bench.say(f"call: {'pinned to two CPUs' if pin else 'not pinned'}")
        flag = int(pin)
        pipe, iceoryx, packets = bench.peer("pipe"), bench.peer("iceoryx2"), bench.peer("seqpacket")
        contenders = [
            Contender("C spin", lambda count, flag=flag: bench.floor.ask("spin", count, flag)),  # type: ignore[misc]
            Contender("call", timed(lambda: me.call("bench_nop")), "C spin"),
            Contender("Pipe with pickle", pipe.batch("call", after=(flag,)), "C spin"),
            Contender("iceoryx2", iceoryx.batch("call", after=(flag,)), "C spin"),
            Contender("call, 64 bytes by copy_in", timed(lambda: me.call("bench_take", buffer)), "C spin"),
            Contender("Pipe, 64 bytes", pipe.batch("bytes", SHORT, after=(flag,)), "C spin"),
            Contender("C socket", bench.floor.batch("socket", after=(flag,))),
            Contender("call, spin=0", timed(lambda: blocked.call("bench_nop")), "C socket"),
            Contender("bare SEQPACKET", packets.batch("call", after=(flag,)), "C socket"),
        ]
        with pinned([spinning, blocking], pin):
            bench.race("call", contenders, None, "pinned" if pin else "not pinned")
    buffer.unmap()
    _in_asyncio(bench)


def _in_asyncio(bench: Bench) -> None:
    bench.say("call: asyncio")
    _, me = bench.kernel()
    peer = bench.peer("asyncio")

    def one_by_one(count: int) -> int:
        async def calls() -> None:
            for _ in range(count):
                await me.acall("bench_nop")

        return timed(lambda: runner.run(calls()))(1)

    def together(count: int) -> int:
        rounds = -(-count // TOGETHER)

        async def calls() -> None:
            for _ in range(rounds):
                await asyncio.gather(*[me.acall("bench_nop") for _ in range(TOGETHER)])

        return timed(lambda: runner.run(calls()))(1) * count // (rounds * TOGETHER)

    echo, hundred = "asyncio echo", f"{TOGETHER} at a time, each"
    with asyncio.Runner() as runner:
        contenders = [
            Contender(echo, peer.batch("call")),
            Contender("acall", one_by_one, echo),
            Contender(f"asyncio echo, {hundred}", peer.batch("hundred"), echo),
            Contender(f"acall, {hundred}", together, echo),
        ]
        bench.race("call", contenders, None, "asyncio")
