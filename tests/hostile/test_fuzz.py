"""The fuzzer of hostile clients, tools/fuzz: a small run of it, and a long one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import scaled

TOOL = Path(__file__).with_name("fuzz") / "fuzz.py"
FULL = 1_000_000


def fuzz(folder: Path, *arguments: object, timeout: float = 120) -> dict[str, Any]:
    """Runs it; what it counted. Nobody but the hostile clients was hurt."""
    file = folder / "result.json"
    command = [sys.executable, str(TOOL), *map(str, arguments), "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(file.read_text())
    assert found["failures"] == []
    return found


def sequence(seed: int, hash_seed: str) -> str:
    """The first messages and states of a seed, digested, made in a process of its own."""
    program = (
        "import hashlib, marshal, sys; from mutations import Mutator; from states import Scribbler\n"
        "mutator, scribbler = Mutator(sys.argv[1]), Scribbler(sys.argv[1])\n"
        "made = [(tuple(mutator.shot()), tuple(scribbler.state())) for _ in range(500)]\n"
        "print(hashlib.sha256(marshal.dumps(made, 2)).hexdigest())"
    )
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parent), "PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-c", program, str(seed)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def test_the_same_seed_makes_the_same_sequence() -> None:
    assert sequence(1, "1") == sequence(1, "2") != sequence(2, "1")


def test_hostile_clients_hurt_only_themselves(tmp_path: Path) -> None:
    found = fuzz(tmp_path, "--messages", 1000, "--states", 1000, "--seed", 20, "--clients", 2)
    for what in ("messages", "states"):
        clients = found[what]["clients"]
        assert sum(client["count"] for client in clients) == 1000
        assert len({client["digest"] for client in clients}) == 2, "each makes a sequence of its own"
        assert all(client["byes"] and client["answers"] > 100 for client in clients)
    assert found["bystander"]["messages"]["nop"]["calls"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [31, 32])
def test_hostile_clients_hurt_only_themselves_full_count(tmp_path: Path, seed: int) -> None:
    count = scaled(FULL)
    found = fuzz(tmp_path, "--messages", count, "--states", count, "--seed", seed, timeout=3600)
    for what in ("messages", "states"):
        print(f"{count} {what}: {found[what]['rate']:.0f}/s, {found['bystander'][what]}")
