"""What it costs to touch a few bytes of a buffer, beside a bytearray."""

from __future__ import annotations

from realmap.lab.bench.measure import Contender, timed
from realmap.lab.bench.run import Bench
from realmap.pages import PAGE_SIZE

WAYS = ("{}[0]", "{}[0] = 1", "{}[8:24]")


def measure(bench: Bench) -> None:
    bench.say("touch")
    _, me = bench.kernel()
    with me.map(PAGE_SIZE) as buffer:
        contenders = []
        for way in WAYS:
            theirs, ours = way.format("bytearray"), way.format("Buffer")
            contenders.append(Contender(theirs, timed(theirs, bytearray=bytearray(PAGE_SIZE))))
            contenders.append(Contender(ours, timed(ours, Buffer=buffer), theirs))
        bench.race("touch", contenders)
