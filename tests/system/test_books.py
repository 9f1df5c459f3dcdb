"""Several real processes that map, unmap, call, mirror, fork and are killed: after each step the books equal Linux.

The strongest oracle there is: /proc/PID/maps of every process, by inode and offset.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import syscalls
from conftest import PAGE, scaled, wait_until
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from puppet import Puppet

import realmap
from realmap import KernelHandle
from realmap.host import procfs
from realmap.lab import workload
from realmap.lab.stress import handlers
from realmap.memory import USER_LAND

#: So many steps at least, in examples of 50 at most; hypothesis ends some of them early.
FEW, FULL, STEPS = 200, 10_000, 50
counted = 0
#: Keeping is done here, beyond the end of a process; and a fork is kept until its parent's end.
MIX = workload.Mix(
    {kind: often for kind, often in workload.CALM.items() if kind not in ("keep", "drop")}, 9 * PAGE, buffers=4
)


class Drawn:
    """Choices that hypothesis makes, and makes smaller where something fails."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def below(self, bound: int) -> int:
        return int(self._data.draw(st.integers(0, bound - 1)))


@pytest.fixture(scope="module")
def stage() -> Iterator[KernelHandle]:
    with realmap.boot(syscalls=[*syscalls.ALL, *handlers.ALL]) as kernel:
        kernel.stats()
        yield kernel


class Play(RuleBasedStateMachine):
    """Processes, each with buffers whose bytes the model knows; and mirrors that the kernel keeps."""

    kernel: KernelHandle

    @initialize()
    def begin(self) -> None:
        self.puppets: dict[int, Puppet] = {}
        self.models: dict[int, workload.Model] = {}
        self.kept: dict[str, str] = {}
        self.serial = 0
        self.me = self.kernel.connect()

    def teardown(self) -> None:
        if not hasattr(self, "puppets"):
            return
        for puppet in self.puppets.values():
            puppet.kill()
        for name in self.kept:
            assert self.me.call("read_kept", name)[0] == self.kept[name]
        self.me.close()
        left = ("processes", "segments", "mirrors", "bytes")
        wait_until(lambda: not any(self.kernel.stats()[name] for name in left), "the end of everything")

    @rule()
    @precondition(lambda self: len(self.puppets) < 4)
    def start(self) -> None:
        self.serial += 1
        self.puppets[self.serial] = Puppet(self.kernel.path)
        self.models[self.serial] = workload.Model()
        count = len(self.puppets) + 1
        wait_until(lambda: self.kernel.stats()["processes"] == count)

    @rule(data=st.data())
    @precondition(lambda self: self.puppets)
    def step(self, data: Any) -> None:
        """What `realmap stress` does, too: the same generator of choices, with hypothesis behind it."""
        who = data.draw(st.sampled_from(sorted(self.puppets)))
        model = self.models[who]
        step = workload.choose(model, Drawn(data), MIX)
        assert self.puppets[who].do("step", step) == model.apply(step)
        if step.kind in ("unmap", "forget"):
            self.settle()

    @rule(data=st.data())
    @precondition(lambda self: self.count() and len(self.kept) < 5)
    def keep(self, data: Any) -> None:
        """A mirror that outlives its call, its mapping and its process; nothing is written there any more."""
        who, key = data.draw(st.sampled_from([(who, key) for who in self.models for key in self.models[who].buffers]))
        content = self.models[who].buffers[key]
        offset = data.draw(st.integers(0, len(content.data) - 1))
        self.serial += 1
        name = f"kept {self.serial}"
        self.puppets[who].do("call", "keep", key, offset, len(content.data) - offset, name)
        self.kept[name] = hashlib.sha256(content.data[offset:]).hexdigest()
        content.writable = False  # from here on only read, so that the digest stays

    @rule(data=st.data())
    @precondition(lambda self: self.kept)
    def drop(self, data: Any) -> None:
        name = data.draw(st.sampled_from(sorted(self.kept)))
        assert self.me.call("read_kept", name)[0] == self.kept.pop(name)

    @rule(data=st.data())
    @precondition(lambda self: self.puppets)
    def fork(self, data: Any) -> None:
        puppet = self.puppets[data.draw(st.sampled_from(sorted(self.puppets)))]
        if len(puppet.forks) < 2:
            puppet.forks.append(puppet.do("fork"))

    @rule(data=st.data(), how=st.sampled_from(["kill", "leave"]))
    @precondition(lambda self: self.puppets)
    def end(self, data: Any, how: str) -> None:
        who = data.draw(st.sampled_from(sorted(self.puppets)))
        getattr(self.puppets.pop(who), how)()
        del self.models[who]
        self.settle()

    def count(self) -> int:
        """How many mappings there should be."""
        return sum(len(model.buffers) for model in self.models.values())

    def settle(self) -> None:
        """A death or a forgotten buffer reaches the kernel by itself: wait for that."""
        count, processes = self.count(), len(self.puppets) + 1

        def settled() -> bool:
            stats = self.kernel.stats()
            return (stats["mappings"], stats["processes"], stats["inheritances"]) == (count, processes, 0)

        wait_until(settled, f"{count} mappings of {processes} processes")

    @invariant()
    def the_books_equal_linux(self) -> None:
        global counted
        counted += 1
        if not hasattr(self, "puppets"):
            return
        report = self.kernel.audit()
        assert report, str(report)
        assert report.mappings == self.count()
        assert report.mirrors == len(self.kept)
        # Forks that never registered still map what their parent had: they are told apart, not counted.
        mapping = {pid for who, puppet in self.puppets.items() for pid in puppet.forks}
        assert set(report.unregistered) <= mapping


