"""What is going on: a snapshot of a kernel's books, an audit of them against Linux, and a trace of what happens.

The kernel knows nothing of it.
"""

from realmap.observe.audit import AuditReport, Difference, Faulted, audit
from realmap.observe.control import Control
from realmap.observe.snapshot import Snapshot
from realmap.observe.trace import Trace

__all__ = ["AuditReport", "Control", "Difference", "Faulted", "Snapshot", "Trace", "audit"]
