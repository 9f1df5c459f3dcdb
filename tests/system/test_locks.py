"""Every public operation from a signal handler in the middle of every other one, and handlers that raise there.

The rule that this holds realmap to is in realmap/host/signals.py; the operations are in public_operations.py.
"""

from __future__ import annotations

import contextlib
import functools
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable

import pytest
from conftest import BOUND, SUPPORT, scaled
from interrupted import RAISED
from public_operations import HANGS, OPERATIONS

from realmap.host.interpreter import Child
from realmap.host.signals import Flag, Living, pass_on

Pair = tuple[str, str]
SHORT = [name for name, each in OPERATIONS.items() if not each.long]
#: The operations of realmap.memory, and those that need a kernel.
ALONE = [name for name in SHORT if not OPERATIONS[name].connected]
CONNECTED = [name for name in SHORT if OPERATIONS[name].connected]


def run(pairs: list[Pair], times: int) -> dict[Pair, str]:
    """Interrupts each outer one `times` times by its inner one; what went wrong. A pair that hangs ends its process."""
    wrong: dict[Pair, str] = {}
    within: Counter[Pair] = Counter()
    left = list(pairs)
    while left:
        child = subprocess.run(
            [sys.executable, str(SUPPORT / "interrupted.py"), "7", str(times)],
            input=json.dumps(left),
            capture_output=True,
            text=True,
            timeout=(HANGS + times) * len(left) + BOUND,
        )
        said = [json.loads(line) for line in child.stdout.splitlines()]
        for each in said:
            if "ends" in each:
                pair = left[each["ends"]]
                within[pair] = each["within"]
                if each["errors"]:
                    wrong[pair] = each["errors"][0]
        last = len(said) and said[-1].get("ends", said[-1].get("begins"))
        if not said or "ends" not in said[-1]:
            wrong[left[last]] = f"it ended with {child.returncode} in the middle:\n{child.stderr}"
        elif child.returncode:
            wrong[left[last]] = f"afterwards it ended with {child.returncode}:\n{child.stderr}"
        left = left[last + 1 :]
    never = [pair for pair in pairs if not within[pair] and pair not in wrong]
    assert not never, f"no signal came in between: {never}"
    return wrong


def shown(wrong: dict[Pair, str]) -> str:
    """What went wrong, as it is read best."""
    return "\n".join(f"{inner} within {outer}: {what}" for (outer, inner), what in wrong.items())


def some(pairs: list[Pair], count: int) -> list[Pair]:
    """So many of them, the same ones every time."""
    return random.Random(11).sample(pairs, min(count, len(pairs)))


def test_some_pieces_within_some_others() -> None:
    wrong = run(some([(outer, inner) for outer in ALONE for inner in ALONE], 150), 3)
    assert not wrong, shown(wrong)


def test_a_handler_that_raises_within_some_pieces() -> None:
    wrong = run(some([(outer, kind) for outer in ALONE for kind in RAISED], 25), 3)
    assert not wrong, shown(wrong)


def test_some_operations_within_some_others() -> None:
    wrong = run(some([(outer, inner) for outer in CONNECTED for inner in SHORT], 40), 3)
    assert not wrong, shown(wrong)


def test_a_handler_that_raises_within_some_operations() -> None:
    wrong = run(some([(outer, kind) for outer in CONNECTED for kind in RAISED], 6), 3)
    assert not wrong, shown(wrong)


def test_what_starts_processes_within_itself() -> None:
    wrong = run([("spawn", "stats"), ("boot_and_shut_down", "spawn"), ("serve_here", "serve_here")], 1)
    assert not wrong, shown(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("outer", OPERATIONS)
def test_everything_within_everything(outer: str) -> None:
    inners = [*OPERATIONS, *RAISED]
    pairs = some([(outer, inner) for inner in inners], scaled(len(inners)))
    wrong = run(pairs, 2 if OPERATIONS[outer].long else max(3, scaled(50)))
    assert not wrong, shown(wrong)


# ---- what the rule offers -------------------------------------------------------------------


def test_a_flag_wakes_all_who_wait() -> None:
    flag = Flag()
    assert not flag.is_set()
    assert not flag.wait(0.001)
    seen: list[bool] = []
    threads = [threading.Thread(target=lambda: seen.append(flag.wait(BOUND))) for _ in range(5)]
    for thread in threads:
        thread.start()
    flag.set()
    flag.set()
    for thread in threads:
        thread.join(BOUND)
    assert seen == [True] * 5
    assert flag.wait()
    assert flag.wait(0)


def test_what_lives_may_change_while_it_is_looked_through() -> None:
    living: Living[Flag] = Living()
    kept = [Flag() for _ in range(5)]
    for flag in (*kept, kept[0]):
        living.add(flag)
    living.add(Flag())
    assert sorted(map(id, living.all())) == sorted(map(id, kept))
    for flag in living.all():
        living.discard(flag)
        living.discard(flag)
        living.add(kept[0])
    assert living.all() == [kept[0]]


def _raise(*_: object) -> None:
    raise FileNotFoundError("of the handler")


class _Raiser:
    def __call__(self, *_: object) -> None:
        _raise()

    def method(self, *_: object) -> None:
        _raise()


@pytest.mark.parametrize("handler", [_raise, functools.partial(_raise, 1), _Raiser(), _Raiser().method])
def test_an_error_of_ours_is_not_a_handlers(handler: Callable[..., None]) -> None:
    before = signal.getsignal(signal.SIGALRM)
    for installed, ours in ((before, True), (handler, False)):
        signal.signal(signal.SIGALRM, installed)
        try:
            handler(signal.SIGALRM, None)
        except FileNotFoundError as error:
            with contextlib.nullcontext() if ours else pytest.raises(FileNotFoundError, match="of the handler"):
                pass_on(error)
        finally:
            signal.signal(signal.SIGALRM, before)


def test_a_child_that_somebody_else_reaps_has_ended() -> None:
    children = [Child(_end_with, status) for status in (0, 7)]
    assert children[1].wait(BOUND) == 7
    children[0].report.recv(1)  # it ends, or has ended
    assert children[0].wait(None) == 0
    assert [child.exitcode for child in children] == [0, 7]
    killed = Child(_wait_for_ever)
    assert killed.wait(0) is None
    began = time.monotonic()
    assert killed.wait(0.05) is None
    assert time.monotonic() - began >= 0.05
    killed.kill()
    assert killed.wait(BOUND) == -9
    for child in (*children, killed):
        child.close()
        child.kill()


def _end_with(report: object, booter: int, status: int) -> None:
    sys.exit(status)


def _wait_for_ever(report: object, booter: int) -> None:
    threading.Event().wait()