def play(stage: KernelHandle, floor: int) -> None:
    class Here(Play):
        kernel = stage

    global counted
    counted = 0
    while counted < floor:
        before, examples = counted, max(4, (floor - counted) // STEPS)
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            Here, settings=settings(max_examples=examples, stateful_step_count=STEPS, deadline=None)
        )
        assert counted > before
    print(f"{counted} steps, after each of which the books equalled /proc/PID/maps")


def test_the_books_equal_linux_after_every_step(stage: KernelHandle) -> None:
    play(stage, FEW)


@pytest.mark.slow
def test_the_books_equal_linux_after_every_step_full_count(stage: KernelHandle) -> None:
    play(stage, scaled(FULL))


def test_an_audit_waits_for_who_is_kept_in_the_middle_of_unmapping(kernel: KernelHandle) -> None:
    """Stopped here; without CPU or kept within munmap(2), for more than a second, by Linux."""
    lives = f"""
    import ctypes, os, realmap, signal
    me = realmap.connect({kernel.path!r})
    buffer = me.map({PAGE})
    ctypes.CDLL(None).munmap(ctypes.c_void_p(buffer.address), ctypes.c_size_t({PAGE}))
    os.kill(os.getpid(), signal.SIGSTOP)
    os._exit(0)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(lives)]) as running:
        wait_until(lambda: procfs.is_stopped(running.pid))
        going_on = threading.Timer(1.5, running.send_signal, (signal.SIGCONT,))
        going_on.start()
        try:
            assert kernel.audit()
        finally:
            going_on.join()


def test_an_audit_finds_what_is_wrong(me: realmap.Process, kernel: KernelHandle) -> None:
    """An oracle that never says no is none: maps behind the books' back are named."""
    buffer = me.map(3 * PAGE)
    assert kernel.audit()
    window = buffer._window
    window._farewell(None, None, None)
    window._unmap()
    report = kernel.audit()
    assert not report
    assert f"{os.getpid()}" in str(report)
    assert str(report.differences[0]).count(f"{buffer.address:#x}") >= 1

    class Foreign(realmap._core.Window):  # type: ignore[name-defined]
        __slots__ = ()

    other = Foreign._map(USER_LAND.start + (1 << 40), 3, [(-1, 0, PAGE)], 0, PAGE, 1)
    assert len(kernel.audit().differences) == 2
    other._unmap()
    me._own_client.request(realmap.wire.messages.Unmap(me._own_client.next_id(), buffer.address, 3 * PAGE))  # type: ignore[attr-defined]
    assert kernel.audit()
