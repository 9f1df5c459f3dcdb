"""What is going on: a snapshot of a kernel's books, and an audit of them against Linux.

The kernel knows nothing of it.
"""

from realmap.observe.audit import AuditReport, Difference, Faulted, audit
from realmap.observe.control import Control
from realmap.observe.snapshot import Snapshot

__all__ = ["AuditReport", "Control", "Difference", "Faulted", "Snapshot", "audit"]
