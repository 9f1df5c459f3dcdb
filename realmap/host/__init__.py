"""What is asked of Linux, and the only place where errno becomes an error of ours.

translate    OSError -> PhysicalMemoryExhaustion, VirtualMemoryExhaustion, AccessDenied, ...
segment      one POSIX shared-memory segment: made, unlinked at once, its space taken
files        closing, whatever close(2) says
room         how much memory may still be taken, asked before it is taken
cgroups      memory cgroups of both versions: those above this process, and one of its own
paging       system calls about pages that neither Python nor a library of its has
procfs       what /proc says: maps by inode and offset, start times, page frame numbers
stranger     any process: pinned, what it has mapped, and the ways to the files behind that
liveness     who is at the other end of a socket, and when a process dies (pidfds)
shared_segments  every segment of shared memory of the machine, and who has it
reclaim      unlinking names that nobody uses, by a lease
runtime      the directory of sockets, locks and name markers; sweeping what the dead left
interpreter  a fresh Python that runs a function of ours
"""

#: Where POSIX segments have their names.
SHM = "/dev/shm"
