"""What it costs to make memory that can be shared, or to attach it, and to give it back."""

from __future__ import annotations

from realmap.lab.bench.call import timed
from realmap.lab.bench.measure import Contender
from realmap.lab.bench.run import Bench
from realmap.observe import words
from realmap.rights import u_rw

SIZES = [4 << 10, 64 << 10, 1 << 20, 16 << 20]
QUICK_SIZES = [4 << 10, 1 << 20]
DROP_IN = "realmap.shared_memory"


def measure(bench: Bench) -> None:
    """By size. realmap takes the space when it makes it; the peers at first touch, which is not in their figures."""
    _, me = bench.kernel()
    for size in QUICK_SIZES if bench.quick else SIZES:
        bench.say(f"make: {words.size(size)}")
        contenders = [
            Contender("C shm_open … close", bench.floor.batch("make", size)),
            Contender("C with posix_fallocate", bench.floor.batch("make_commit", size)),
            Contender("map + unmap", timed(lambda size=size: me.map(size).unmap()), "C with posix_fallocate"),  # type: ignore[misc]
            Contender(
                "map + unmap, commit=False",
                timed(lambda size=size: me.map(size, commit=False).unmap()),  # type: ignore[misc]
                "C shm_open … close",
            ),
            Contender("SharedMemory", bench.peer("shared_memory").batch("make", size), "C shm_open … close"),
            Contender("posix_ipc by hand", bench.peer("posix_ipc").batch("make", size), "C shm_open … close"),
            Contender(DROP_IN, bench.peer("drop_in").batch("make", size), "SharedMemory"),
        ]
        bench.race("make", contenders, size)
        with me.map(size) as buffer:
            handle = me.share(buffer, u_rw)
            contenders = [
                Contender("SharedMemory", bench.peer("shared_memory").batch("attach", size)),
                Contender(DROP_IN, bench.peer("drop_in").batch("attach", size), "SharedMemory"),
                Contender("attach + unmap", timed(lambda handle=handle: me.attach(handle).unmap()), "SharedMemory"),  # type: ignore[misc]
            ]
            bench.race("make", contenders, size, "attach")
            me.revoke(handle)
