"""How long a snapshot takes, and for how long the kernel answers nobody else meanwhile.

    .venv/bin/python tools/snapshot_pause.py [MAPPINGS] [PROCESSES] [ROUNDS]     by default 10000 in 64, 20 times

The pause is seen from outside: one user calls `nop` without a break, its longest wait for an answer is told with
and without snapshots, by turns. What the kernel's own thread does for one is measured there, in CPU time: to take the
picture, which is one pause, the longest of the parts that it is written in, and all of them.
"""

from __future__ import annotations

import itertools
import os
import signal
import statistics
import sys
import time

import realmap

#: So many frames has each process, at most: each takes a descriptor of the kernel. The rest are mapped once more.
OWN = 160


@realmap.syscall
def nop(call: realmap.Call) -> None:
    """Nothing."""


@realmap.syscall
def built(call: realmap.Call) -> list[float]:
    """Seconds to take the picture, for its longest part, and for all of them; bytes of them."""
    at = [time.thread_time()]
    parts = call.kernel._picture().written()
    at.append(time.thread_time())
    size = 0
    for part in parts:
        size += len(part)
        at.append(time.thread_time())
    steps = [after - before for before, after in itertools.pairwise(at[1:])]
    return [at[1] - at[0], max(steps), sum(steps), size]


def user(path: str, mappings: int) -> int:
    """A process with so many mappings of one page, which waits for its end; its pid."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            me = realmap.connect(path)
            keep = [me.map(realmap.PAGE_SIZE) for _ in range(min(mappings, OWN))]
            handle = me.share(keep[0])
            keep += [me.attach(handle) for _ in range(mappings - len(keep))]
            os.write(writer, b"x")
            signal.pause()
            del keep
        finally:
            os._exit(1)
    os.close(writer)
    if not os.read(reader, 1):
        raise SystemExit(f"process {pid} could not map {mappings} pages")
    os.close(reader)
    return pid


def asker(path: str) -> tuple[int, int, int]:
    """A process that takes a snapshot for every byte that it reads, and writes how long it took."""
    (read_order, order), (done, write_done) = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        try:
            from realmap.observe.control import Control

            with Control(path) as control:
                while os.read(read_order, 1):
                    start = time.perf_counter()
                    control.snapshot()
                    os.write(write_done, f"{time.perf_counter() - start:.9f}\n".encode())
        finally:
            os._exit(1)
    return pid, order, done


def longest(me: realmap.Process, seconds: float) -> float:
    """The longest of the calls within so many seconds."""
    worst, end = 0.0, time.perf_counter() + seconds
    before = time.perf_counter()
    while before < end:
        me.call("nop")
        now = time.perf_counter()
        worst = max(worst, now - before)
        before = time.perf_counter()
    return worst


def main() -> None:
    """Measures, and prints milliseconds."""
    mappings, processes, rounds = (int(text) for text in [*sys.argv[1:], *"10000 64 20".split()[len(sys.argv) - 1 :]])
    with realmap.boot(syscalls=[nop, built]) as kernel, kernel.connect() as me:
        users = [user(kernel.path, mappings // processes) for _ in range(processes)]
        pid, order, done = asker(kernel.path)
        took, quiet, paused, inside = [], [], [], []
        for _ in range(rounds):
            quiet.append(longest(me, 0.3))
            os.write(order, b"x")
            paused.append(longest(me, 0.3))
            took.append(float(os.read(done, 100)))
            inside.append(me.call("built"))
        for each in (*users, pid):
            os.kill(each, signal.SIGKILL)
            os.waitpid(each, 0)
    print(f"{mappings // processes * processes} mappings of {processes} processes, {rounds} rounds; milliseconds")
    rows = {
        "a snapshot takes": took,
        "longest call without": quiet,
        "longest call during one": paused,
        "to take the picture": [each[0] for each in inside],
        "the longest part": [each[1] for each in inside],
        "all parts": [each[2] for each in inside],
    }
    for name, found in rows.items():
        print(f"{name:24} median {statistics.median(found) * 1e3:7.2f}  worst {max(found) * 1e3:7.2f}")
    print(f"{int(inside[-1][3])} bytes")


if __name__ == "__main__":
    main()
