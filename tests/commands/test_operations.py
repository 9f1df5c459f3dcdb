"""`realmap stress --ops MODULE.py`: operations of one's own are in the mix, and bad ones are named and end nothing."""

from __future__ import annotations

import errno
import json
import random
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from command_line import command_line
from conftest import BOUND

import realmap
from realmap.lab import stress
from realmap.lab.stress import operations

BAD = '''
import os, signal, time
from realmap.lab.stress import operation

kept = []

@operation(weight=40)
def fine(user, rng):
    with user.map(rng.randint(1, 9999)) as buffer:
        assert buffer[0] == 0

@operation(weight=2)
def raises(user, rng):
    """Its buffer is in the traceback, and no leak."""
    buffer = user.map(5000)
    assert rng.random() > 1, "never"

@operation(weight=2)
def wrong(user, rng):
    return b"1" * 1000, b"2" * 1000

@operation(weight=2)
def exits(user, rng):
    raise SystemExit(3)

@operation(weight=2, timeout=0.3)
def hangs(user, rng):
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    time.sleep(1000)

@operation(weight=2)
def leaks_mapping(user, rng):
    kept.append(user.map(3333))

@operation(weight=2)
def leaks_descriptor(user, rng):
    kept.append(os.open("/dev/null", os.O_RDONLY))

@operation(weight=2)
def closes_user(user, rng):
    user.close()

@operation(weight=2)
def closes_all(user, rng):
    os.closerange(3, 1000)

@operation(weight=2)
def dies(user, rng):
    os.kill(os.getpid(), signal.SIGSEGV)

@operation(weight=2)
def forks(user, rng):
    if not os.fork():
        return
    os.wait()

@operation(weight=2)
def odd(user, rng):
    return 5
'''
#: What each is told to have done; None: nothing.
TOLD = {
    "fine": None,
    "raises": 'AssertionError: never (bad.py:16: assert rng.random() > 1, "never")',
    "wrong": "wrong: it got b'1111",
    "exits": "SystemExit: 3",
    "hangs": "it did not come back within 0.3 s",
    "leaks_mapping": "it leaks: 1 mapping(s) more than before, 0 gone",
    "leaks_descriptor": "it leaks: 1 descriptor(s) more than before, 0 gone",
    "closes_user": "it closed its user",
    "closes_all": "it ended its process (exit status 1)",
    "dies": "it ended its process (SIGSEGV)",
    "forks": None,
    "odd": "it gave int, where None or (got, expected) was due",
}


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "realmap", "stress", "quick", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=2 * BOUND,
    )


def module(folder: Path, text: str, name: str = "mine.py") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_the_documented_example(tmp_path: Path) -> None:
    assert operations.__doc__ is not None
    lines = operations.__doc__.splitlines()
    example = textwrap.dedent("\n".join(line for line in lines if line.startswith("    ") or not line))
    assert len([line for line in example.splitlines() if line]) <= 10
    path, out = module(tmp_path, example), tmp_path / "report.json"
    done = command("--ops", path, "--ops", 400, "--users", 2, "--seed", 4, "--json", out)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    turn = found["operations"]["turn"]
    assert turn["count"] > 10
    assert turn["count"] == found["kinds"]["turn"]["count"]
    assert (turn["failures"], turn["why"]) == (0, None)
    assert turn["longest"] > 0
    assert f"operation turn: {turn['count']} times, 0 failed" in done.stdout
    assert found["replay"] == f"realmap stress quick --users 2 --seed 4 --ops 400 --ops {path}"
    again = tmp_path / "again.json"
    assert command("--ops", path, "--ops", 400, "--users", 2, "--seed", 4, "--json", again).returncode == 0
    assert json.loads(again.read_text())["choices"] == found["choices"]


