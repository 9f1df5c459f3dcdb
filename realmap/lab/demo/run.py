"""The driver of the demo, and what its user processes do."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

from realmap.errors import KernelError
from realmap.host import runtime
from realmap.lab.demo.handlers import LOOK, SYSCALLS
from realmap.lab.demo.report import Check, FileReport, KillReport, Race, Story, digest
from realmap.system import KernelHandle, SpawnedProcess, boot
from realmap.user import Process

#: How long the driver waits for the next thing to happen, in seconds: a large file on a slow disk.
PATIENCE = 120.0
#: How many bytes are timed, mirrored and copied: few, and many (of a larger file, its first ones).
FEW, MANY = 333, 16 << 20


def owner(me: Process, file: FileReport, numbers: list[int], hold: bool, pace: float) -> None:
    """Loads a file into a mapping of its own, and has the kernel digest ranges of it."""
    buffer = me.map(file.size, fragment=file.fragment)
    with open(file.path, "rb") as source, memoryview(buffer) as view:
        if source.readinto(view) != file.size:
            raise OSError(f"{file.path} changed its size while it was read")
    for number, check in zip(numbers, file.checks, strict=True):
        me.call("demo_digest", number, buffer.slice(check.offset, check.length), pace)
    if hold:
        me.call("demo_hold", buffer)
        signal.pause()  # until it is killed


def run(
    files: list[FileReport],
    on_check: Callable[[Check], None] = lambda check: None,
    trace: str | None = None,
    *,
    on_boot: Callable[[str], None] = lambda path: None,
    on_wait: Callable[[], None] = lambda: None,
    pace: float = 0.0,
) -> Story:
    """Runs the demo on planned files; `on_check` is called after each check. `trace`: a file for a trace of it.

    `on_boot` is called with the kernel's path before anything else happens. `on_wait` is called again and again while
    the demo waits: what it raises ends the demo, with all that it started. `pace`: seconds that each mirror is kept,
    for somebody to see it.

    KernelError: the kernel died, or was silent. OSError: the trace cannot be written.
    """
    with boot(syscalls=SYSCALLS) as kernel, kernel.trace(trace) if trace else nullcontext():
        on_boot(kernel.path)
        baseline = _descriptors(kernel.stats())
        with kernel.connect() as me:
            children = _start(kernel, files, pace)
            held: list[dict[str, Any]] = []
            for check in _collect(me, files, held, on_wait):
                on_check(check)
            races, written = _race(me, files[-1])
            word = held.pop() if held else _next(me, on_wait)
            killed = _kill(kernel, me, files[-1], children[-1], word, lambda: _pause(pace, on_wait))
            for child in children:
                child.join(PATIENCE)
        balance = _balance(kernel, baseline)
    story = Story(files, killed, balance, kernel=kernel.pid, races=races, written=written)
    story.ok = story.holds()
    return story


def _start(kernel: KernelHandle, files: list[FileReport], pace: float) -> list[SpawnedProcess]:
    children: list[SpawnedProcess] = []
    number = 0
    for file in files:
        numbers = list(range(number, number + len(file.checks)))
        number += len(numbers)
        children.append(kernel.spawn(owner, file, numbers, file is files[-1], pace))
        file.pid = children[-1].pid
    return children


def _next(me: Process, on_wait: Callable[[], None]) -> dict[str, Any]:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        on_wait()
        event = me.call("demo_collect", LOOK)
        if event is not None:
            return dict(event)
    raise KernelError(why=f"nothing happened for {PATIENCE:.0f} s: did a user process fail? See its output above")


def _pause(seconds: float, on_wait: Callable[[], None]) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        on_wait()
        time.sleep(min(left, LOOK))


def _collect(
    me: Process, files: list[FileReport], held: list[dict[str, Any]], on_wait: Callable[[], None]
) -> Iterator[Check]:
    """Each check as it comes in; the report of the held mirror, which may come in between, is put aside in `held`."""
    checks = [check for file in files for check in file.checks]
    left = len(checks)
    while left:
        event = _next(me, on_wait)
        if "held" in event:
            held.append(event)
            continue
        check = checks[event.pop("check")]
        for name, value in event.items():
            setattr(check, name, value)
        left -= 1
        yield check


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


def _until(holds: Callable[[], bool]) -> None:
    """Asks until it holds, or until patience ends."""
    end = time.monotonic() + PATIENCE
    while not holds() and time.monotonic() < end:
        time.sleep(0.001)


def _kill(
    kernel: KernelHandle,
    me: Process,
    file: FileReport,
    child: SpawnedProcess,
    held: dict[str, Any],
    pause: Callable[[], None],
) -> KillReport:
    """Kills the owner of the last file while the kernel holds a mirror of it, and has the mirror read afterwards."""
    pause()
    child.kill()
    child.join(PATIENCE)
    # Its death reaches the kernel by its pidfd: only then are its references gone.
    _until(lambda: held["held"] not in [process.pid for process in kernel.snapshot().processes])
    pause()  # the mirror lives on
    read = me.call("demo_read")
    return KillReport(
        held["held"],
        child.exitcode,
        file.size,
        read["digest"],
        file.checks[0].expected,
        (held["refcount"], read["refcount"]),
    )


def _descriptors(stats: dict[str, int]) -> int:
    """Those of the kernel, but for who looks on: `realmap top` may come and go meanwhile."""
    return stats["descriptors"] - stats["controls"]


def _balance(kernel: KernelHandle, baseline: int) -> dict[str, int]:
    """What is left when every user has gone: all of it must be 0."""
    _until(lambda: not kernel.stats()["processes"])
    stats = kernel.stats()
    left = {name: stats[name] for name in ("processes", "segments", "mappings", "mirrors", "bytes")}
    left["descriptors"] = _descriptors(stats) - baseline
    left["names"] = len(runtime.own_names(kernel.pid))
    return left
