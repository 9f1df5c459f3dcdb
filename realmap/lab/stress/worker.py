"""One user process under stress: chooses, does, verifies, and tells the runner about it."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import threading
import time
import traceback
from dataclasses import replace
from typing import Any, NoReturn

import msgspec

from realmap.errors import KernelError, LimitReached, MemoryFault, ServerDied
from realmap.lab import workload
from realmap.lab.stress.actor import NO_ROOM, Actor, WrongBytes, join
from realmap.lab.stress.board import Board
from realmap.lab.stress.neighbours import Neighbours, Skipped
from realmap.lab.stress.operations import Own, attempt, load, shortened
from realmap.lab.stress.report import Operation, Options, Tally, bucket
from realmap.lab.workload import MIXES, Model, Seeded, Step

#: How often it tells, in seconds.
TELL = 0.25
#: So many buffers are touched for the first time without their space having been taken (--full).
UNCOMMITTED = 0.05
PARTS = 1_000_000
#: Of these nothing is changed where there is no room. (A truncated buffer is gone in any case.)
REFUSABLE = ("map", "map_read_only", "serve", "show", "stranger")


class Worker:
    """A life of user `index`: its choices come from the seed, its index and which life it is."""

    def __init__(self, sock: socket.socket, options: Options, path: str, board: Board, index: int, life: int) -> None:
        self._sock = sock
        self._options = options
        self._path = path
        self._board = board
        self._index = index
        self._draw = Seeded(options.seed, index, life)
        self._operations = load(options.operations) if options.operations else []
        mix = MIXES[options.mix]
        own = {each.name: each.weight for each in self._operations}
        forced = {"truncate": 0} if options.truncate else {}
        if own:  # is held to the descriptors that it leaves, and those of services come and go
            forced |= {"serve": 0, "served": 0}
        self._mix = replace(mix, weights={**mix.weights, **forced, **own}, own=mix.own | own.keys())
        self._model = Model()
        self._tally = Tally()
        self._choices = hashlib.sha256()
        self._told = 0.0
        self._recent: list[Step] = []

    def run(self, deadline: float | None, steps: int | None) -> NoReturn:
        """A whole life, in a process of its own that ends with it; exit status 1 where something was wrong."""
        status = 1
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGUSR1, lambda *_: None)  # an antagonist sends it
        try:
            self.live(deadline, steps)
            status = 0
        except BrokenPipeError:  # the runner has gone
            pass
        except BaseException as error:
            self.fail(error)
        finally:
            os._exit(status)

    def live(self, deadline: float | None, steps: int | None) -> None:
        """Works until `deadline` (of the monotonic clock), or for so many steps, or until it is killed."""
        with join(self._path) as me:
            actor = Actor(me)
            self._neighbours = Neighbours(me, self._board, self._index)
            self._board.enter(self._index)  # from here on it can bear what antagonists do
            self._do(actor, Step("show", seed=self._draw.below(1 << 32)))
            try:
                while (steps is None or self._tally.steps < steps) and (
                    deadline is None or time.monotonic() < deadline
                ):
                    self._step(actor)
                    if self._tally.again:
                        self._tell()
                        return
                    if time.monotonic() - self._told > TELL:
                        self._tell()
            finally:
                self._board.show(self._index, 0, 0, 0)  # before its end unmaps what it shows
            self._tally.unnoticed = actor.unnoticed
            self._neighbours.close()
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
        self._tally.wrong = isinstance(error, WrongBytes)
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
            forced = replace(self._mix, weights={"truncate": 1})
            self._do(actor, workload.choose(self._model, draw, forced))
            return
        self._do(actor, workload.choose(self._model, draw, self._mix))

    def _do(self, actor: Actor, step: Step) -> None:
        tally = self._tally
        if not tally.dying:
            self._choices.update(msgspec.json.encode(step))
        self._recent = [*self._recent[-9:], step]
        for number, own in enumerate(self._operations, 1):
            if own.name == step.kind:
                self._attempt(actor, number, own, step)
                return
        began = time.perf_counter_ns()
        try:
            got = self._perform(actor, step)
        except Skipped as error:
            tally.skipped[step.kind] = str(error)
            return
        except (ServerDied, LimitReached, *NO_ROOM) as error:
            took = time.perf_counter_ns() - began
            if step.kind == "served":
                self._verify_survival(actor, step, error)
            elif isinstance(error, LimitReached) or step.kind not in REFUSABLE:
                raise
            if isinstance(error, ServerDied):
                tally.lost += 1
                self._count(step.kind, took)
            else:
                tally.refused += 1
            return
        took = time.perf_counter_ns() - began
        got, expected = got if step.kind == "stranger" else (got, self._model.apply(step))
        if got != expected:
            raise WrongBytes(f"wrong bytes: {step} gave {shortened(got)}, not {shortened(expected)}")
        tally.verified += len(expected) if isinstance(expected, bytes) else step.length if expected is not None else 0
        tally.truncated += step.kind == "truncate"
        tally.forked += step.kind == "fork"
        self._count(step.kind, took)

    def _perform(self, actor: Actor, step: Step) -> Any:
        neighbours = self._neighbours
        if step.kind == "served":
            return neighbours.flip(actor.buffers[step.key], step.offset, step.length)
        own = {"serve": neighbours.serve, "show": neighbours.show, "stranger": neighbours.look}.get(step.kind)
        return own(step.seed) if own is not None else actor.perform(step)

    def _verify_survival(self, actor: Actor, step: Step, error: KernelError) -> None:
        """Of what was lent, each byte is as before, or as it should be where the handler may have begun."""
        content = self._model.buffers[step.key].data
        before = bytes(content)
        if isinstance(error, ServerDied) and error.began:
            self._model.apply(step)
        seen = actor.buffers[step.key][:]
        if any(one not in (old, new) for one, old, new in zip(seen, before, content, strict=True)):
            raise WrongBytes(f"wrong bytes: {step} ended in {error}, and left {shortened(seen)}")
        content[:] = seen
        self._tally.verified += len(seen)

    def _count(self, kind: str, took: int) -> None:
        self._tally.steps += 1
        latencies = self._tally.latencies.setdefault(kind, {})
        number = bucket(took)
        latencies[number] = latencies.get(number, 0) + 1
        self._tally.longest[kind] = max(took, self._tally.longest.get(kind, 0))

    def _attempt(self, actor: Actor, number: int, own: Own, step: Step) -> None:
        """Runs an operation of the user's own; whatever that does, the others go on."""
        began = time.perf_counter_ns()
        self._board.begin(self._index, number)
        outcome = attempt(own, actor.me, step.seed)
        took = time.perf_counter_ns() - began
        done = self._tally.operations.setdefault(own.name, Operation())
        done.add(Operation(1, longest=took / 1e9))
        if outcome.why is not None:
            done.fail(f"{own.name}(user, random.Random({step.seed})): {outcome.why}")
        self._tally.refused += outcome.refused
        self._tally.again = outcome.left
        if not outcome.left:  # who has lost the way to say so is known by it
            self._board.end(self._index)
        self._tally.verified += outcome.verified
        self._count(own.name, took)

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