def test_bad_operations_are_named_and_end_nothing_else(tmp_path: Path) -> None:
    done = command("--ops", module(tmp_path, BAD, "bad.py"), "--ops", 500, "--seed", 1, "--json", tmp_path / "report")
    assert done.returncode == 1
    assert done.stderr == ""
    found = json.loads((tmp_path / "report").read_text())
    assert found["kinds"]["digest"]["count"] > 10
    assert list(found["operations"]) == list(TOLD)
    for name, words in TOLD.items():
        each = found["operations"][name]
        assert each["count"] > 0
        assert each["failures"] == (0 if words is None else each["count"])
        assert (words or "") in (each["why"] or "")
        assert (each["why"] is None) == (words is None)
    named = [failure.split()[1] for failure in found["failures"]]
    assert named == [name for name, words in TOLD.items() if words is not None]
    assert "died of" not in done.stdout


def test_a_failure_is_had_again_by_its_seed(tmp_path: Path) -> None:
    text = """
from realmap.lab.stress import operation

@operation()
def rare(user, rng):
    assert rng.randrange(4), "zero"
"""
    path = module(tmp_path, text)
    found = stress.run(stress.Options("quick", users=1, seconds=None, ops=3000, seed=2, operations=path))
    (failure,) = found.failures
    seed = int(failure.split("Random(")[1].split(")")[0])
    own = operations.load(path)[0]
    nobody: Any = None
    with pytest.raises(AssertionError, match="zero"):
        own.function(nobody, random.Random(seed))
    assert 0 < found.operations["rare"].failures < found.operations["rare"].count


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", "has no operations: mark some with @realmap.lab.stress.operation()"),
        ("def (", "cannot be imported: SyntaxError"),
        ("raise OSError('no')", "cannot be imported: OSError: no"),
        ("@operation(weight=0)\ndef mine(user, rng): pass", "has a weight of 1 at least"),
        ("@operation()\ndef map(user, rng): pass", "an operation is called 'map', as a step is"),
    ],
)
def test_bad_modules(text: str, words: str, tmp_path: Path) -> None:
    path = module(tmp_path, f"from realmap.lab.stress import operation\n{text}")
    with pytest.raises(ValueError, match=r"mine\.py") as caught:
        stress.check(stress.Options(operations=path))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--ops", "/nowhere/mine.py"],
            "/nowhere/mine.py cannot be imported: "
            "FileNotFoundError: [Errno 2] No such file or directory: '/nowhere/mine.py'",
        ),
        (["--ops", "mine.txt"], "mine.txt is no Python module"),
        (["--ops", "0"], "above 0"),
        (["--ops", "5", "--ops", "6"], "one number of steps"),
    ],
)
def test_bad_options(arguments: list[str], words: str) -> None:
    done = command_line("stress", *arguments)
    assert done.returncode == 2
    assert words in done.stderr.replace("\n", " ")
    assert "frozen" not in done.stderr
    assert "Traceback" not in done.stderr


def test_want_of_room_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a limit of descriptors that is too low for a look at them, for a moment."""

    def large(user: realmap.Process, rng: random.Random) -> None:
        user.map(1 << 20)

    answers = [OSError(errno.EMFILE, "none left"), ["0", "1"], ["0", "1"]]
    monkeypatch.setattr(operations.os, "listdir", MagicMock(side_effect=answers))
    with realmap.boot(memory_limit=1 << 16) as kernel, kernel.connect() as me:
        outcome = operations.attempt(operations.Own("large", large, 1, 1.0), me, 1)
        monkeypatch.undo()
        assert outcome == (None, False, 0, True)


def test_a_leak_of_a_cycle_is_none() -> None:
    def cyclic(user: realmap.Process, rng: random.Random) -> None:
        held: list[Any] = [user.map(999)]
        held.append(held)

    with realmap.boot() as kernel, kernel.connect() as me:
        outcome = operations.attempt(operations.Own("cyclic", cyclic, 1, 1.0), me, 1)
        assert outcome == (None, False, 0, False)
