"""What is not imported, in a Python of its own, as long as nobody needs it: it would cost more than what is done."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from conftest import BOUND

import realmap

#: What only some of realmap needs; the first line comes with click.
OF_CLICK = {"click", "datetime", "inspect", "threading", "uuid"}
HEAVY = {
    "asyncio", "cloudpickle", "dataclasses", "email", "hashlib", "json", "logging", "msgspec", "multiprocessing",
    "numpy", "pathlib", "posix_ipc", "psutil", "rich", "socket", "subprocess", "tempfile", "traceback",
    "realmap.kernel", "realmap.memory", "realmap.serving", "realmap.user", "realmap.wire",
}  # fmt: skip


@pytest.mark.parametrize(
    ("words", "heavy"),
    [
        (["-c", "import realmap"], HEAVY | OF_CLICK),
        (["-m", "realmap", "--help"], HEAVY),
        (["-m", "realmap", "shm"], HEAVY),
    ],
    ids=["import", "help", "shm"],
)
def test_what_is_large_is_imported_when_it_is_needed(words: list[str], heavy: set[str]) -> None:
    bare, done = (
        subprocess.run([sys.executable, "-X", "importtime", *each], capture_output=True, text=True, timeout=BOUND)
        for each in (["-c", ""], words)
    )
    assert done.returncode == 0
    site, imported = (set(re.findall(r"^import time:.*\| +(\S+)$", each.stderr, re.M)) for each in (bare, done))
    assert "realmap" in imported
    assert not imported & heavy - site


def test_every_name_is_there_and_listed_before_it_is_imported() -> None:
    code = "import realmap; print({*realmap.__all__} - {*dir(realmap)}, *map(realmap.__getattr__, realmap._PLACES))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=BOUND)
    assert done.stdout.startswith("set() <class 'realmap.user.buffer.Buffer'>"), done.stderr
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = realmap.nothing  # type: ignore[attr-defined]
