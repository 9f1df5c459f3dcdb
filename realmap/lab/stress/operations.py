"""Operations of one's own, for `realmap stress --ops MODULE.py`: functions of a user and a `random.Random`.

    from realmap.lab.stress import operation

    @operation(weight=5)
    def turn(user, rng):
        data = rng.randbytes(rng.randint(1, 50_000))
        with user.map(len(data)) as buffer:
            buffer[:] = data
            user.call("stress_reverse", buffer)
            return buffer[:], data[::-1]

Each is in the mix by its weight, and in the report by its name. One that raises, gives something else than expected,
does not come back, ends its process, or keeps a mapping or a descriptor has failed: the run goes on, and is not ok.
Beside them users do not serve each other: descriptors would come and go.
Where there is no room for it (`PhysicalMemoryExhaustion`, `VirtualMemoryExhaustion`), it was refused, as steps may be.
"""

from __future__ import annotations

import errno
import gc
import importlib.util
import os
import random
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

from realmap.lab.stress.actor import NO_ROOM
from realmap.lab.workload import MIXES
from realmap.memory.userspace_ptr import user_windows
from realmap.user import Process

F = TypeVar("F", bound=Callable[[Process, random.Random], Any])
MARK = "_realmap_operation"


class Own(NamedTuple):
    """An operation, by its function's name. `timeout`: seconds."""

    name: str
    function: Callable[[Process, random.Random], Any]
    weight: int
    timeout: float


@overload
def operation(function: F, /) -> F: ...
@overload
def operation(*, weight: int = 1, timeout: float = 10.0) -> Callable[[F], F]: ...
def operation(function: Any = None, /, *, weight: int = 1, timeout: float = 10.0) -> Any:
    """Makes a function an operation: of a user (a `realmap.Process`) and a `random.Random`, from which all its choices
    come. It raises (AssertionError, say) where something is wrong, or gives (what it got, what it expected).

    `weight`: relative to the other steps of the mix, which weigh about 110 together. `timeout`: one that takes more
    seconds hangs: its user is killed, and another one goes on. ValueError: a weight below 1, or no time.
    """
    if weight < 1 or not timeout > 0:
        raise ValueError(f"an operation has a weight of 1 at least, and some time: not {weight}, and {timeout} s")

    def mark(function: F) -> F:
        setattr(function, MARK, Own(function.__name__, function, weight, timeout))
        return function

    return mark if function is None else mark(function)


@cache
def load(path: str) -> list[Own]:
    """The operations of a module. ValueError: it cannot be had, has none, or one is called as a step is."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python module: give a file that ends with .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path} cannot be imported: {in_words(error)}") from None
    found = [own for value in vars(module).values() if isinstance(own := getattr(value, MARK, None), Own)]
    if not found:
        raise ValueError(f"{path} has no operations: mark some with @realmap.lab.stress.operation()")
    taken = {"truncate"}.union(*(mix.weights for mix in MIXES.values()))
    for own in found:
        if own.name in taken:
            raise ValueError(f"{path}: an operation is called {own.name!r}, as a step is: give it another name")
        taken.add(own.name)
    return found


class Outcome(NamedTuple):
    """`why` it failed, or None. `left`: its process is not as it was before. `verified`: bytes. `refused`: no room."""

    why: str | None
    left: bool
    verified: int = 0
    refused: bool = False


def attempt(own: Own, user: Process, seed: int) -> Outcome:
    """Does it once, whatever it does."""
    pid, before = os.getpid(), _belongings()
    why, verified, refused = None, 0, False
    try:
        given = own.function(user, random.Random(seed))
        if isinstance(given, tuple) and len(given) == 2:
            got, expected = given
            verified = len(expected) if isinstance(expected, bytes) else 0
            if got != expected:
                why = f"wrong: it got {shortened(got)}, not {shortened(expected)}"
        elif given is not None:
            why = f"it gave {type(given).__name__}, where None or (got, expected) was due"
    except NO_ROOM:
        refused = True
    except BaseException as error:
        why = in_words(error)
    if os.getpid() != pid:  # a child that it has forked
        os._exit(1)
    left = _left(user, before)
    return Outcome(why or left, left is not None, verified, refused)


def _belongings() -> dict[str, set[Any]]:
    return {
        "mapping": {window._base for window in user_windows() if window.alive},
        "descriptor": _descriptors(),
    }


def _descriptors() -> set[str]:
    while True:
        try:
            return set(os.listdir("/proc/self/fd"))
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            time.sleep(0.001)  # an antagonist keeps the limit down for a moment


def _left(user: Process, before: dict[str, set[Any]]) -> str | None:
    """What it left behind, or took away, in words."""
    if user.has_ended:
        return "it closed its user"
    after = _belongings()
    if after != before:
        gc.collect()
        after = _belongings()
    for what, had in before.items():
        if after[what] != had:
            kept, gone = len(after[what] - had), len(had - after[what])
            return f"it leaks: {kept} {what}(s) more than before, {gone} gone"
    return None


def in_words(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not frames[-1].line:  # of the import itself there are no lines to show
        return text
    return f"{text} ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno}: {frames[-1].line})"


def shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) < 100 else f"{text[:60]}… ({len(text)} characters)"
