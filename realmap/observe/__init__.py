"""What is going on: a snapshot of a kernel's books, and an audit of them against Linux.

The kernel knows nothing of it.
"""

from realmap.observe.audit import AuditReport, Difference, audit
from realmap.observe.snapshot import Snapshot

__all__ = ["AuditReport", "Difference", "Snapshot", "audit"]
