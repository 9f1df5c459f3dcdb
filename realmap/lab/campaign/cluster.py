"""The hosts of a running Dask cluster: `--scheduler ADDRESS`. Several workers of one host are one host.

    this process ── submit(_there) ──▶ scheduler ──▶ one worker of each host ── work.run ──▶ realmap stress …
         ◀──────────── a topic: how it goes, every second ────────────┘

Lost is who has left the scheduler, or was not heard of for a while: a cable that is cut says nothing.
"""

from __future__ import annotations

import threading
import time
import uuid
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from realmap.lab.campaign import work

#: How long a scheduler may take to answer at first. Seconds.
CONNECT = 5.0
#: Between two looks at who is still there. Seconds.
LOOK = 0.5
#: A clock may be off by so much before it is said. Seconds.
OFF = 2.0


class NoCluster(ConnectionError):
    """There is no cluster that a campaign can run on, and why."""


class Cluster:
    """A client of the scheduler. `hosts`: their names; `notes`: what is odd about each, or ""."""

    def __init__(self, address: str, patience: float) -> None:
        """NoCluster: no scheduler, of another version, no workers, or not with this realmap."""
        try:
            import distributed
        except ImportError:
            raise NoCluster("--scheduler needs distributed: pip install 'realmap[cluster]'") from None
        self._patience = patience
        self._campaign = f"realmap-{uuid.uuid4()}"
        self._heard: dict[int, float] = {}
        self._tell: dict[int, Callable[[str], None]] = {}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about versions: those that matter are looked at below
                self._client = distributed.Client(address, timeout=CONNECT, set_as_default=False)
        except (OSError, ValueError) as error:
            why = f"no scheduler answers at {address} ({error}); start one: dask scheduler (tcp://HOST:8786 by default)"
            raise NoCluster(why) from None
        try:
            self._require_versions()
            self._addresses = self._find()
        except BaseException:
            self._client.close()
            raise
        self._present = set(self._addresses)
        self._client.subscribe_topic(self._campaign, self._hear)
        self._closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def _require_versions(self) -> None:
        found = self._client.get_versions(check=False, packages=["realmap"])
        workers = {f"worker {address}": facts for address, facts in sorted(found["workers"].items())}
        for who, facts in {"the scheduler": found["scheduler"], **workers}.items():
            for package in ["distributed"] if who not in workers else ["distributed", "realmap"]:
                theirs, ours = facts["packages"][package], found["client"]["packages"][package]
                if theirs != ours:
                    raise NoCluster(
                        f"{who} has {f'{package} {theirs}' if theirs else f'no {package}'}, and this process {ours}; "
                        f"on that host: pip install {package}=={ours}"
                    )
        if not workers:
            raise NoCluster("the scheduler has no workers; start one on each host: dask worker ADDRESS --nthreads 1")

    def _find(self) -> list[str]:
        """A worker of each host. Sets `hosts` and `notes`."""
        before = time.time()
        found: dict[str, work.Identity] = self._client.run(work.identity)
        after = time.time()
        hosts: dict[str, str] = {}
        for worker in sorted(found):
            hosts.setdefault(found[worker].machine, worker)
        names = [found[worker].name for worker in hosts.values()]
        self.hosts, self.notes = [], []
        for worker in hosts.values():
            who = found[worker]
            self.hosts.append(who.name if names.count(who.name) == 1 else f"{who.name}/{worker.partition('://')[2]}")
            ahead = who.clock - min(max(who.clock, before), after)
            side = "ahead of" if ahead > 0 else "behind"
            self.notes.append(f"its clock is {abs(ahead):.0f} s {side} ours" if abs(ahead) > OFF else "")
        return list(hosts.values())

    def _watch(self) -> None:
        while not self._closed.wait(LOOK):
            with suppress(OSError, RuntimeError):  # the scheduler has gone: a future says so, or silence
                self._present = set(self._client.nthreads())

    def _hear(self, event: tuple[float, Any]) -> None:
        host, line = event[1]
        self._heard[host] = time.monotonic()
        self._tell[host](line)

    def run(self, host: int, arguments: list[str], tell: Callable[[str], None]) -> work.Outcome:
        """One run there. work.Lost: its end will not be heard of."""
        worker = self._addresses[host]
        self._tell[host], self._heard[host] = tell, time.monotonic()
        future = self._client.submit(
            _there, self._campaign, host, arguments, workers=[worker], allow_other_workers=False, pure=False
        )
        done = threading.Event()
        future.add_done_callback(lambda _: done.set())
        while not done.wait(LOOK):
            if worker not in self._present:
                raise work.Lost("its worker has left the scheduler")
            if time.monotonic() - self._heard[host] > self._patience:
                raise work.Lost(f"nothing was heard of it for {self._patience:g} s")
        try:
            outcome: work.Outcome = future.result()
        except Exception as error:  # a cluster's own: its worker was killed, the scheduler has gone, …
            raise work.Lost(f"{type(error).__name__}: {error}") from None
        return outcome

    def stop(self) -> None:
        """Ends what runs, wherever it can be told."""
        recent = time.monotonic() - self._patience
        there = [worker for host, worker in enumerate(self._addresses) if self._heard.get(host, 0.0) > recent]
        self._client.run(work.stop, self._campaign, workers=there, on_error="ignore")

    def close(self) -> None:
        self._closed.set()
        self._watcher.join()
        self._client.close()


def _there(campaign: str, host: int, arguments: list[str]) -> work.Outcome:
    from distributed import get_worker

    worker = get_worker()
    return work.run(campaign, arguments, lambda line: worker.log_event(campaign, [host, line]))
