"""A user process that runs paths when it is told to, and makes no system call of its own meanwhile.

It hears and answers through memory that it shares with the harness, so that what is made to fail is
the path's and never the harness's. It only sleeps in between (clock_nanosleep, which is never injected).

    harness   PREPARE ───────▶        GO ──▶            UNDO ──────────▶
    puppet            ◀─── READY          ◀── ACTED                ◀── IDLE, a report
                               strace on it, or on the kernel
"""

from __future__ import annotations

import gc
import mmap
import os
import pickle
import signal
import struct
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import paths
import served
from served import BOUND, Reaped

import realmap

IDLE, PREPARE, READY, GO, ACTED, UNDO = range(6)
#: The state is the first byte, and written last, by itself: pack_into would let it be 0 for a moment.
_SIZE, _AT = struct.Struct("=I"), 4
_DATA = 8
_ROOM = 1 << 20


class Outcome(NamedTuple):
    """What came of an attempt. `error`: the exception's type, "" where there was none; `inner`: a handler's own."""

    right: bool
    error: str
    ours: bool
    inner: str
    text: str


class Report(NamedTuple):
    """An attempt and what it left behind in its process: in words; empty where all is well."""

    outcome: Outcome
    left: list[str]


class Order(NamedTuple):
    """A path to run: its kernel, and what it may be told after its act: descriptors to close."""

    path: str
    where: str
    spin: float
    seed: int


class Cleanup(NamedTuple):
    """Descriptors that an injected close left open: of the puppet, or of the kernel."""

    mine: list[int]
    kernels: list[int]


class Puppet(Reaped):
    """The harness's side."""

    def __init__(self, folder: Path) -> None:
        self._shared = mmap.mmap(-1, _ROOM)
        self.pid = os.fork()
        if not self.pid:
            served.divert(folder / f"puppet.{os.getpid()}")
            try:
                _dance(self._shared)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)

    def prepare(self, order: Order) -> None:
        """Has it prepare a path. RuntimeError: it cannot."""
        _say(self._shared, PREPARE, order)
        if not self._await((READY,)):
            raise RuntimeError(f"the puppet does not get ready for {order}")

    def go(self) -> None:
        """Lets it act."""
        self._shared[0] = GO

    def acted(self, bound: float = BOUND) -> bool:
        """Whether it has come to an end within the bound."""
        return self._await((ACTED,), bound)

    def undo(self, cleanup: Cleanup) -> Report | None:
        """Has it give everything back; None: it does not come to an end, or has died."""
        _say(self._shared, UNDO, cleanup)
        if not self._await((IDLE,)):
            return None
        report: Report = _said(self._shared)
        return report

    def _await(self, states: tuple[int, ...], bound: float = BOUND) -> bool:
        def there() -> bool:
            return self._shared[0] in states or self.ended is not None

        return served.wait_until(there, bound) and self._shared[0] in states

    def end(self) -> None:
        """Kills it, and reaps it. Again: nothing."""
        if self.ended is None:
            os.kill(self.pid, signal.SIGKILL)
            served.wait_until(lambda: self.ended is not None)
        self._shared.close()


def _say(shared: mmap.mmap, state: int, value: Any) -> None:
    data = pickle.dumps(value)
    shared[_DATA : _DATA + len(data)] = data
    _SIZE.pack_into(shared, _AT, len(data))
    shared[0] = state


def _said(shared: mmap.mmap) -> Any:
    (size,) = _SIZE.unpack_from(shared, _AT)
    return pickle.loads(shared[_DATA : _DATA + size])


# ---- in the puppet --------------------------------------------------------------------------


def _await(shared: mmap.mmap, state: int) -> None:
    harness = os.getppid()
    while shared[0] != state:
        time.sleep(0.0003)
        if os.getppid() != harness:
            os._exit(0)


def _dance(shared: mmap.mmap) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gone_wrong: list[str] = []
    gc.freeze()  # what was imported is not looked through time and again
    sys.unraisablehook = lambda said: gone_wrong.append(f"ignored: {said.exc_value!r} in {said.object!r}")
    while True:
        _await(shared, PREPARE)
        order: Order = _said(shared)
        before = _open()
        stage = paths.Stage(order.where, order.spin, order.seed)
        steps = paths.PATHS[order.path].steps(stage)
        next(steps)
        gc.collect()
        shared[0] = READY
        _await(shared, GO)
        outcome = _act(steps)
        shared[0] = ACTED
        _await(shared, UNDO)
        cleanup: Cleanup = _said(shared)
        left = [f"closed twice: descriptor {fd}" for fd in served.shut_all(cleanup.mine)]
        left += _undone(stage, steps)
        del steps, stage
        gc.collect()
        left += _normal(order, cleanup)
        served.wait_until(partial(_is_open, before), 2.0)  # the thread of a service may not have ended yet
        after = _open()
        left += [f"user's {what}: {one} became {other}" for what, one, other in _differences(before, after)]
        left += gone_wrong
        gone_wrong.clear()
        _say(shared, IDLE, Report(outcome, left))


def _open() -> tuple[list[str], ...]:
    gc.collect()
    return served.descriptors(os.getpid()), served.land_maps()


def _is_open(before: tuple[list[str], ...]) -> bool:
    return _open() == before


def _differences(before: tuple[list[str], ...], after: tuple[list[str], ...]) -> list[tuple[str, Any, Any]]:
    found = zip(("descriptors", "maps"), before, after, strict=True)
    return [(what, one, other) for what, one, other in found if one != other]


def _act(steps: paths.Steps) -> Outcome:
    try:
        next(steps)
    except StopIteration as end:
        return Outcome(bool(end.value), "", True, "", "")
    except BaseException as error:
        ours = isinstance(error, realmap.KernelError)
        inner = error.type if isinstance(error, realmap.SyscallFailed) else ""
        # The text of a SyscallFailed holds a traceback: the end of it says what it was.
        return Outcome(False, type(error).__name__, ours, inner, str(error)[:600])
    return Outcome(False, "AssertionError", False, "", "the path has a second yield")


def _undone(stage: paths.Stage, steps: paths.Steps) -> list[str]:
    steps.close()
    try:
        stage.strike()
    except realmap.KernelDied:
        return []
    except BaseException as error:
        return [f"giving it back failed: {type(error).__name__}: {error}"]
    return []


def _normal(order: Order, cleanup: Cleanup) -> list[str]:
    """What users do all day, after an attempt; and what the kernel's own injected closes left is closed by it."""
    if not order.where:
        return []
    try:
        with realmap.connect(order.where) as me:
            wrong = me.call("shut", cleanup.kernels) if cleanup.kernels else []
            stage = paths.Stage(order.where, order.spin, order.seed)
            with me.map(5000) as buffer:
                digest = stage.fill(buffer)
                right = me.call("digest", buffer) == digest
        return [f"closed twice: descriptor {fd} of the kernel" for fd in wrong] + ([] if right else ["a wrong digest"])
    except BaseException as error:
        return [f"a normal path afterwards failed: {type(error).__name__}: {error}"]
