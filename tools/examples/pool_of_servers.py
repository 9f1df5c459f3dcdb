"""A pool of servers behind one name, under load, while they are killed one after the other and started anew.

    pool_of_servers.py [SECONDS] [SERVERS] [CALLERS]

Each caller adds up numbers by calls and checks every answer. A call whose server is killed is a ServerDied to its
caller, who calls again; no other caller notices, and no number is lost or counted twice: adding is done by the caller.
"""

from __future__ import annotations

import os
import random
import signal
import struct
import sys
import time

import realmap


def square(call: realmap.Call, numbers: realmap.UserBuffer) -> int:
    """The sum of the squares of 64-bit integers."""
    with numbers.mirror(realmap.k_r) as mirror:
        return sum(each * each for each in memoryview(mirror).cast("q"))


def server(me: realmap.Process) -> None:
    """One of the pool."""
    with me.serve(square) as service:
        service.wait()


def caller(me: realmap.Process, seconds: float, seed: int) -> tuple[int, int]:
    """Calls until the time is over: how many answers were right, and how often a server died meanwhile."""
    rng, right, died = random.Random(seed), 0, 0
    buffer = me.map(8 * 100)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        numbers = [rng.randrange(1000) for _ in range(100)]
        buffer[:] = struct.pack("100q", *numbers)
        try:
            answer = me.call("square", buffer, timeout=10)
        except realmap.ServerDied:
            died += 1
        except realmap.UnknownSyscall:  # the last one was killed, and the next has not started yet
            time.sleep(0.01)
        else:
            assert answer == sum(each * each for each in numbers)
            right += 1
    return right, died


def main(seconds: float = 5, servers: int = 3, callers: int = 4) -> None:
    """Starts the pool and the callers, and kills servers meanwhile."""
    with realmap.boot() as kernel:
        pool = [kernel.spawn(server) for _ in range(servers)]
        at_work = [kernel.spawn(caller, seconds, seed) for seed in range(callers)]
        killed = 0
        while any(each.exitcode is None for each in at_work):
            time.sleep(0.5)
            victim = pool.pop(0)
            os.kill(victim.pid, signal.SIGKILL)
            killed += 1
            pool.append(kernel.spawn(server))
        results = [each.result() for each in at_work]
        right, died = (sum(column) for column in zip(*results, strict=True))
        print(f"{right} right answers for {callers} callers; {killed} servers killed, which {died} calls were told of")


if __name__ == "__main__":
    main(*map(float, sys.argv[1:2]), *map(int, sys.argv[2:]))
