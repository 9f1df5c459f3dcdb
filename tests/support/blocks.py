"""What the tests of realmap.shared_memory share: programs in process trees of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from conftest import BOUND

from realmap import ambient
from realmap.shared_memory import SharedMemory

HERE = Path(__file__).parent


def clean() -> dict[str, str]:
    """An environment outside of every process tree."""
    return {key: value for key, value in os.environ.items() if key not in (ambient.VARIABLE, ambient.TREE)}


def run(text: str, module: str, *args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A program that imports shared memory from either module, in a process tree of its own."""
    return subprocess.run(
        [sys.executable, "-c", program(text, module), *args],
        env=clean() if env is None else env,
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=BOUND,
    )


def program(text: str, module: str) -> str:
    head = f"import os, sys, time\nfrom {module}.shared_memory import ShareableList, SharedMemory\n"
    return head + textwrap.dedent(text)


def start(text: str, module: str, *args: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program(text, module), *args],
        env=clean() if env is None else env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end(process: subprocess.Popen[str], text: str = "\n") -> tuple[str, str]:
    return process.communicate(text, timeout=BOUND)


def exists(name: str) -> bool:
    try:
        SharedMemory(name).close()
    except FileNotFoundError:
        return False
    return True
