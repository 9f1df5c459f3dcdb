"""One user process under stress: chooses, does, verifies, and tells the runner about it."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import threading
import time
import traceback

import msgspec

from realmap.ambient import connect
from realmap.errors import KernelDied, MemoryFault
from realmap.lab import workload
from realmap.lab.stress.actor import NO_ROOM, Actor, WrongBytes
from realmap.lab.stress.report import Options, Tally, bucket
from realmap.lab.workload import MIXES, Model, Seeded, Step

#: How often it tells, in seconds.
TELL = 0.25
#: So many buffers are touched for the first time without their space having been taken (--full).
UNCOMMITTED = 0.05
PARTS = 1_000_000


class Worker:
    """A life of user `index`: its choices come from the seed, its index and which life it is."""

    def __init__(self, sock: socket.socket, options: Options, path: str, index: int, life: int) -> None:
        self._sock = sock
        self._options = options
        self._path = path
        self._draw = Seeded(options.seed, index, life)
        self._mix = MIXES[options.mix]
        if options.truncate:
            self._mix = workload.Mix({**self._mix.weights, "truncate": 0}, self._mix.longest, self._mix.buffers)
        self._model = Model()
        self._tally = Tally()
        self._choices = hashlib.sha256()
        self._told = 0.0
        self._recent: list[Step] = []

    def live(self, deadline: float | None, steps: int | None) -> None:
        """Works until `deadline` (of the monotonic clock), or for so many steps, or until it is killed."""
        with connect(self._path) as me:
            actor = Actor(me)
            while (steps is None or self._tally.steps < steps) and (deadline is None or time.monotonic() < deadline):
                self._step(actor)
                if time.monotonic() - self._told > TELL:
                    self._tell()
            self._tally.unnoticed = actor.unnoticed
            # Drops what the kernel keeps for it, so that nothing but its own end is left to be seen to.
            for key, content in self._model.buffers.items():
                for name in list(content.kept):
                    self._do(actor, Step("drop", key, name))
            actor.buffers.clear()
        self._tally.done = True
        self._tell()

    def fail(self, error: BaseException) -> None:
        """Tells of its failure, and what it did last."""
        last = "; ".join(msgspec.json.encode(step).decode() for step in self._recent[-5:])
        text = "".join(traceback.format_exception(error)) if not isinstance(error, WrongBytes) else str(error)
        self._tally.failure = f"{text.strip()} (its last steps: {last})"
        self._tell()

    def _step(self, actor: Actor) -> None:
        options, draw = self._options, self._draw
        if options.kill and draw.below(PARTS) < options.kill * PARTS and not self._tally.dying:
            self._die(draw.below(3000))
        if options.full and draw.below(PARTS) < UNCOMMITTED * PARTS:
            self._uncommitted(actor, 1 + draw.below(self._mix.longest))
            return
        kinds = self._model.kinds(self._mix)
        if options.truncate and draw.below(PARTS) < options.truncate * PARTS and "truncate" in kinds:
            forced = workload.Mix({"truncate": 1}, self._mix.longest, self._mix.buffers)
            self._do(actor, workload.choose(self._model, draw, forced))
            return
        self._do(actor, workload.choose(self._model, draw, self._mix))

    def _do(self, actor: Actor, step: Step) -> None:
        tally = self._tally
        if not tally.dying:
            self._choices.update(msgspec.json.encode(step))
        self._recent = [*self._recent[-9:], step]
        began = time.perf_counter_ns()
        try:
            got = actor.perform(step)
        except NO_ROOM:
            tally.refused += 1
            if not step.kind.startswith("map"):  # it changes nothing; a truncated one is gone in any case
                raise
            return
        took = time.perf_counter_ns() - began
        expected = self._model.apply(step)
        if got != expected:
            raise WrongBytes(f"wrong bytes: {step} gave {_short(got)}, not {_short(expected)}")
        tally.steps += 1
        tally.verified += len(expected) if isinstance(expected, bytes) else step.length if expected is not None else 0
        tally.truncated += step.kind == "truncate"
        tally.forked += step.kind == "fork"
        latencies = tally.latencies.setdefault(step.kind, {})
        number = bucket(took)
        latencies[number] = latencies.get(number, 0) + 1
        tally.longest[step.kind] = max(took, tally.longest.get(step.kind, 0))

    def _uncommitted(self, actor: Actor, length: int) -> None:
        """Memory whose space is taken at first touch: all of it is there, or the touch says that it is not."""
        data = workload.pattern(length, length)
        try:
            with actor.me.map(length, commit=False) as buffer:
                buffer[:] = data
                if buffer[:] != data:
                    raise WrongBytes("wrong bytes in a buffer without committed space")
        except (MemoryFault, *NO_ROOM):
            self._tally.refused += 1
        self._tally.steps += 1

    def _die(self, microseconds: int) -> None:
        """Is killed in the midst of what it does next."""
        self._tally.dying = True
        self._tell()

        def kill() -> None:
            time.sleep(microseconds / 1e6)
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=kill, daemon=True).start()

    def _tell(self) -> None:
        self._told = time.monotonic()
        self._tally.choices = self._choices.hexdigest()
        self._sock.send(msgspec.msgpack.encode(self._tally))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 100 else f"{text[:60]}… ({len(text)} characters)"


def run(
    sock: socket.socket,
    options: Options,
    path: str,
    index: int,
    life: int,
    deadline: float | None,
    steps: int | None,
) -> None:
    """A whole life, in a process of its own that ends with it; exit status 1 where something was wrong."""
    status = 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    worker = Worker(sock, options, path, index, life)
    try:
        worker.live(deadline, steps)
        status = 0
    except KernelDied as error:
        worker.fail(error)
    except BrokenPipeError:  # the runner has gone
        pass
    except BaseException as error:
        worker.fail(error)
    finally:
        os._exit(status)
