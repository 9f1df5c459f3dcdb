"""The demo: real files, loaded by a user process each, digested in place by the kernel, byte ranges and all.

    driver                     user process, one a file          kernel
      spawn ──────────────────▶ reads its file into its mapping
                                call("demo_digest", slice) ────▶ mirrors just that range, digests it in place
      collect ◀──────────────────────────────────────────────── what it saw: addresses, refcounts, frames
      holds each digest against one made from the file on disk
      kill -9 of the last one, while the kernel holds its mirror; the mirror is read afterwards
      and in the end everything must be gone

What runs in the kernel is here too: the handlers are ordinary syscalls.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import msgspec

from realmap.errors import InvalidSize, KernelError
from realmap.host import procfs, runtime
from realmap.kernel import Call, UserBuffer, syscall
from realmap.memory.cross_process import CrossProcessMapping
from realmap.memory.frames import SharedFrames
from realmap.pages import PAGE_SIZE, align_down
from realmap.rights import k_r
from realmap.system import KernelHandle, SpawnedProcess, boot
from realmap.user import Process

#: How long the driver waits for the next thing to happen, in seconds: a large file on a slow disk.
PATIENCE = 120.0
#: How often whoever waits looks up, in seconds.
LOOK = 0.1
#: Bytes a segment in every second file, so that ranges cross segments.
FRAGMENT = 5 * PAGE_SIZE


class Check(msgspec.Struct):
    """One range of one file, as the kernel saw it. Addresses, offsets and lengths in bytes."""

    file: int
    offset: int
    length: int
    user_address: int = 0
    kernel_address: int = 0
    segments: int = 0
    #: Of its frames, before, during and after its mirror.
    refcounts: Sequence[int] = (0, 0, 0)
    digest: str = ""
    expected: str = ""
    #: The page frame numbers behind its first and last byte, as its user has them, and the kernel.
    frames: list[tuple[int | None, int | None]] = []

    @property
    def page_offset(self) -> int:
        """Where in its first page the range starts."""
        return self.user_address % PAGE_SIZE

    @property
    def same_frames(self) -> bool | None:
        """Whether user's page and mirror are the same physical frames; None where Linux does not tell (not root)."""
        known = [(user, kernel) for user, kernel in self.frames if user is not None and kernel is not None]
        return all(user == kernel for user, kernel in known) if known else None

    @property
    def ok(self) -> bool:
        """Whether everything about it is as it must be."""
        before, during, after = self.refcounts
        placed = self.kernel_address % PAGE_SIZE == self.page_offset
        counted = during == before + 1 and after == before
        return self.digest == self.expected != "" and placed and counted and self.same_frames is not False


class FileReport(msgspec.Struct):
    """A file, the process that loaded it, and what was checked."""

    path: str
    size: int
    fragment: int | None
    pid: int = 0
    checks: list[Check] = []


class KillReport(msgspec.Struct):
    """The owner that was killed while the kernel held a mirror of its memory."""

    pid: int
    exitcode: int | None
    length: int
    digest: str
    expected: str
    refcounts: tuple[int, int]

    @property
    def ok(self) -> bool:
        """Whether it was killed, and the mirror's bytes stayed what they were, held by the mirror alone."""
        return self.exitcode == -9 and self.digest == self.expected and self.refcounts == (2, 1)


class Report(msgspec.Struct):
    """All that the demo found; `ok` where everything held."""

    files: list[FileReport]
    killed: KillReport | None
    balance: dict[str, int]
    ok: bool = False


# ---- in the kernel ------------------------------------------------------------------------

_events: SimpleQueue[dict[str, Any]] = SimpleQueue()
_held: list[CrossProcessMapping] = []


def _frames_of(data: UserBuffer) -> SharedFrames:
    frames = data.mappings[0].frames
    assert isinstance(frames, SharedFrames)
    return frames


def _digest(mirror: Any) -> str:
    return hashlib.sha256(mirror).hexdigest()


@syscall(blocking=True)
def demo_digest(call: Call, number: int, data: UserBuffer, pace: float) -> None:
    """Digests a range in place, and leaves word of what it saw. The mirror is kept `pace` seconds, to be seen."""
    frames = _frames_of(data)
    before = frames.refcount
    with data.mirror(k_r) as mirror:
        seen = {
            "check": number,
            "user_address": data.address,
            "kernel_address": mirror.address,
            "segments": len(frames.pieces(mirror.mapping.phys_offset + mirror.offset, len(mirror))),
            "digest": _digest(mirror),
            "frames": [
                (procfs.frame_number(call.process.pid, data.address + at), procfs.frame_number(os.getpid(), address))
                for at, address in ((0, mirror.address), (len(data) - 1, mirror.address + len(data) - 1))
            ],
        }
        during = frames.refcount
        end = time.monotonic() + pace
        while call.process.alive and (left := end - time.monotonic()) > 0:  # nobody is kept who is to end
            time.sleep(min(left, LOOK))
    _events.put(seen | {"refcounts": (before, during, frames.refcount)})


