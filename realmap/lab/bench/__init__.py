"""The bench: what reaching memory, calling and making cost on this machine, beside a C floor and the peers.

programs   what only a checkout has (tools/bench): the C floor and the peers, as processes, and the project's limits
measure    rounds of many contenders, interleaved; medians, spreads, ratios
machine    what the figures depend on
handlers   what runs in the kernel process
crowd      many processes that call one server: a program of its own
access call many make attach touch handover scale serve sync    what is measured
report     what comes out
"""

from realmap.lab.bench.report import Report
from realmap.lab.bench.run import GROUPS, run

__all__ = ["GROUPS", "Report", "run"]
