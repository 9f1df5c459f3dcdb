"""Handlers that the tests' kernels run. Imported by name in the kernel's process."""

from __future__ import annotations

import gc
import hashlib
import os
import tempfile
import threading
import time
import weakref
from collections import defaultdict
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

import realmap
from realmap import Call, UserBuffer, syscall
from realmap.memory import SharedFrames

gate: SimpleQueue[Any] = SimpleQueue()
gates: defaultdict[str, SimpleQueue[Any]] = defaultdict(SimpleQueue)
kept: dict[str, Any] = {}
by_process: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


@syscall
def nop(call: Call) -> None:
    """Nothing."""


@syscall
def echo(call: Call, *args: Any) -> list[Any]:
    """The plain arguments again."""
    return [[arg.address, len(arg)] if isinstance(arg, UserBuffer) else arg for arg in args]


@syscall
def numbered(call: Call, values: list[Any]) -> dict[int, Any]:
    """Each with its number."""
    return dict(enumerate(values))


@syscall
def who(call: Call) -> list[Any]:
    """Who calls, what, and where it runs."""
    return [call.process.pid, call.name, os.getpid(), threading.current_thread().name]


@syscall
def sha256_populated(call: Call, data: UserBuffer, offset: int, length: int) -> str:
    """Digests a part of it in place, every page faulted in before."""
    with data.mirror(realmap.k_r, offset, length, populate=True) as mirror:
        return hashlib.sha256(mirror).hexdigest()


@syscall
def sha256(call: Call, data: UserBuffer) -> str:
    """Digests in place."""
    with data.mirror(realmap.k_r) as mirror:
        return hashlib.sha256(mirror).hexdigest()


@syscall
def slow_sha256(call: Call, data: UserBuffer) -> str:
    """The same on a worker thread."""
    return sha256(call, data)


slow_sha256 = syscall(name="slow_sha256", blocking=True)(slow_sha256)


@syscall
def reverse(call: Call, data: UserBuffer, offset: int = 0, length: int | None = None) -> list[int]:
    """Reverses a range in place through a mirror; addresses and refcounts on the way."""
    frames = data.mappings[0].frames
    before = frames.refcount  # type: ignore[union-attr]
    with data.mirror(offset=offset, length=length) as mirror:
        during = frames.refcount  # type: ignore[union-attr]
        mirror[:] = bytes(mirror)[::-1]
        return [data.address, mirror.address, len(mirror), before, during]


@syscall
def copy(call: Call, source: UserBuffer, target: UserBuffer) -> int:
    """Copies one buffer into another without mapping either."""
    target.copy_out(source.copy_in())
    return len(source)


@syscall
def peek(call: Call, data: UserBuffer, length: int | None, offset: int) -> bytes:
    """copy_in with its arguments."""
    return data.copy_in(length, offset)


@syscall
def poke(call: Call, data: UserBuffer, content: bytes, offset: int) -> None:
    """copy_out with its arguments."""
    data.copy_out(content, offset)


@syscall
def mirror_with(call: Call, data: UserBuffer, rights: int, offset: int, length: int | None) -> int:
    """mirror with its arguments."""
    with data.mirror(realmap.MappingAccessRights(rights), offset, length) as mirror:
        return len(mirror)


@syscall
def access(call: Call, data: UserBuffer) -> list[Any]:
    """How the bytes are reached, and where."""
    with data.access() as found:
        found[0] = (found[0] + 1) % 256
        return [type(found).__name__, found.address, call.kernel.memory.live]


@syscall
def explode(call: Call, kind: str, text: str) -> None:
    """Raises an exception by name."""
    kinds = {kind.__name__: kind for kind in (ValueError, SystemExit, KeyboardInterrupt, realmap.KernelPanic)}
    raise kinds[kind](text)


