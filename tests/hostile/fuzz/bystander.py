"""The well-behaved client beside the hostile ones: bystander.py PATH PHASE. Every answer is checked, and timed.

PHASE is a file whose first byte says what goes on meanwhile; 0 ends it. A line of JSON comes out then.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import signal
import sys
import time
from typing import Any

import realmap

PHASES = ["", "idle", "messages", "states"]
SIZE = 16 << 10
#: Between two pairs of calls: it is a client among others, not a load. Seconds.
PAUSE = 0.001
#: A call that takes longer is a failure. Seconds.
BOUND = 60.0
PR_SET_PDEATHSIG = 1


def summary(nanoseconds: list[int]) -> dict[str, float]:
    """How many calls, and the median, the 99th percentile and the longest, in microseconds."""
    ordered = sorted(nanoseconds)
    if not ordered:
        return {"calls": 0}
    p50, p99 = ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]
    return {"calls": len(ordered), "p50": p50 / 1000, "p99": p99 / 1000, "max": ordered[-1] / 1000}


def watch(path: str, phase: mmap.mmap) -> dict[str, Any]:
    """Makes calls until the phase is 0; the times by phase and syscall, and what went wrong."""
    taken: dict[str, dict[str, list[int]]] = {name: {"nop": [], "sha256": []} for name in PHASES[1:]}
    problems: list[str] = []
    try:
        with realmap.connect(path) as me:
            buffer = me.map(SIZE)
            buffer[:] = os.urandom(SIZE)
            right = hashlib.sha256(buffer[:]).hexdigest()
            while now := phase[0]:
                for name, args, answer in (("nop", (), None), ("sha256", (buffer,), right)):
                    start = time.perf_counter_ns()
                    got = me.call(name, *args, timeout=BOUND)
                    taken[PHASES[now]][name].append(time.perf_counter_ns() - start)
                    if got != answer:
                        problems.append(f"{name} answered {got!r}, not {answer!r}")
                time.sleep(PAUSE)
            if hashlib.sha256(buffer[:]).hexdigest() != right:
                problems.append("the bytes of its buffer are others")
    except Exception as error:
        problems.append(f"{type(error).__name__}: {error}")
    times = {name: {call: summary(found) for call, found in calls.items()} for name, calls in taken.items()}
    return {"times": times, "problems": problems[:20]}


def main() -> None:
    """Watches."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with open(sys.argv[2], "r+b") as file, mmap.mmap(file.fileno(), 1) as phase:
        result = watch(sys.argv[1], phase)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
