"""A 64 MiB array to a worker and back, changed: as a buffer, and by pickling it. Time and peak memory of both.

    big_array.py [MIB] [ROUNDS]        medians over the rounds, which alternate; needs numpy

Peak memory is that of the worker beyond what it has before (VmHWM of /proc/PID/status, which counts shared pages, too).
"""

from __future__ import annotations

import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy

import realmap


def halve(data: Any) -> Any:
    """In the worker: what is a buffer is changed in place; an array comes back."""
    if isinstance(data, realmap.Buffer):
        array = data.array("float64")
        array /= 2
        return None
    data /= 2
    return data


def memory(kind: str) -> int:
    """What the process has (VmRSS), or had at most (VmHWM), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"no {kind} in /proc/self/status")


def ready() -> int:
    """In the worker: its memory before; the peak is counted from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def measure(way: str, values: Any, buffer: realmap.Buffer) -> tuple[float, int]:
    """(seconds, bytes at the peak beyond those before) of one turn in a fresh worker."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        before = executor.submit(ready).result()
        start = time.perf_counter()
        if way == "buffer":
            buffer.array("float64")[:] = values  # the caller's own copy into the buffer counts
            executor.submit(halve, buffer).result()
            result = buffer.array("float64")
        else:
            result = executor.submit(halve, values).result()
        seconds = time.perf_counter() - start
        peak = executor.submit(memory, "VmHWM").result() - before
        assert (result == values / 2).all()
    return seconds, peak


def main(mib: int = 64, rounds: int = 3) -> None:
    """Both ways in turns."""
    values = numpy.random.default_rng(1).random(mib << 17)
    found: dict[str, list[tuple[float, int]]] = {"buffer": [], "pickle": []}
    with realmap.connect() as me, me.map(values.nbytes) as buffer:
        for _ in range(rounds):
            for way, turns in found.items():
                turns.append(measure(way, values, buffer))
    print(f"{mib} MiB to a worker of a ProcessPoolExecutor, halved there, and back; medians of {rounds} rounds")
    for way, turns in found.items():
        seconds, peak = (statistics.median(column) for column in zip(*turns, strict=True))
        spread = f"{min(turns)[0] * 1000:.0f}-{max(turns)[0] * 1000:.0f}"
        print(f"  {way}: {seconds * 1000:6.0f} ms ({spread})   worker's peak: {peak / (1 << 20):6.1f} MiB more")
    ratios = sorted(one[0] / other[0] for one, other in zip(found["buffer"], found["pickle"], strict=True))
    print(f"  buffer / pickle: {statistics.median(ratios):.2f} of the time ({ratios[0]:.2f}-{ratios[-1]:.2f})")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
