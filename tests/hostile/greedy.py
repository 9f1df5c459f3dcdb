"""A greedy client beside three ordinary ones: what that does to their calls, compared with a fourth ordinary one.

The greedy one has as many blocking calls in flight as the kernel allows it, and maps and unmaps 1 GiB all the
time. Rounds with it and without it take turns in one run; the ratio is that of the ordinary clients' p99.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import socket
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import msgspec

import realmap
from realmap import Call, UserBuffer

SIZE = 64 << 10
GIANT = 1 << 30


@realmap.syscall
def digest(call: Call, data: UserBuffer) -> str:
    """What ordinary clients ask for."""
    with data.mirror(realmap.k_r) as mirror:
        return hashlib.sha256(mirror).hexdigest()


@realmap.syscall(blocking=True)
def slow_digest(call: Call, data: UserBuffer) -> str:
    """What the greedy one asks for."""
    with data.mirror(realmap.k_r) as mirror:
        return hashlib.sha256(mirror).hexdigest()


def ordinary(path: str, out: socket.socket, end: float) -> None:
    """One call after the other; how long each took, in seconds."""
    took = []
    with realmap.connect(path) as me:
        buffer = me.map(SIZE)
        buffer[:] = bytes(range(256)) * (SIZE // 256)
        wanted = hashlib.sha256(buffer).hexdigest()
        while time.monotonic() < end:
            began = time.perf_counter()
            got = me.call("digest", buffer)
            took.append(time.perf_counter() - began)
            if got != wanted:
                raise SystemExit("a wrong answer")
    took.sort()
    out.send(msgspec.json.encode([len(took), took[len(took) // 2], took[int(len(took) * 0.99)], took[-1]]))


def greedy(path: str, out: socket.socket, end: float) -> None:
    """All it can get."""
    counts = {"calls": 0, "refused": 0, "maps": 0}
    with realmap.connect(path) as me:
        large = me.map(16 << 20)

        def call() -> None:
            while time.monotonic() < end:
                try:
                    me.call("slow_digest", large)
                    counts["calls"] += 1
                except realmap.LimitReached:
                    counts["refused"] += 1
                    time.sleep(0.01)

        threads = [threading.Thread(target=call) for _ in range(200)]
        for thread in threads:
            thread.start()
        while time.monotonic() < end:
            with suppress(realmap.PhysicalMemoryExhaustion):
                me.map(GIANT).unmap()
                counts["maps"] += 1
        for thread in threads:
            thread.join()
    out.send(msgspec.json.encode(list(counts.values())))


def at_once(path: str, works: list[Callable[[str, socket.socket, float], None]], seconds: float) -> list[list[float]]:
    """Each in a process of its own for so long; what they tell."""
    started = []
    end = time.monotonic() + seconds
    for work in works:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if not pid:
            status = 1
            try:
                ours.close()
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                work(path, theirs, end)
                status = 0
            finally:
                os._exit(status)
        theirs.close()
        started.append((pid, ours))
    found = []
    for pid, sock in started:
        data = sock.recv(1 << 16)
        sock.close()
        if os.waitpid(pid, 0)[1] or not data:
            raise SystemExit("a client failed")
        found.append(msgspec.json.decode(data, type=list[float]))
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each half of a round")
    parser.add_argument("--json", metavar="FILE")
    asked = parser.parse_args()
    ratios, quiet, beside = [], [], []
    with realmap.boot(syscalls=[digest, slow_digest]) as kernel:
        for number in range(asked.rounds):
            four = at_once(kernel.path, [ordinary] * 4, asked.seconds)[:3]
            three = at_once(kernel.path, [ordinary] * 3 + [greedy], asked.seconds)
            one, other = (statistics.median(found[2] for found in part) for part in (four, three[:3]))
            quiet.append(one)
            beside.append(other)
            ratios.append(other / one)
            calls, refused, maps = three[3]
            print(
                f"round {number + 1}: p99 of the three {one * 1e3:.2f} ms beside a fourth, {other * 1e3:.2f} ms beside "
                f"the greedy one ({calls:.0f} calls, {refused:.0f} refused, {maps:.0f} GiB mapped): {other / one:.2f}",
                flush=True,
            )
    ratios.sort()
    print(
        f"p99 beside a greedy client / beside an ordinary one: {statistics.median(ratios):.2f} "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )
    if asked.json:
        with open(asked.json, "w") as file:
            json.dump({"ratios": ratios, "quiet": quiet, "greedy": beside}, file)


if __name__ == "__main__":
    main()
