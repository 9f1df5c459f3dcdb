"""One run, on its host: `realmap stress` or `realmap bench` as a process, for whichever process there was asked.

    realmap stress … --json (a memory file)      its report
         │ stderr                                 a line about how it goes, now and then
         ▼
    run(…) ── tell(line) ──▶ the campaign         at least every BEAT seconds: who is silent is lost

The process ends by itself, for want of a reader, where the one that runs it is killed.
"""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from realmap.lab import PROGRESS
from realmap.lab.bench import machine

BEAT = 1.0
_running: set[tuple[str, subprocess.Popen[bytes]]] = set()


class Lost(Exception):
    """The end of a run will not be heard of, and why."""


class Outcome(msgspec.Struct, frozen=True):
    """How a run ended: its exit status (a signal: negative), its report as JSON (or nothing), its last line."""

    status: int
    report: bytes
    said: str
    machine: dict[str, str | int | float | bool]


class Identity(msgspec.Struct, frozen=True):
    """Which host this is. `machine`: of this boot, and of this network where containers have networks of their own."""

    machine: str
    name: str
    #: Its clock, in seconds since 1970.
    clock: float


def identity() -> Identity:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return Identity(f"{boot} {os.readlink('/proc/self/ns/net')}", socket.gethostname(), time.time())


def run(campaign: str, arguments: list[str], tell: Callable[[str], None]) -> Outcome:
    """Runs `realmap` with these arguments. Whatever `tell` raises ends it."""
    report = os.memfd_create("realmap-report")
    try:
        with subprocess.Popen(
            [sys.executable, "-m", "realmap", *arguments, "--json", f"/proc/self/fd/{report}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[report],
            env={**os.environ, PROGRESS: "1"},
        ) as process:
            _running.add((campaign, process))
            try:
                said = _listen(process, tell)
            except BaseException:
                process.terminate()
                raise
            finally:
                _running.discard((campaign, process))
        size = os.fstat(report).st_size
        found = os.pread(report, size, 0)
    finally:
        os.close(report)
    return Outcome(process.returncode, found, said, machine.facts())


def _listen(process: subprocess.Popen[bytes], tell: Callable[[str], None]) -> str:
    """Passes its lines on until it closes its stderr; the last one."""
    assert process.stderr is not None
    last, rest, told = "", b"", 0.0
    with selectors.DefaultSelector() as selector:
        selector.register(process.stderr, selectors.EVENT_READ)
        while True:
            ended = process.poll() is not None  # before it is looked for its last line
            if selector.select(0 if ended else BEAT):
                data = os.read(process.stderr.fileno(), 1 << 16)
                if not data:
                    return last
                *lines, rest = (rest + data).split(b"\n")
                last = lines[-1].decode(errors="replace") if lines else last
            elif ended:  # something that it left behind has its stderr
                return last
            if time.monotonic() - told > BEAT / 2:
                told = time.monotonic()
                tell(last)


def stop(campaign: str) -> None:
    """Ends what runs here for that campaign."""
    for owner, process in list(_running):
        if owner == campaign:
            process.terminate()
