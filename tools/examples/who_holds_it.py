"""A segment was unlinked, and its memory is in use all the same: /dev/shm is full of what has no name. Who has it?"""

import os
import subprocess
import sys
from contextlib import suppress
from multiprocessing import shared_memory

import realmap

READER = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    shown = mmap.mmap(file.fileno(), 0)
print("ready", shown[0], flush=True)
sys.stdin.readline()
if sys.argv[2] != "forgets":
    shown.close()
print("done", flush=True)
sys.stdin.read()
"""


def holders(device, inode):
    """Each process that maps that file, and where; of those that we may look into."""
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        with suppress(realmap.KernelError), realmap.ForeignProcess(pid) as process:  # it has ended, or is not ours
            for each in process.mappings():
                if (each.device, each.inode) == (device, inode):
                    yield process.pid, process.name, each


block = shared_memory.SharedMemory(create=True, size=1 << 20)
block.buf[:9] = b"forgotten"
path = f"/dev/shm/{block.name.lstrip('/')}"
status = os.stat(path)
readers = []
for number in range(5):
    command = [sys.executable, "-c", READER, path, "forgets" if number == 3 else "closes"]
    readers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
for reader in readers:
    reader.stdout.readline()
block.close()
block.unlink()
for reader in readers:
    reader.stdin.write("\n")
    reader.stdin.flush()
    reader.stdout.readline()

found = list(holders(status.st_dev, status.st_ino))
for pid, name, each in found:
    print(f"process {pid}, {name}, has {each.resident} of {each.length} bytes in memory: {each.name}")
    with realmap.ForeignProcess(pid) as process:
        print("it begins with", process.copy_in(each.address, 9))
assert [pid for pid, _, _ in found] == [readers[3].pid]
for reader in readers:
    reader.communicate()
assert not list(holders(status.st_dev, status.st_ino))
print("it has ended, and nobody has the segment any more")
