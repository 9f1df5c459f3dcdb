"""What it costs to attach memory that another one has made, and to leave it."""

from __future__ import annotations

from realmap.lab.bench.make import DROP_IN
from realmap.lab.bench.measure import Contender, timed
from realmap.lab.bench.run import Bench
from realmap.observe import words
from realmap.rights import u_rw

SIZES = [4 << 10, 1 << 20]


def measure(bench: Bench) -> None:
    _, me = bench.kernel()
    for size in SIZES:
        bench.say(f"attach: {words.size(size)}")
        with me.map(size) as buffer:
            handle = me.share(buffer, u_rw)
            contenders = [
                Contender("SharedMemory", bench.peer("shared_memory").batch("attach", size)),
                Contender("posix_ipc by hand", bench.peer("posix_ipc").batch("attach", size), "SharedMemory"),
                Contender(DROP_IN, bench.peer("drop_in").batch("attach", size), "SharedMemory"),
                Contender("attach + unmap", timed(lambda handle=handle: me.attach(handle).unmap()), "SharedMemory"),  # type: ignore[misc]
            ]
            bench.race("attach", contenders, size)
            me.revoke(handle)
