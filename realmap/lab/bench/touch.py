"""What it costs to touch a few bytes of a buffer, beside a bytearray."""

from __future__ import annotations

from timeit import Timer

from realmap.lab.bench.measure import Batch, Contender
from realmap.lab.bench.run import Bench
from realmap.pages import PAGE_SIZE

WAYS = ("{}[0]", "{}[0] = 1", "{}[8:24]")


def measure(bench: Bench) -> None:
    bench.say("touch")
    _, me = bench.kernel()
    with me.map(PAGE_SIZE) as buffer:
        memories = {"bytearray": bytearray(PAGE_SIZE), "Buffer": buffer}

        def batch(statement: str) -> Batch:
            timer = Timer(statement, globals=memories)
            return lambda count: int(timer.timeit(count) * 1e9)

        contenders = []
        for way in WAYS:
            theirs, ours = way.format("bytearray"), way.format("Buffer")
            contenders += [Contender(theirs, batch(theirs)), Contender(ours, batch(ours), theirs)]
        bench.race("touch", contenders)