class Unspeakable(Exception):
    """Its text cannot be had."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


def _raise_odd(kind: str) -> None:
    if kind == "surrogate":
        raise ValueError("a name that is no text: \udcff")
    if kind == "our surrogate":
        raise realmap.InvalidHandle("\udcff", why="\udcff")
    if kind == "huge fact":
        raise realmap.InvalidSize(1 << 70, why="beyond 64 bits")
    raise Unspeakable


@syscall
def odd_error(call: Call, kind: str) -> None:
    """Raises what cannot be encoded as it is."""
    _raise_odd(kind)


@syscall(blocking=True)
def slow_odd_error(call: Call, kind: str) -> None:
    """The same on a worker thread."""
    _raise_odd(kind)


@syscall
def our_error(call: Call) -> None:
    """Raises one of ours."""
    raise realmap.InvalidMemState(0x1234, realmap.MemoryType.STACK, why="says a handler")


@syscall
def unsendable(call: Call) -> Any:
    """Returns what cannot travel."""
    return threading.Lock()


@syscall
def long_text(call: Call, length: int) -> str:
    """A long answer."""
    return "x" * length


@syscall(blocking=True)
def hold(call: Call, name: str, data: UserBuffer) -> str:
    """Mirrors, says so, waits to be let go on, and digests only then."""
    kept[name] = None
    with data.mirror(realmap.k_r) as mirror:
        kept[name] = gate
        gate.get()
        digest = hashlib.sha256(mirror).hexdigest()
    kept[name] = digest
    return digest


@syscall(blocking=True)
def late_mirror(call: Call, name: str, data: UserBuffer) -> None:
    """Waits first, and mirrors only then."""
    kept[name] = gate
    gate.get()
    try:
        with data.mirror(realmap.k_r) as mirror:
            kept[name] = hashlib.sha256(mirror).hexdigest()
    except BaseException as error:
        kept[name] = repr(error)


@syscall
def state(call: Call, name: str) -> str | None:
    """What `hold` or `late_mirror` has come to: None, "waiting", or its digest."""
    found = kept.get(name)
    return "waiting" if found is gate else found


@syscall(blocking=True)
def wait(call: Call) -> None:
    """Waits to be let go on."""
    gate.get()


@syscall
def go(call: Call) -> None:
    """Lets one waiting handler go on."""
    gate.put(None)


@syscall(blocking=True)
def wait_for(call: Call, name: str, *held: UserBuffer) -> str:
    """Waits to be let go on by that name; buffers are held meanwhile."""
    gates[name].get()
    return name


@syscall
def go_by_name(call: Call, name: str) -> None:
    """Lets one go on that waits for that name, now or later."""
    gates[name].put(None)


@syscall
def keep(call: Call, name: str, data: UserBuffer) -> int:
    """Keeps a mirror beyond the call."""
    kept[name] = data.mirror(realmap.k_r)
    return int(kept[name].mapping.frames.refcount)


@syscall
def keep_buffer(call: Call, data: UserBuffer) -> None:
    """Keeps the UserBuffer itself, which is of no use then."""
    kept["buffer"] = data


@syscall
def use_kept_buffer(call: Call) -> int:
    """Uses a buffer of a call that has ended."""
    with kept.pop("buffer").mirror() as mirror:
        return len(mirror)


@syscall
def read_kept(call: Call, name: str) -> list[Any]:
    """The digest and the refcount of a mirror that is kept; drops it."""
    with kept.pop(name) as mirror:
        return [hashlib.sha256(mirror).hexdigest(), mirror.mapping.frames.refcount]


@syscall
def drop_with_view(call: Call, data: UserBuffer) -> list[Any]:
    """Drops a mirror while a view of it lives."""
    mirror = data.mirror()
    view = memoryview(mirror)
    try:
        mirror.drop()
        said = "dropped"
    except BufferError as error:
        said = str(error)
    view[0] = 77
    view.release()
    mirror.drop()
    return [said, mirror.alive]


@syscall(blocking=True)
def sleep(call: Call, seconds: float, *held: UserBuffer) -> float:
    """Sleeps on a worker thread; buffers are held meanwhile."""
    time.sleep(seconds)
    return seconds


@syscall
def spin(call: Call, seconds: float) -> None:
    """Keeps the kernel's own thread busy."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


