"""To print an object never connects to a kernel, boots one, or waits for one: alive, closed, or in a forked child."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
import syscalls
from conftest import BOUND, PAGE
from forked import in_a_child

import realmap
from realmap import Call, Kernel, UserBuffer, ambient, memory, system
from realmap.memory import FrameAllocator, KernelMemory, ProcessMemory
from realmap.observe.control import Control
from realmap.observe.trace import Trace
from realmap.shared_memory import ShareableList, SharedMemory
from realmap.wire.client import handshake

#: Types that a user never has an object of, or that are their own text: numbers, names, functions.
WITHOUT = {"Bookkeeping", "MappingAccessRights", "MemoryState", "MemoryType", "Land"}


def told(things: dict[str, Any]) -> dict[str, str]:
    """Each in words, in every way that there is."""
    return {name: f"{thing!r} {thing} {[thing]} {thing!a}" for name, thing in things.items()}


@contextmanager
def kernels_that_do_not_answer(monkeypatch: pytest.MonkeyPatch, *pids: int) -> Iterator[None]:
    """Whoever asks one waits for ever, and whoever tries to is told so at once."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("it speaks with a kernel")

    with monkeypatch.context() as patched:
        for place, name in ((handshake, "open_endpoint"), (system, "_start")):
            patched.setattr(place, name, refuse)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        signal.alarm(int(BOUND))
        try:
            yield
        finally:
            signal.alarm(0)
            for pid in pids:
                os.kill(pid, signal.SIGCONT)


def test_every_public_type(tree: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    @realmap.syscall
    def look(call: Call, data: UserBuffer) -> None:
        mirror = data.mirror()
        seen.update(Call=call, UserBuffer=data, CrossProcessMapping=mirror, UserspacePtr=data.access())
        seen.update(Mapping=mirror.mapping, SharedFrames=mirror.mapping.frames)

    @realmap.syscall
    def look_from_elsewhere(call: Call, data: UserBuffer) -> None:
        seen["LentMapping"] = data.mirror()

    here = Kernel(syscalls=[look]).start()
    user = realmap.connect(here.path)
    looked_at = user.map(PAGE)
    user.call("look", looked_at)
    kernel = realmap.boot(syscalls=syscalls.ALL)
    me = kernel.connect()
    buffer = me.map(PAGE)
    service = me.serve(look_from_elsewhere)
    me.call("look_from_elsewhere", buffer)
    stranger = realmap.ForeignProcess(os.getpid())
    things: dict[str, Any] = {
        **seen,
        "Kernel": here,
        "KernelHandle": kernel,
        "Process": me,
        "Buffer": buffer,
        "a slice": buffer.slice(1, 2),
        "Handle": me.share(buffer),
        "MemoryInfo": me.query(buffer.address),
        "SpawnedProcess": kernel.spawn(syscalls.nop),
        "Limits": realmap.Limits(),
        "Service": service,
        "Session": me.session("look_from_elsewhere"),
        "ForeignProcess": stranger,
        "ForeignMapping": stranger.mappings()[0],
        "SharedMemory": SharedMemory(create=True, size=100),
        "ShareableList": ShareableList([1, "two"]),
        "Control": Control(kernel.path),
        "Trace": Trace(kernel.path, tmp_path / "trace"),
        "AddressState": here.memory.mapping_state(here.memory.start),
        "FrameAllocator": FrameAllocator(),
        "KernelMemory": KernelMemory(),
        "LentLand": memory.LentLand(),
        "OwnedFrames": memory.OwnedFrames(PAGE),
        "ProcessMemory": ProcessMemory(),
    }
    for name, kind in vars(realmap).items():
        if name in realmap.__all__ and isinstance(kind, type) and issubclass(kind, realmap.KernelError):
            things[name] = kind(why="so")
    things["KernelPanic"] = realmap.KernelPanic("so")
    types = {name for module in (realmap, memory) for name in module.__all__ if isinstance(getattr(module, name), type)}
    assert types - set(things) == WITHOUT

    assert ambient._booted is not None
    pids = kernel.pid, ambient._booted.pid
    booted = ambient._booted
    with kernels_that_do_not_answer(monkeypatch, *pids):
        alive = told(things)

        def work() -> None:
            assert set(told(things)) == set(alive)
            assert things["Process"]._client.lost_in_child

        in_a_child(work)
    assert alive["Buffer"] != alive["a slice"]

    things["SpawnedProcess"].join(BOUND)
    things["Trace"].close()
    things["Control"].close()
    things["SharedMemory"].unlink()
    things["SharedMemory"].close()
    things["ShareableList"].shm.unlink()
    things["ShareableList"].shm.close()
    del things["ShareableList"]  # the standard one reads its block, and cannot be printed without
    seen.clear()
    things["CrossProcessMapping"].drop()
    things["UserspacePtr"].drop()
    for block in (buffer, looked_at):
        block.unmap()
    with kernels_that_do_not_answer(monkeypatch, *pids):
        unmapped = told(things)
        assert unmapped["Buffer"] != alive["Buffer"]
    service.close()
    for each in (me, user):
        each.close()
    kernel.shutdown()
    here.stop()
    with kernels_that_do_not_answer(monkeypatch):
        closed = told(things)
    assert set(closed) == set(unmapped)
    assert closed["KernelHandle"] != alive["KernelHandle"]
    assert ambient._booted is booted


def test_nothing_is_booted_for_what_was_never_connected(tree: object, monkeypatch: pytest.MonkeyPatch) -> None:
    half = SharedMemory.__new__(SharedMemory)  # as a debugger shows it while it is being made
    with kernels_that_do_not_answer(monkeypatch):
        assert "SharedMemory" in repr(half)
        assert "realmap.ambient" in repr(ambient)
    assert ambient._booted is None
    assert ambient.running() is None
