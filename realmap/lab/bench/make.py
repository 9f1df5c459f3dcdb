"""What it costs to make memory that can be shared, and to give it back."""

from __future__ import annotations

from realmap.lab.bench.access import PAGES
from realmap.lab.bench.measure import Contender, timed
from realmap.lab.bench.run import Bench
from realmap.observe import words
from realmap.pages import PAGE_SIZE

SIZES = [4 << 10, 64 << 10, 1 << 20, 16 << 20]
QUICK_SIZES = [4 << 10, 1 << 20]
TOUCHED_SIZES = [1 << 20, 64 << 20]
DROP_IN = "realmap.shared_memory"


def measure(bench: Bench) -> None:
    """By size. realmap takes the space when it makes it; the peers at first touch: so also with all pages touched."""
    _, me = bench.kernel()
    shared, drop_in = bench.peer("shared_memory"), bench.peer("drop_in")
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
            Contender("SharedMemory", shared.batch("make", size), "C shm_open … close"),
            Contender("posix_ipc by hand", bench.peer("posix_ipc").batch("make", size), "C shm_open … close"),
            Contender(DROP_IN, drop_in.batch("make", size), "SharedMemory"),
        ]
        bench.race("make", contenders, size)
    for size in TOUCHED_SIZES:
        bench.say(f"make: {words.size(size)}, touched")
        ones = bytes(size // PAGE_SIZE)

        def touched(size: int = size, ones: bytes = ones) -> None:
            with me.map(size) as buffer, memoryview(buffer) as view:
                view[::PAGE_SIZE] = ones

        contenders = [
            Contender("SharedMemory", shared.batch("make_touched", size)),
            Contender("map + unmap", timed(touched), "SharedMemory"),
            Contender(DROP_IN, drop_in.batch("make_touched", size), "SharedMemory"),
        ]
        bench.race("make", contenders, size, PAGES)
