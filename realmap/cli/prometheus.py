"""A snapshot as Prometheus reads it: names, units and types by its convention, written by prometheus_client."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from realmap import __version__
from realmap.observe.snapshot import Snapshot
from realmap.observe.words import harmless

#: (metric without its prefix, total of the snapshot, what it is)
GAUGES = [
    ("processes", "processes", "User processes that are connected."),
    ("mappings", "mappings", "Mappings of all user processes."),
    ("mirrors", "mirrors", "Mirrors that live in KernelLand."),
    ("handles", "handles", "Handles that can be attached."),
    ("inheritances", "inheritances", "Ended processes whose forks may still come for what they had."),
    ("segments", "segments", "Segments of shared memory."),
    ("frames_bytes", "bytes", "Bytes of frames."),
    ("stock_segments", "stock", "Segments of small mappings that were unmapped and may be mapped again."),
    ("stock_bytes", "stock_bytes", "Bytes of these."),
    ("kept_windows", "kept_windows", "Dropped mirrors that are kept mapped for their next use."),
    ("kept_bytes", "kept_bytes", "Bytes of dropped mirrors that are kept mapped."),
    ("calls_running", "running", "Calls that have not ended."),
    ("given_up_calls", "given_up", "Handlers at work that nobody waits for, or that lost the kernel's loop."),
    ("taking_processes", "taking", "Processes for which large frames are being taken."),
    ("control_connections", "controls", "Connections that ask and look, without being a process."),
    ("descriptors", "descriptors", "Open descriptors of the kernel's process."),
    ("connections", "connections", "Connections of all kinds."),
    ("half_sent_bytes", "half_sent", "Bytes of messages whose last part has not come."),
    ("unread_bytes", "unread", "Bytes of answers that clients have not read."),
    ("undecoded_bytes", "undecoded", "Bytes of blocking calls that have not ended."),
    ("orphans", "orphans", "Handles that outlived their makers."),
    ("services", "seats", "Services of user processes."),
    ("sessions", "sessions", "Sessions with services."),
    ("grants", "grants", "Mappings that services may map."),
    ("lent_windows", "lent", "Windows of lent pages, in services."),
    ("lent_bytes", "lent_bytes", "Bytes of windows of lent pages."),
    ("worker_threads", "threads", "Threads that run blocking handlers and take large frames."),
]
COUNTERS = [
    ("late_calls", "late", "Calls whose handlers lost the kernel's loop."),
    ("mirrors_made", "mirrored", "Mirrors that were made."),
    ("mirrored_bytes", "mirrored_bytes", "Bytes that mirrors showed when they were made."),
    ("kept_hits", "kept_hits", "Mirrors that a kept window served."),
    ("kept_misses", "kept_misses", "Mirrors that had to be mapped while windows are kept."),
    ("kept_evictions", "kept_evictions", "Kept windows that had to go for others."),
]
LIMITS = [
    ("limit_frames_bytes", "memory_limit", "Bytes of frames that are allowed in all."),
    ("limit_process_frames_bytes", "process_limit", "Bytes of frames that each process may have."),
    ("limit_kept_bytes", "lazy_unmap", "Bytes of dropped mirrors that may be kept mapped."),
    ("limit_process_stock_bytes", "stock", "Bytes of small mappings that may be kept for each process."),
    ("limit_processes", "processes", "Processes that may be connected."),
    ("limit_process_handles", "handles", "Handles that each process may have made."),
    ("limit_process_mappings", "mappings", "Mappings that each process may have."),
    ("limit_process_segments", "segments", "Segments that each process may have."),
    ("kernel_land_bytes", "kernel_land", "Bytes of addresses that KernelLand has."),
]


class _Snapshot(Collector):
    def __init__(self, snapshot: Snapshot) -> None:
        self._now = snapshot

    def collect(self) -> Iterator[Metric]:
        now = self._now
        info = {"version": __version__, "pid": str(now.pid), "path": harmless(now.path)}
        yield InfoMetricFamily("realmap_kernel", "The kernel that this is about.", info)
        for name, total, what in GAUGES:
            yield GaugeMetricFamily(f"realmap_{name}", what, now.stats[total])
        for name, total, what in COUNTERS:
            yield CounterMetricFamily(f"realmap_{name}", what, now.stats[total])
        for name, limit, what in LIMITS:
            value = getattr(now.limits, limit)
            if value is not None:
                yield GaugeMetricFamily(f"realmap_{name}", what, value)
        yield from self._copies()
        yield from self._calls()
        yield from self._processes()

    def _copies(self) -> Iterator[Metric]:
        stats = self._now.stats
        times = CounterMetricFamily("realmap_copies", "Copies without mapping.", labels=["direction"])
        size = CounterMetricFamily("realmap_copied_bytes", "Bytes copied without mapping.", labels=["direction"])
        for direction in ("in", "out"):
            times.add_metric([direction], stats[f"copied_{direction}"])
            size.add_metric([direction], stats[f"copied_{direction}_bytes"])
        yield times
        yield size

    def _calls(self) -> Iterator[Metric]:
        calls = CounterMetricFamily("realmap_calls", "Calls that were taken.", labels=["syscall"])
        failed = CounterMetricFamily("realmap_failed_calls", "Calls that ended in an error.", labels=["syscall"])
        servers = GaugeMetricFamily("realmap_servers", "Services that answer a syscall.", labels=["syscall"])
        for call in self._now.calls:
            calls.add_metric([harmless(call.name)], call.count)
            failed.add_metric([harmless(call.name)], call.failed)
            if call.servers is not None:
                servers.add_metric([harmless(call.name)], call.servers)
        yield calls
        yield failed
        yield servers
        took = GaugeMetricFamily(
            "realmap_handler_seconds", "How long handlers took so far.", labels=["syscall", "quantile"]
        )
        for call in self._now.calls:
            for quantile, seconds in (("0.5", call.p50), ("0.99", call.p99), ("1", call.longest)):
                if seconds is not None:
                    took.add_metric([harmless(call.name), quantile], seconds)
        yield took

    def _processes(self) -> Iterator[Metric]:
        labels = ["process", "pid"]
        mappings = GaugeMetricFamily("realmap_process_mappings", "Mappings of a user process.", labels=labels)
        size = GaugeMetricFamily(
            "realmap_process_frames_bytes", "Bytes of frames that a user process made and that live.", labels=labels
        )
        for process in self._now.processes:
            values = [str(process.number), str(process.pid)]
            mappings.add_metric(values, len(process.mappings))
            size.add_metric(values, process.bytes)
        yield mappings
        yield size


def exposition(snapshot: Snapshot) -> str:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(snapshot))
    return generate_latest(registry).decode()
