"""Many processes that call one server at once, as fast as they can. A program that takes requests as in programs.py:

python -m realmap.lab.bench.crowd CLIENTS ADDRESS [SCRIPT]

Its clients are users of the kernel at ADDRESS. A SCRIPT brings another server and other clients: `server(address)`
answers a function that serves, `client(address)` one that calls once.

    all COUNT        for COUNT milliseconds each client calls; the time of COUNT calls at the rate of all together
    share COUNT      and then: of COUNT calls of the fastest client, so many had the slowest
"""

from __future__ import annotations

import ctypes
import functools
import os
import runpy
import select
import signal
import struct
import sys
import time
from collections.abc import Callable

from realmap.user.process import Process

Client = Callable[[str], Callable[[], object]]
ROUND = struct.Struct("dd")  # when it starts, when it ends: seconds of the monotonic clock
CALLS = struct.Struct("q")
#: How long the clients have to wake up, all of them, before a round starts. Seconds.
LEAD = 0.02
#: After how long without an answer it is asked whether all of them live. Seconds.
LOOK = 0.5
PR_SET_PDEATHSIG = 1


def user(address: str) -> Callable[[], object]:
    """A client of the kernel at `address`."""
    return functools.partial(Process(address).call, "bench_nop")


def fork(run: Callable[[], None]) -> None:
    """Runs it in a child, which ends with this process."""
    parent = os.getpid()
    if os.fork():
        return
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:
            run()
    finally:
        os._exit(1)


class Crowd:
    """Some clients, each a process."""

    def __init__(self, count: int, client: Client, address: str) -> None:
        """Forks them, and waits until each has called once. ChildProcessError: one has ended."""
        self._answers, answer = os.pipe()
        self._orders = []
        for _ in range(count):
            order, ours = os.pipe()
            self._orders.append(ours)
            fork(lambda order=order: self._be(client, address, order, answer))  # type: ignore[misc]
            os.close(order)
        self._collect()

    @staticmethod
    def _be(client: Client, address: str, orders: int, answer: int) -> None:
        call = client(address)
        call()
        os.write(answer, CALLS.pack(1))
        while True:
            start, end = ROUND.unpack(os.read(orders, ROUND.size))
            time.sleep(max(0.0, start - time.monotonic()))
            calls = 0
            while True:
                call()
                if time.monotonic() >= end:  # what is answered too late does not count
                    break
                calls += 1
            os.write(answer, CALLS.pack(calls))

    def _collect(self) -> list[int]:
        found = bytearray()
        while len(found) < CALLS.size * len(self._orders):
            while not select.select([self._answers], [], [], LOOK)[0]:
                if os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    raise ChildProcessError("a client or the server has ended")
            found += os.read(self._answers, 65536)
        return [calls for (calls,) in CALLS.iter_unpack(found)]

    def run(self, milliseconds: int) -> list[int]:
        """All call at the same time; how often each did."""
        start = time.monotonic() + LEAD
        for order in self._orders:
            os.write(order, ROUND.pack(start, start + milliseconds / 1e3))
        return self._collect()


def main(count: str, address: str, script: str | None = None) -> None:
    """Answers requests until stdin ends."""
    client: Client = user
    if script is not None:
        found = runpy.run_path(script)
        client = found["client"]
        fork(found["server"](address))
    crowd = Crowd(int(count), client, address)
    calls = [1]
    for line in sys.stdin:
        what, count = line.split()
        number = int(count)
        if what == "all":
            calls = crowd.run(number)
            answer = number * number * 1_000_000 // max(1, sum(calls))
        else:
            answer = number * min(calls) // max(1, *calls)
        print("ok", answer, flush=True)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ModuleNotFoundError as error:
        for _ in sys.stdin:
            print("no", f"{error.name} is not installed", flush=True)
    except KeyboardInterrupt:
        pass