@syscall
def fork(call: Call) -> list[int]:
    """What a fork of the kernel still has: its descriptors of shared memory, its maps in the lands."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        from realmap.host import procfs

        files = []
        for fd in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                files.append(os.readlink(f"/proc/self/fd/{fd}"))
        shared = sum("/dev/shm/" in name for name in files)
        os.write(writer, bytes([shared, len(procfs.maps("self", 0x3000_0000_0000, 0x4000_0000_0000))]))
        os._exit(0)
    os.close(writer)
    found = list(os.read(reader, 2))
    os.close(reader)
    os.waitpid(child, 0)
    return found


@syscall
def truncate_and_sum(call: Call, data: UserBuffer, size: int, how: str) -> int:
    """Mirrors, truncates the segment to `size` bytes, touches every page; `how` it ends."""
    frames = data.mappings[0].frames
    assert isinstance(frames, SharedFrames)
    if how == "collected":
        total = sum(memoryview(_short(data.mirror(), frames, size))[::4096])
    elif how == "kept":
        kept["short"] = _short(data.mirror(), frames, size)
        total = sum(memoryview(kept["short"])[::4096])
    elif how == "raises":
        with data.mirror() as mirror:
            total = 1 // (0 * sum(memoryview(_short(mirror, frames, size))[::4096]))
    elif how == "forgives":
        with suppress(realmap.MemoryFault), data.mirror() as mirror:
            total = sum(memoryview(_short(mirror, frames, size))[::4096])
        total = -1
    elif how == "written":
        with data.mirror() as mirror, tempfile.TemporaryFile() as file:
            total = os.write(file.fileno(), _short(mirror, frames, size))
    else:
        with data.mirror() as mirror:
            total = sum(memoryview(_short(mirror, frames, size))[::4096])
    return total


def _short(mirror: Any, frames: SharedFrames, size: int) -> Any:
    os.truncate(f"/proc/self/fd/{frames.segments[0].fd}", size)
    return mirror


@syscall(blocking=True)
def slow_truncate_and_sum(call: Call, data: UserBuffer, size: int, how: str) -> int:
    """The same on a worker thread."""
    return truncate_and_sum(call, data, size, how)


@syscall
def sum_kept(call: Call) -> int:
    """Touches a mirror that an earlier call kept, by a view that it took then."""
    return sum(kept["view"][::4096])


@syscall(blocking=True)
def slow_sum_kept(call: Call) -> int:
    """The same on a worker thread, which then waits to be let go on."""
    kept["sum"] = None
    total = sum(kept["view"][::4096])
    kept["sum"] = gate
    gate.get()
    return total


@syscall
def sum_and_let_go(call: Call, name: str, how: str) -> int:
    """Touches a mirror that an earlier call kept, and lets it go; nobody is left to ask for its fault."""
    mirror = kept.pop(name)
    total = sum(memoryview(mirror)[::4096])
    if how == "dropped":
        with suppress(realmap.MemoryFault):
            mirror.drop()
    del mirror
    return total


@syscall
def keep_by_process(call: Call, data: UserBuffer) -> None:
    """Keeps a mirror for as long as its process is there."""
    by_process[call.process] = data.mirror()


@syscall
def collect(call: Call) -> None:
    """Collects garbage."""
    gc.collect()


@syscall
def keep_view(call: Call, data: UserBuffer) -> None:
    """Keeps a mirror and a view of it."""
    kept["mirror"] = data.mirror()
    kept["view"] = memoryview(kept["mirror"])


@syscall
def end_kept(call: Call) -> str:
    """Drops what `keep_view` kept."""
    kept.pop("view").release()
    try:
        kept.pop("mirror").drop()
    except realmap.MemoryFault as error:
        return str(error)
    return ""


@syscall
def resize(call: Call, data: UserBuffer, size: int) -> None:
    """Truncates, or grows, the first segment of a buffer."""
    frames = data.mappings[0].frames
    assert isinstance(frames, SharedFrames)
    os.truncate(f"/proc/self/fd/{frames.segments[0].fd}", size)


@syscall
def leak_descriptor(call: Call, data: UserBuffer) -> None:
    """Opens the segment of a buffer once more, and forgets it."""
    frames = data.mappings[0].frames
    assert isinstance(frames, SharedFrames)
    os.dup(frames.segments[0].fd)


@syscall
def forget(call: Call, name: str) -> None:
    """Lets go of what was kept."""
    kept.pop(name, None)


ALL = [value for value in list(globals().values()) if hasattr(value, "__realmap_syscall__")]