@syscall
def demo_hold(call: Call, data: UserBuffer) -> None:
    """Mirrors a buffer and keeps the mirror in use, over the end of this call and of its owner."""
    _held.append(data.mirror(k_r))
    _events.put({"held": call.process.pid, "refcount": _frames_of(data).refcount})


@syscall
def demo_read(call: Call) -> dict[str, Any]:
    """Digests the mirror that is kept, whose owner is dead by now, and drops it."""
    with _held.pop() as mirror:
        frames = mirror.mapping.frames
        assert isinstance(frames, SharedFrames)
        return {"digest": _digest(mirror), "refcount": frames.refcount}


@syscall(blocking=True)
def demo_collect(call: Call, patience: float) -> dict[str, Any] | None:
    """The next thing that a handler left word of; None where nothing came within `patience` seconds."""
    with suppress(Empty):
        return _events.get(timeout=patience)
    return None


SYSCALLS = (demo_digest, demo_hold, demo_read, demo_collect)


# ---- in the user processes ----------------------------------------------------------------


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


# ---- the driver ---------------------------------------------------------------------------


def default_files() -> list[str]:
    """A handful of real files that every Python installation has, some MB in all.

    Of its library, and the interpreter.
    """
    library = Path(sysconfig.get_path("stdlib"))
    candidates = [path for folder in (".", "pydoc_data", "lib-dynload") for path in (library / folder).glob("*.*")]
    largest = sorted((path for path in candidates if path.is_file()), key=lambda path: path.stat().st_size)[-6:]
    shared = Path(str(sysconfig.get_config_var("LIBDIR")), str(sysconfig.get_config_var("INSTSONAME")))
    interpreter = shared if shared.is_file() else Path(sys.executable).resolve()
    return [str(path) for path in dict.fromkeys([library / "this.py", *largest, interpreter]) if path.is_file()]


def ranges_of(size: int) -> list[tuple[int, int]]:
    """The (offset, length) that are checked of a file of `size` bytes.

    Whole, odd, across pages and segments, one byte.
    """
    wanted = [
        (0, size),
        (1, size - 2),
        (0, 1),
        (size - 1, 1),
        (PAGE_SIZE - 1, 2),
        (FRAGMENT - 7, 14),
        (FRAGMENT + 3, 3 * FRAGMENT + 5),
        (align_down(size - 1), size - align_down(size - 1)),
        (size // 3 | 1, 3333),
    ]
    return [
        (offset, length)
        for offset, length in dict.fromkeys(wanted)
        if offset >= 0 and length > 0 and offset + length <= size
    ]


def plan(paths: Iterable[str]) -> list[FileReport]:
    """What is to be checked of each file, with the digests of its bytes on disk.

    OSError: a file cannot be read. InvalidSize: it is empty, and there is nothing to map.
    """
    files = []
    for number, path in enumerate(paths):
        if not os.path.getsize(path):
            raise InvalidSize(0, why=f"{path} is empty: there is nothing to map")
        content = memoryview(Path(path).read_bytes())
        size = len(content)
        checks = [
            Check(number, offset, length, expected=_digest(content[offset : offset + length]))
            for offset, length in ranges_of(size)
        ]
        files.append(FileReport(str(path), size, FRAGMENT if number % 2 and size > FRAGMENT else None, checks=checks))
    return files


def run(
    files: list[FileReport],
    on_check: Callable[[Check], None] = lambda check: None,
    trace: str | None = None,
    *,
    on_boot: Callable[[str], None] = lambda path: None,
    on_wait: Callable[[], None] = lambda: None,
    pace: float = 0.0,
) -> Report:
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
            word = held.pop() if held else _next(me, on_wait)
            killed = _kill(kernel, me, files[-1], children[-1], word, lambda: _pause(pace, on_wait))
            for child in children:
                child.join(PATIENCE)
        balance = _balance(kernel, baseline)
    checks = [check for file in files for check in file.checks]
    ok = all(check.ok for check in checks) and killed.ok and not any(balance.values())
    return Report(files, killed, balance, ok)


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
    """Each check as it comes in; word of the held mirror, which may come in between, is put aside in `held`."""
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
    left["names"] = sum(name.startswith(runtime.SEGMENT_PREFIX) for name in os.listdir("/dev/shm"))
    return left
