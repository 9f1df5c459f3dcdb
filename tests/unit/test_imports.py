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


#: Each is a program: what of realmap is named first there, in the middle of another first import.
AT_THE_SAME_TIME = """
import random, sys, threading, realmap
sys.setswitchinterval(1e-6)
names = [*realmap._PLACES, "memory"]
random.Random({seed}).shuffle(names)
together, found = threading.Barrier(8), []

def name(mine):
    together.wait()
    found.extend(getattr(realmap, each) for each in mine)

threads = [threading.Thread(target=name, args=(names[at::8],)) for at in range(8)]
for each in threads: each.start()
for each in threads: each.join()
assert len(found) == len(names)
"""
IN_A_HANDLER = """
import signal, sys, realmap
found, sent = [], []

def interrupt(event, args):
    if event == "import" and args[0] == "realmap.user.process" and not sent:
        sent.append(True)
        signal.raise_signal(signal.SIGUSR1)

signal.signal(signal.SIGUSR1, lambda *_: found.append((realmap.connect, realmap.boot, realmap.Process)))
sys.addaudithook(interrupt)
assert sent == [] and realmap.boot and sent
assert found == [(realmap.connect, realmap.boot, realmap.Process)]
assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
"""
AT_A_FORK = """
import os, signal, sys, threading, realmap
midst, forking = threading.Event(), threading.Event()

def wait(event, args):
    if event == "import" and args[0] == "realmap.user.process" and not midst.is_set():
        midst.set()
        assert forking.wait({bound})

sys.addaudithook(wait)
thread = threading.Thread(target=lambda: realmap.boot)
thread.start()
assert midst.wait({bound})
os.register_at_fork(before=forking.set)
child = os.fork()
if not child:
    signal.alarm({bound})
    os._exit(not realmap.boot)
thread.join()
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.parametrize(
    "code",
    [AT_THE_SAME_TIME.format(seed=4), AT_THE_SAME_TIME.format(seed=6), IN_A_HANDLER, AT_A_FORK.format(bound=10)],
    ids=["threads", "more threads", "handler", "fork"],
)
def test_a_name_is_whole_also_in_the_middle_of_another_ones_import(code: str) -> None:
    words = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code]  # of a fork, from 3.12 on
    done = subprocess.run(words, capture_output=True, text=True, timeout=BOUND)
    assert (done.returncode, done.stderr) == (0, "")
