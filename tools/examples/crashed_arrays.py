"""A worker of a multiprocessing program has crashed, and its parent waits for ever. How far had it come? The program
knows nothing of realmap: its arrays are found, and read in place, from outside; they stay after it is killed."""

import subprocess
import sys

import numpy

import realmap

PROGRAM = """
import ctypes, multiprocessing, sys

def work(results, steps):
    for step in range(len(results)):
        if step == 613:
            ctypes.string_at(0)  # the crash
        results[step] = step / 2 + 1
        steps.value += 1

if __name__ == "__main__":
    fork = multiprocessing.get_context("fork")
    results, steps = fork.RawArray("d", 1000), fork.RawValue("q")
    worker = fork.Process(target=work, args=(results, steps))
    worker.start()
    worker.join()
    print(worker.exitcode, flush=True)
    sys.stdin.read()  # and here it hangs
"""

with subprocess.Popen(
    [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
) as child:
    print("a worker of process", child.pid, "ended with", child.stdout.readline().strip())
    with realmap.ForeignProcess(child.pid) as process:
        # multiprocessing keeps its arrays in files called pym-PID-…, which it unlinks at once.
        (arena,) = [each for each in process.mappings() if "/pym-" in each.name]
        print(f"{process.name} has {arena.resident} bytes in memory at {arena.address:#x}, {arena.name}")
        mirror = process.mirror(arena.address, arena.length)
    child.kill()

with mirror:  # the process has ended; its pages have not
    results = mirror.array("float64")[:1000].copy()
done = int(numpy.count_nonzero(results))
print(f"{done} of 1000 results were written, the last is {results[done - 1]}")
assert (done, results[done - 1]) == (613, 307.0)
