"""A scheduler of Dask and its workers, as processes, on ports that Linux chooses; and hosts, as network namespaces."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from conftest import BOUND, wait_until

#: `main` of the command, after a line of our own.
PROGRAM = "{0}\nfrom distributed.cli.dask_{1} import main\nmain()"


class Cluster:
    """A scheduler, and workers in one process each; all of it ends with `close`."""

    def __init__(self, folder: Path, inside: Sequence[str] = (), host: str = "127.0.0.1", first: str = "") -> None:
        """`inside`: what starts it elsewhere (nsenter …). `first`: what the scheduler's interpreter does at first."""
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        file = folder / "scheduler.json"
        self.scheduler = self._start(
            inside, "scheduler", first, "--host", host, "--port", "0", "--no-dashboard", "--scheduler-file", file
        )
        wait_until(lambda: file.exists() and file.stat().st_size, "the scheduler")
        self.address: str = json.loads(file.read_text())["address"]

    def worker(self, inside: Sequence[str] = (), first: str = "", **environment: str) -> subprocess.Popen[bytes]:
        """One more; it need not have joined yet."""
        number = len(self._processes)
        where = self._folder / f"worker{number}"
        return self._start(
            inside, "worker", first, self.address, "--nthreads", "1", "--no-dashboard", "--no-nanny", "--name",
            str(number), "--local-directory", where, **environment,
        )  # fmt: skip

    def joined(self, *processes: subprocess.Popen[bytes]) -> None:
        """Waits until these workers are there."""
        for process in processes:
            log = self._log(process)
            wait_until(lambda log=log: b"Registered to" in log.read_bytes(), "a worker")  # type: ignore[misc]

    def _log(self, process: subprocess.Popen[bytes]) -> Path:
        return self._folder / f"{self._processes.index(process)}.log"

    def _start(
        self, inside: Sequence[str], what: str, first: str, *arguments: object, **environment: str
    ) -> subprocess.Popen[bytes]:
        with open(self._folder / f"{len(self._processes)}.log", "wb") as log:
            process = subprocess.Popen(
                [*inside, sys.executable, "-c", PROGRAM.format(first, what), *map(str, arguments)],
                stdout=log,
                stderr=log,
                cwd=self._folder,
                env={**os.environ, **environment},
            )
        self._processes.append(process)
        return process

    def close(self) -> None:
        """Kills all of it. What a run has started there ends by itself."""
        for process in reversed(self._processes):
            process.kill()
        for process in self._processes:
            process.wait(BOUND)


@contextmanager
def namespaces(count: int) -> Iterator[list[int]]:
    """A network of so many hosts, each a network namespace: pids of processes in each of them, the first in the hub.

    The hub is 10.77.0.1, the others follow; all of it is inside of a namespace of its own, and goes with the processes.
    """
    holders: list[subprocess.Popen[str]] = []

    def hold(*inside: str) -> int:
        shell = "ip link set lo up; echo; exec sleep infinity"
        process = subprocess.Popen([*inside, "unshare", "--net", "sh", "-c", shell], stdout=subprocess.PIPE, text=True)
        holders.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "\n"
        return process.pid

    try:
        hub = hold()
        within(hub, "ip", "link", "add", "name", "bridge", "type", "bridge")
        within(hub, "ip", "address", "add", "10.77.0.1/24", "dev", "bridge")
        within(hub, "ip", "link", "set", "bridge", "up")
        for number in range(count):
            pid = hold()
            within(hub, "ip", "link", "add", f"v{number}", "type", "veth", "peer", "name", "eth0", "netns", str(pid))
            within(hub, "ip", "link", "set", f"v{number}", "master", "bridge", "up")
            within(pid, "ip", "address", "add", f"10.77.0.{number + 2}/24", "dev", "eth0")
            within(pid, "ip", "link", "set", "eth0", "up")
        yield [process.pid for process in holders]
    finally:
        for process in holders:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.wait(BOUND)
            assert process.stdout is not None
            process.stdout.close()


def entered(pid: int) -> list[str]:
    """What starts a command in the network of that process."""
    return ["nsenter", f"--net=/proc/{pid}/ns/net"]


def within(pid: int, *command: str) -> None:
    """Runs it there."""
    subprocess.run([*entered(pid), *command], check=True, capture_output=True, timeout=BOUND)
