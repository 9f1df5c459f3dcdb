"""The main paths, each cut in two: what comes before, and what is done while calls are made to fail.

A path is a generator: up to its `yield` it prepares, after it comes the act; it returns whether what
came of that is right. What it took it leaves to its stage, which gives it back (untraced).
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

from served import HANDLERS

import realmap
from realmap import PAGE_SIZE, Buffer, Call, ForeignProcess, KernelHandle, Process, Service, UserBuffer
from realmap.kernel import Kernel

Steps = Generator[None, None, bool]


@realmap.syscall
def offered(call: Call, data: UserBuffer) -> str:
    """Turns it round, in place; the digest of what was."""
    with data.mirror() as mirror:
        before = bytes(mirror)
        mirror[:] = before[::-1]
        return hashlib.sha256(before).hexdigest()


class Stage:
    """What a path works with: a kernel at `where`, and what must be given back afterwards."""

    def __init__(self, where: str, spin: float, seed: int) -> None:
        self.where = where
        self.spin = spin
        self.random = random.Random(seed)
        self.me: Process | None = None
        self.kernel: Kernel | None = None
        self.handle: KernelHandle | None = None
        self.service: Service | None = None
        self.buffers: list[Buffer] = []

    def join(self) -> Process:
        """Connects."""
        self.me = realmap.connect(self.where)
        return self.me

    def map(self, length: int, **options: Any) -> Buffer:
        """Maps memory, connecting first where that was not done."""
        buffer = (self.me or self.join()).map(length, **options)
        self.buffers.append(buffer)
        return buffer

    def fill(self, buffer: Buffer) -> str:
        """Fills a buffer; the digest of what is in it."""
        content = self.random.randbytes(len(buffer))
        buffer[:] = content
        return hashlib.sha256(content).hexdigest()

    def filled(self, length: int, **options: Any) -> tuple[Process, Buffer, str]:
        """A buffer and its digest."""
        buffer = self.map(length, **options)
        assert self.me is not None
        return self.me, buffer, self.fill(buffer)

    def strike(self) -> None:
        """Gives everything back. Nothing of it may fail: what was injected is over."""
        if self.service is not None:
            self.service.close()
            self.service = None
        for buffer in self.buffers:
            buffer.unmap()
        self.buffers.clear()
        if self.me is not None:
            self.me.close()
            self.me = None
        if self.kernel is not None:
            self.kernel.stop()
            self.kernel = None
        if self.handle is not None:
            self.handle.shutdown()
            self.handle = None


def _connect(stage: Stage) -> Steps:
    yield
    return stage.join()._own_client.number > 0


def _mapping(length: int, **options: Any) -> Callable[[Stage], Steps]:
    def steps(stage: Stage) -> Steps:
        stage.join()
        yield
        buffer = stage.map(length, **options)
        return len(buffer) == length and bytes(buffer) == bytes(length)

    return steps


def _map_named(stage: Stage) -> Steps:
    stage.join()
    name = f"hostile.{os.getpid()}"
    yield
    return len(stage.map(PAGE_SIZE, name=name)) == PAGE_SIZE


def _unmapping(length: int, **options: Any) -> Callable[[Stage], Steps]:
    def steps(stage: Stage) -> Steps:
        me, buffer, _ = stage.filled(length, **options)
        yield
        buffer.unmap()
        return not buffer.alive and me.query(buffer.address).type is realmap.MemoryType.UNMAPPED

    return steps


def _collect(stage: Stage) -> Steps:
    me, buffer, _ = stage.filled(PAGE_SIZE)
    address = buffer.address
    stage.buffers.clear()
    yield
    del buffer
    return me.query(address).type is realmap.MemoryType.UNMAPPED


def _calling(name: str, length: int, *args: Any, twice: bool = False, **options: Any) -> Callable[[Stage], Steps]:
    def steps(stage: Stage) -> Steps:
        me, buffer, digest = stage.filled(length, **options)
        part = buffer.slice(0, length)
        yield
        right = bool(me.call(name, part, *args) == digest)
        return right and (not twice or bool(me.call(name, part, *args) == digest))

    return steps


def _copy(stage: Stage) -> Steps:
    me, source, digest = stage.filled(3 * PAGE_SIZE, fragment=PAGE_SIZE)
    target = stage.map(3 * PAGE_SIZE, fragment=PAGE_SIZE)
    yield
    return bool(me.call("copy", source, target) == len(source)) and hashlib.sha256(target).hexdigest() == digest


def _echo(length: int) -> Callable[[Stage], Steps]:
    def steps(stage: Stage) -> Steps:
        me, data = stage.join(), stage.random.randbytes(length)
        yield
        return bool(me.call("echo", data) == data)

    return steps


def _offer(stage: Stage) -> Steps:
    me = stage.join()
    yield
    stage.service = me.serve(offered)
    return True


def _served(stage: Stage) -> Steps:
    """By the very process that calls: whole pages are lent, the edges copied."""
    me, buffer, _ = stage.filled(3 * PAGE_SIZE, fragment=PAGE_SIZE)
    stage.service = me.serve(offered)
    part = buffer.slice(5, 2 * PAGE_SIZE)
    content = part[:]
    yield
    return bool(me.call("offered", part) == hashlib.sha256(content).hexdigest()) and part[:] == content[::-1]


def _attach(stage: Stage) -> Steps:
    me, buffer, digest = stage.filled(3 * PAGE_SIZE, fragment=PAGE_SIZE)
    handle = me.share(buffer)
    yield
    stage.buffers.append(me.attach(handle))
    return hashlib.sha256(stage.buffers[-1]).hexdigest() == digest


def _look(stage: Stage) -> Steps:
    _, buffer, digest = stage.filled(3 * PAGE_SIZE, fragment=PAGE_SIZE)
    yield
    with ForeignProcess(os.getpid()) as process, process.mirror(buffer.address, len(buffer)) as mirror:
        return hashlib.sha256(mirror).hexdigest() == digest


def _close(stage: Stage) -> Steps:
    me, _, _ = stage.filled(3 * PAGE_SIZE, fragment=PAGE_SIZE)
    stage.me = None
    stage.buffers.clear()
    yield
    me.close()
    return True


def _start(stage: Stage) -> Steps:
    kernel = stage.kernel = Kernel(syscalls=HANDLERS, spin=stage.spin)
    yield
    kernel.start()
    return True


def _within(stage: Stage) -> Steps:
    kernel = stage.kernel = Kernel(syscalls=HANDLERS, spin=stage.spin)
    kernel.start()
    stage.where = kernel.path
    yield
    me, buffer, digest = stage.filled(PAGE_SIZE)
    return bool(me.call("digest", buffer) == digest)


def _stop(stage: Stage) -> Steps:
    kernel = stage.kernel = Kernel(syscalls=HANDLERS, spin=stage.spin)
    kernel.start()
    stage.where = kernel.path
    stage.filled(PAGE_SIZE)
    yield
    kernel.stop()
    return True  # where its socket cannot be unlinked, it is swept later


def _serve(stage: Stage) -> Steps:
    kernel = Kernel(spin=stage.spin)
    yield
    kernel.serve(ready=lambda: kernel.stop(wait=False))
    return True  # where its socket cannot be unlinked, it is swept later


def _boot(stage: Stage) -> Steps:
    yield
    stage.handle = realmap.boot(spin=stage.spin)
    return True


def _shutdown(stage: Stage) -> Steps:
    handle = stage.handle = realmap.boot(spin=stage.spin)
    handle.stats()
    yield
    handle.shutdown()
    return True


class Path(NamedTuple):
    """A path by name. `within`: it brings its own kernel.

    `one_thread`: calls of the thread that acts fail, and no others': a new interpreter's start-up is not ours; and a
    new thread that has no memory for its first frame leaves `Thread.start` of CPython waiting for ever.
    """

    name: str
    steps: Callable[[Stage], Steps]
    within: bool = False
    one_thread: bool = False


_ALL = [
    Path("connect", _connect),
    Path("map", _mapping(PAGE_SIZE)),
    Path("map-large", _mapping(5 << 20)),
    Path("map-fragments", _mapping(5 * PAGE_SIZE, fragment=PAGE_SIZE)),
    Path("map-many", _mapping(70 * PAGE_SIZE, fragment=PAGE_SIZE)),
    Path("map-named", _map_named),
    Path("map-sparse", _mapping(3 * PAGE_SIZE, commit=False)),
    Path("map-read-only", _mapping(2 * PAGE_SIZE, rights=realmap.u_r, fragment=PAGE_SIZE)),
    Path("map-huge", _mapping(2 << 20, huge=True)),
    Path("call-mirror", _calling("digest", 5000)),
    Path("call-mirror-fragments", _calling("digest", 3 * PAGE_SIZE, fragment=PAGE_SIZE)),
    Path("call-populate", _calling("digest", 3 * PAGE_SIZE, True)),
    Path("call-twice", _calling("digest", 5000, twice=True)),
    Path("call-blocking", _calling("slow_digest", 5000)),
    Path("call-copy", _copy),
    Path("call-short", _echo(100)),
    Path("call-long", _echo(200_000)),
    Path("unmap", _unmapping(PAGE_SIZE)),
    Path("unmap-fragments", _unmapping(3 * PAGE_SIZE, fragment=PAGE_SIZE)),
    Path("collect", _collect),
    Path("offer", _offer),
    Path("call-served", _served),
    Path("attach", _attach),
    Path("look", _look),
    Path("close", _close),
    Path("start", _start, within=True, one_thread=True),
    Path("within", _within, within=True),
    Path("stop", _stop, within=True),
    Path("serve", _serve, within=True, one_thread=True),
    Path("boot", _boot, within=True, one_thread=True),
    Path("shutdown", _shutdown, within=True, one_thread=True),
]
PATHS = {path.name: path for path in _ALL}
