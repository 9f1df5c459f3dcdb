"""The demo: real files, loaded by a user process each, digested in place by the kernel, byte ranges and all.

    driver                     user process, one a file          kernel
      spawn ──────────────────▶ reads its file into its mapping
                                call("demo_digest", slice) ────▶ mirrors just that range, digests it in place
      result ◀───────────────── ◀─────────────────────────────── what it saw: addresses, refcounts, frames
      holds each digest against one made from the file on disk
      call("demo_race", buffer) ───────────────────────────────▶ times a mirror beside a copy, writes into it
      kill -9 of one more, while the kernel holds its mirror; the mirror is read afterwards
      and in the end everything must be gone

What runs in the kernel is here too: the handlers are ordinary syscalls.
"""

from realmap.lab.demo.report import Check, FileReport, KillReport, Report, default_files, plan, ranges_of
from realmap.lab.demo.run import boot, run

__all__ = ["Check", "FileReport", "KillReport", "Report", "boot", "default_files", "plan", "ranges_of", "run"]
