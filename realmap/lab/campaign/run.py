"""All runs of a campaign: on each host one after the other. Who is lost is noted, and the others go on."""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress

import msgspec

from realmap.lab.campaign.cluster import Cluster
from realmap.lab.campaign.here import Here
from realmap.lab.campaign.plan import Plan
from realmap.lab.campaign.report import FAILED, FORM, LOST, OK, Host, Report, merged
from realmap.lab.campaign.work import Lost, Outcome
from realmap.wire.messages import VERSION

#: Between two looks at what has happened. Seconds.
SOON = 0.5


#: Called with a host's name, a line about it, and whether that is news or only how it goes.
Say = Callable[[str, str, bool], None]


class Campaign:
    def __init__(self, plan: Plan, where: Here | Cluster, say: Say) -> None:
        self._plan = plan
        self._where = where
        self._say = say
        self._began = time.monotonic()
        self._stopped = False

    def run(self) -> Report:
        """All of it. Ctrl-C ends the runs, and what they had found is reported; again, and nothing is."""
        with ThreadPoolExecutor(len(self._where.hosts)) as pool:
            running = [pool.submit(self._host, host) for host in range(len(self._where.hosts))]
            try:
                while wait(running, SOON).not_done:  # a Ctrl-C that another thread took is seen when this one wakes up
                    pass
            except KeyboardInterrupt:
                self._stopped = True
                self._where.stop()
                while wait(running, SOON).not_done:  # one may have begun just now
                    self._where.stop()
            hosts = [each.result() for each in running]
        kinds = merged(hosts) if self._plan.command == "stress" else {}
        ok = all(host.state == OK for host in hosts)
        return Report(FORM, VERSION, self._plan, ok, time.monotonic() - self._began, hosts, kinds)

    def _host(self, at: int) -> Host:
        host = Host(self._where.hosts[at], note=self._where.notes[at])
        began, turn = time.monotonic(), 0
        if host.note:
            self._say(host.name, host.note, True)
        while not self._stopped and host.state == OK and self._plan.goes_on(turn, time.monotonic() - self._began):
            arguments = self._plan.arguments_of(at, turn)
            host.earlier, host.report = host.reports, None
            host.replay = shlex.join(["realmap", *arguments])
            self._say(host.name, host.replay, True)
            try:
                outcome = self._where.run(at, arguments, lambda line: self._say(host.name, line, False))
            except (Lost, OSError) as error:
                host.state, host.why = LOST, str(error)
            else:
                self._take(host, outcome)
            turn += 1
        host.seconds = time.monotonic() - began
        if host.state == OK and self._stopped:
            host.state, host.why = LOST, "the campaign was interrupted"
        self._say(host.name, f"{host.state}: {host.why}" if host.why else f"{host.state} ({host.seconds:.1f} s)", True)
        return host

    def _take(self, host: Host, outcome: Outcome) -> None:
        host.machine = outcome.machine
        with suppress(msgspec.DecodeError):  # nothing, or half of it
            host.report = msgspec.json.decode(outcome.report)
        if self._stopped:
            host.state, host.why = LOST, "the campaign was interrupted"
        elif outcome.status < 0:
            host.state, host.why = LOST, f"its run was killed ({signal.Signals(-outcome.status).name})"
        elif outcome.status:
            found = (host.report or {}).get("failures")
            host.state, host.why = FAILED, "; ".join(found) if found else outcome.said
