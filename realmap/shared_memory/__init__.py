"""Shared memory by name, as in the standard library: change the import, keep the program.

    from realmap.shared_memory import SharedMemory      # was: from multiprocessing.shared_memory import …

A drop-in for `multiprocessing.shared_memory` (https://docs.python.org/3/library/multiprocessing.shared_memory.html)
and for its manager, without its tracker: names are names of this process tree's kernel, which is booted when the first
one is made. Other programs of the same user find them as well.

* A reader's exit, or its crash, never takes the memory from those who still use it; there are no warnings at exit.
* A name ends with `unlink()`, or when the process tree does: with the process that was the first to import this
  module (a worker of multiprocessing counts its parent). Memory lives while anybody has it mapped.
* In a kernel that outlives the tree ($REALMAP_KERNEL), a maker that is killed takes its names along, as soon as no
  process lives that has attached them; one that ends in good order, or with `track=False`, does not.
* Where the kernel itself is killed, what is mapped stays, names are gone, and the next use boots another one.
* With `visible=True`, or $REALMAP_VISIBLE=1 for a whole program and its children, a block has its name in /dev/shm as
  well: for C programs, and for those that list the directory. That name goes with the other one; that of a killed
  kernel is swept by the next one, by `realmap gc`, or by whoever looks for it.
* What others have put into /dev/shm (the standard module, a C program) is attached and unlinked by its name there.
* Space is taken at once: a full /dev/shm is a PhysicalMemoryExhaustion (a MemoryError), not a SIGBUS later.
  `commit=False` takes it at first touch, as the standard module does.
* The size asked for is the size got. `readonly=True` attaches what cannot be written, by page protection.
* A small block that is made, closed and unlinked leaves its memory to the next one, zeroed, as long as nobody else has
  attached it: making one again is a matter of microseconds.
* A small block that this process has attached and closed is parked for its next use, until its name ends: attaching
  it again is a matter of microseconds. What is parked then goes when this process next makes, attaches or closes one,
  forks or ends; it is no more than `Limits(stock=…)`, 2 MiB by default.
* `_fd` and `_mmap`, which many programs use, are real: made when they are first asked for, of the same memory.
"""

from __future__ import annotations

from realmap import ambient
from realmap.shared_memory import tracker
from realmap.shared_memory.block import ShareableList, SharedMemory
from realmap.shared_memory.lookup import _SHM_NAME_PREFIX, _make_filename  # noqa: F401
from realmap.shared_memory.manager import SharedMemoryManager

__all__ = ["ShareableList", "SharedMemory", "SharedMemoryManager"]

# Under the names that the standard library's own tests know.
_USE_POSIX = True

ambient.plant()
tracker.hide()
