"""`realmap stress`: users that map, write, call, fork and are killed, against a kernel that has to bear it.

run          starts the users, replaces the killed, watches the kernel, reports
worker       one user process
actor        does a step of the workload with real buffers and calls
neighbours   does what users do to each other: they serve, and look into one another
operations   steps of one's own, from a module
board        what runner, users and antagonists share: which user is which process
antagonists  what works on users and their pages meanwhile
handlers     what the kernel runs for them
report       what was found
"""

from realmap.lab.stress.operations import operation
from realmap.lab.stress.report import Options, Report, junit
from realmap.lab.stress.runner import check, run

__all__ = ["Options", "Report", "check", "junit", "operation", "run"]
