"""The driver of the demo, and what its user processes do."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from realmap import system
from realmap.errors import KernelError
from realmap.host import runtime
from realmap.lab.demo.handlers import LOOK, SYSCALLS
from realmap.lab.demo.report import FileReport, KillReport, Race, Report, digest
from realmap.system import KernelHandle
from realmap.user import Buffer, Process
from realmap.user.spawned import SpawnedProcess

#: How long nothing may happen, in seconds.
PATIENCE = 120.0
#: How many bytes are timed, mirrored and copied: few, and many (of a larger file, its first ones).
FEW, MANY = 333, 16 << 20


def _loaded(me: Process, file: FileReport) -> Buffer:
    buffer = me.map(file.size, fragment=file.fragment)
    with open(file.path, "rb") as source, memoryview(buffer) as view:
        if source.readinto(view) != file.size:
            raise OSError(f"{file.path} changed its size while it was read")
    return buffer


def owner(me: Process, file: FileReport, pace: float) -> list[dict[str, Any]]:
    """Loads a file into a mapping of its own, and has the kernel digest ranges of it; what that saw."""
    buffer = _loaded(me, file)
    return [me.call("demo_digest", buffer.slice(check.offset, check.length), pace) for check in file.checks]


def victim(me: Process, file: FileReport) -> None:
    """Loads a file, has the kernel keep a mirror of it, and waits until it is killed."""
    buffer = _loaded(me, file)
    me.call("demo_hold", buffer)
    signal.pause()


@contextmanager
def boot(trace: str | None = None) -> Iterator[KernelHandle]:
    """The demo's kernel; `trace`: a file for a trace of it. Errors as `realmap.boot`, and OSError of that file."""
    with system.boot(syscalls=SYSCALLS) as kernel, kernel.trace(trace) if trace else nullcontext():
        yield kernel


def run(
    kernel: KernelHandle,
    files: list[FileReport],
    on_check: Callable[[int], None] = lambda done: None,
    *,
    on_wait: Callable[[], None] = lambda: None,
    pace: float = 0.0,
) -> Report:
    """Runs the demo on planned files, with a kernel from `boot`; `on_check` is told how many ranges were digested.

    `on_wait` is called again and again while the demo waits: what it raises ends the demo. `pace`: seconds that each
    mirror is kept, for somebody to see it.

    KernelError: the kernel died, or nothing happened for `PATIENCE` seconds. What a user process failed of is raised
    here.
    """
    baseline = _descriptors(kernel)
    with kernel.connect() as me:
        owners = [kernel.spawn(owner, file, pace) for file in files]
        for child, file in zip(owners, files, strict=True):
            file.pid = child.pid
            _join(me, child, on_check, on_wait)
            for check, seen in zip(file.checks, child.result(), strict=True):
                for name, value in seen.items():
                    setattr(check, name, value)
        races, written = _race(me, files[-1])
        killed = _kill(kernel, me, files[-1], pace, on_wait)
    report = Report(kernel.pid, files, races, written, killed, _balance(kernel, baseline))
    report.ok = report.holds()
    return report


def _join(me: Process, child: SpawnedProcess, on_check: Callable[[int], None], on_wait: Callable[[], None]) -> None:
    """Waits for its end, and tells of what is done meanwhile."""
    before, end = -1, 0.0
    while child.join(LOOK) is None or before < 0:
        on_wait()
        if (done := me.call("demo_digested")) != before:
            before, end = done, time.monotonic() + PATIENCE
            on_check(done)
        elif time.monotonic() > end:
            raise KernelError(why=f"nothing happened for {PATIENCE:.0f} s: is a user process stopped?")


def _pause(seconds: float, on_wait: Callable[[], None]) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        on_wait()
        time.sleep(min(left, LOOK))


def _race(me: Process, file: FileReport) -> tuple[list[Race], bool]:
    """Times a mirror beside a copy of a buffer with the file's bytes, while nothing else runs; then has it written."""
    with open(file.path, "rb") as source:
        content = source.read(MANY)
    races = []
    with me.map(len(content)) as buffer:
        buffer[:] = content
        for length in dict.fromkeys((min(FEW, len(content)), len(content))):
            seen = me.call("demo_race", buffer, length)
            ok = seen.pop("digests") == [digest(content[:length])]
            races.append(Race(length, **seen, ok=ok))
        text = bytes(byte ^ 255 for byte in content[-5:])
        me.call("demo_write", buffer.slice(len(content) - len(text), len(text)), text)
        return races, buffer[:] == content[: -len(text)] + text


def _kill(kernel: KernelHandle, me: Process, file: FileReport, pace: float, on_wait: Callable[[], None]) -> KillReport:
    """Kills an owner of the file while the kernel holds a mirror of it, and has the mirror read afterwards."""
    child = kernel.spawn(victim, file)
    while (before := me.call("demo_held")) is None:
        on_wait()
        if child.join(LOOK) is not None:
            child.result()  # raises what it failed of
    _pause(pace, on_wait)
    child.kill()
    child.join(PATIENCE)
    kernel.settle(PATIENCE)  # its death reaches the kernel by its pidfd: only then are its references gone
    _pause(pace, on_wait)  # the mirror lives on
    read = me.call("demo_read")
    return KillReport(
        child.pid, child.exitcode, file.size, read["digest"], file.checks[0].expected, (before, read["refcount"])
    )


def _descriptors(kernel: KernelHandle) -> int:
    """Those of the kernel, but for who looks on: `realmap top` may come and go meanwhile."""
    stats = kernel.stats()
    return stats["descriptors"] - stats["controls"]


def _balance(kernel: KernelHandle, baseline: int) -> dict[str, int]:
    """What is left when every user has gone: all of it must be 0."""
    kernel.settle(PATIENCE)
    stats = kernel.stats()
    left = {name: stats[name] for name in ("processes", "segments", "mappings", "mirrors", "bytes")}
    left["descriptors"] = _descriptors(kernel) - baseline
    left["names"] = len(runtime.own_names(kernel.pid))
    return left
