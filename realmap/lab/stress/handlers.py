"""The handlers of a kernel under stress; `realmap kernel --syscalls realmap.lab.stress.handlers` has them, too."""

from __future__ import annotations

import hashlib
import os

from realmap.errors import InvalidHandle
from realmap.kernel import Call, UserBuffer, syscall
from realmap.memory import CrossProcessMapping, SharedFrames
from realmap.rights import k_r
from realmap.serving.registry import marked

_kept: dict[tuple[int, int], CrossProcessMapping] = {}


@syscall
def stress_digest(call: Call, data: UserBuffer) -> str:
    with data.mirror(k_r) as mirror:
        return hashlib.sha256(mirror).hexdigest()


@syscall(blocking=True)
def stress_slow_digest(call: Call, data: UserBuffer) -> str:
    with data.mirror(k_r) as mirror:
        return hashlib.sha256(mirror).hexdigest()


@syscall
def stress_copied_digest(call: Call, data: UserBuffer) -> str:
    return hashlib.sha256(data.copy_in()).hexdigest()


@syscall
def stress_reverse(call: Call, data: UserBuffer) -> None:
    with data.mirror() as mirror:
        mirror[:] = bytes(mirror)[::-1]


@syscall
def stress_fill(call: Call, data: UserBuffer, content: bytes) -> None:
    data.copy_out(content)


@syscall
def stress_copy(call: Call, source: UserBuffer, target: UserBuffer) -> None:
    target.copy_out(source.copy_in())


@syscall
def stress_keep(call: Call, name: int, data: UserBuffer) -> None:
    """Keeps a mirror beyond the call; drops those of processes that have ended."""
    # Other calls may be at it, too, where this one has lost the loop: so the keys first, and each is taken once.
    keys = list(_kept)
    living = {process.pid for process in call.kernel.processes()}
    for key in keys:
        if key[0] not in living and (mirror := _kept.pop(key, None)) is not None:
            mirror.drop()
    _kept[call.process.pid, name] = data.mirror(k_r)


@syscall
def stress_drop(call: Call, name: int) -> str:
    """The digest of a mirror that was kept; drops it."""
    mirror = _kept.pop((call.process.pid, name), None)
    if mirror is None:
        raise InvalidHandle(name, why="no mirror is kept under this name")
    with mirror:
        return hashlib.sha256(mirror).hexdigest()


@syscall
def stress_end(call: Call) -> int:
    """Drops every mirror that is kept; how many there were."""
    count = len(_kept)
    while _kept:
        _kept.popitem()[1].drop()
    return count


@syscall
def stress_where(call: Call, data: UserBuffer) -> list[list[int]]:
    """The kernel's pid and descriptor of each segment of a buffer, and its length: by /proc anybody may truncate it."""
    frames = data.mappings[0].frames
    assert isinstance(frames, SharedFrames)
    return [[os.getpid(), segment.fd, segment.length] for segment in frames.segments]


@syscall(blocking=True)
def stress_read_on(call: Call, data: UserBuffer, rounds: int) -> int:
    """Reads every page of a mirror again and again; how many zeros it has seen at their beginnings."""
    with data.mirror(k_r) as mirror, memoryview(mirror) as view:
        return sum(bytes(view[::4096]).count(0) for _ in range(rounds))


ALL = marked(list(globals().values()))
