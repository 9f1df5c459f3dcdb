"""Each of `public_operations`, interrupted by a signal whose handler runs another one, or raises. By test_locks.py.

    python interrupted.py SEED TIMES < pairs    JSON: [[outer, inner], …]; an inner of RAISED is what the handler raises

A line of JSON goes out before each pair, and one after it: how often the handler ran within, and what went wrong. So
whoever started it knows which pair it hangs in. Its watchdog then writes the stacks to stderr, and ends it.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import json
import os
import random
import signal
import sys
import threading
import traceback
from types import FrameType
from typing import Any

from public_operations import HANGS, OPERATIONS, Connected, Pieces, Run

#: How often the outer operation runs at most, until the handler has run within it often enough.
PATIENCE = 2000


class Stop(BaseException):
    """As Ctrl-C, but nobody else's."""


class Own(OSError):
    """As what a socket raises, but the handler's own."""


RAISED: dict[str, type[BaseException]] = {
    kind.__name__: kind for kind in (Stop, Own, TimeoutError, KeyboardInterrupt, InterruptedError)
}


class Handler:
    """What the signal runs: an operation, or it raises. While it is at work no other signal is sent."""

    def __init__(self, world: Any, inner: str) -> None:
        self._world, self._inner = world, inner
        self.within = False
        self.times = 0
        self.errors: list[str] = []

    def __call__(self, _: int, frame: FrameType | None) -> None:
        if self.within:
            self.times += 1
        if self._inner in RAISED:
            # Asyncio's own code is not made for it: a callback, and the task with it, may be lost there; and where a
            # loop is made or closed, its descriptors (socket.socketpair has one of them in nobody's hands).
            ours = frame is not None and "/realmap/" in frame.f_code.co_filename
            if self.within and (ours or not (asyncio._get_running_loop() or _is_within_asyncio(frame))):
                raise RAISED[self._inner]("of the handler")
            return
        try:
            OPERATIONS[self._inner].run(self._world)
        except Exception:
            self.errors.append(traceback.format_exc())


def _is_within_asyncio(frame: FrameType | None) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith(os.path.dirname(asyncio.__file__)):
        frame = frame.f_back
    return frame is not None


def interrupt(world: Any, outer: str, inner: str, times: int, rng: random.Random) -> tuple[int, list[str]]:
    """Runs `outer` until the handler ran `inner` within it so often; how often it did, and what went wrong."""
    handler = Handler(world, inner)
    signal.signal(signal.SIGALRM, handler)
    run = OPERATIONS[outer].run
    for _ in range(PATIENCE):
        if handler.times >= times or handler.errors:
            break
        try:
            _once(world, run, handler, rng)
        except tuple(RAISED.values()) as error:
            if inner not in RAISED or type(error) is not RAISED[inner]:
                handler.errors.append(traceback.format_exc())
        except Exception:
            handler.errors.append(traceback.format_exc())
        handler.within = False
        signal.setitimer(signal.ITIMER_REAL, 0)
    return handler.times, handler.errors


def _once(world: Any, run: Run, handler: Handler, rng: random.Random) -> None:
    before = handler.times
    handler.within = True
    signal.setitimer(signal.ITIMER_REAL, rng.uniform(2e-5, 4e-4))
    for _ in range(100):
        run(world)
        if handler.times > before:
            break
    handler.within = False


def everything_works(world: Any, connected: bool) -> list[str]:
    """What does not work any more: here, or in another thread, which hangs where a lock was kept."""
    errors: list[str] = []

    def run_all() -> None:
        for each in OPERATIONS.values():
            if not each.long and (connected or not each.connected):
                try:
                    each.run(world)
                except Exception:
                    errors.append("afterwards, " + traceback.format_exc())

    run_all()
    thread = threading.Thread(target=run_all)
    thread.start()
    thread.join()
    return errors


def main() -> None:
    rng, times = random.Random(int(sys.argv[1])), int(sys.argv[2])
    pairs = json.load(sys.stdin)
    connected = any(OPERATIONS[name].connected for pair in pairs for name in pair if name in OPERATIONS)
    world = Connected() if connected else Pieces()
    gc.collect()
    gc.freeze()  # what is looked through after each pair is what that left
    before = world.state()
    for number, (outer, inner) in enumerate(pairs):
        print(json.dumps({"begins": number}), flush=True)
        faulthandler.dump_traceback_later(HANGS, exit=True)
        within, errors = interrupt(world, outer, inner, times, rng)
        if inner in RAISED:
            errors += everything_works(world, connected)
        gc.collect()
        if world.state() != before:
            errors.append(f"left behind: {world.state()} instead of {before}")
        print(json.dumps({"ends": number, "within": within, "errors": errors[:1]}), flush=True)
        if errors:  # what comes next wants a world that is whole
            os._exit(0)
    faulthandler.dump_traceback_later(HANGS, exit=True)
    if connected:
        world.close()


if __name__ == "__main__":
    main()
