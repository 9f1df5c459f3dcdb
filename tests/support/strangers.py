"""Processes that know nothing of realmap: `stranger.c`, told what to do line by line."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import BOUND, PAGE

from realmap import ForeignProcess
from realmap.host.stranger import may_open_map_files
from realmap.memory import ForeignMapping

#: Where nothing is by itself: mappings beside one another, and holes.
FREE = 0x5000_0000_0000
KINDS = ("posix", "memfd", "sysv", "anonymous", "file")


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """It goes with this process."""
    return tempfile.TemporaryDirectory(prefix="stranger")


@functools.cache
def program() -> str:
    """It, built, for everybody."""
    os.chmod(_folder().name, 0o755)
    built = Path(_folder().name) / "stranger"
    source = Path(__file__).with_name("stranger.c")
    command = [os.environ.get("CC", "cc"), "-O1", "-pthread", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*command, str(source), "-o", str(built)], check=True)
    return str(built)


def pattern(length: int, seed: int) -> bytes:
    """What `fill` puts there."""
    return bytes((i * 7 + (i >> 8) * 13 + seed) & 255 for i in range(length))


class Place(NamedTuple):
    """What it has mapped: an address, its descriptor (-1: none), its name ("-": none)."""

    address: int
    fd: int
    name: str


class Stranger:
    """One of them."""

    def __init__(self, folder: Path, *arguments: str, user: int | None = None) -> None:
        self.process = subprocess.Popen(
            [program(), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": str(folder)},
            user=user,
            group=user,
            extra_groups=None if user is None else [],
            bufsize=1,
        )
        self.pid = self.process.pid
        self.hear()

    def hear(self) -> str:
        """Its answer."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, *words: object) -> str:
        """Does it; its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        return self.hear()

    def map(self, kind: str, pages: int, address: int = 0, flags: str = "k", seed: int | None = None) -> Place:
        """Maps so many pages; with a `seed` they are filled. It keeps the descriptor: an ordinary user goes by that."""
        at, fd, name = self.tell("map", kind, pages, address, flags).split()
        if seed is not None:
            self.tell("fill", at, pages * PAGE, seed)
        return Place(int(at), int(fd), name)

    def end(self) -> None:
        """Kills and reaps it, and unlinks what it has left. Again: nothing."""
        self.process.kill()
        self.process.wait(BOUND)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        for path in Path("/dev/shm").glob(f"stranger.{self.pid}.*"):  # it may have died before it unlinked one
            path.unlink()


@contextlib.contextmanager
def stranger(folder: Path, *arguments: str, user: int | None = None) -> Iterator[Stranger]:
    """One that ends with the block."""
    made = Stranger(folder, *arguments, user=user)
    try:
        yield made
    finally:
        made.end()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Stranger]:
    with stranger(tmp_path) as made:
        yield made


@pytest.fixture
def process(other: Stranger) -> Iterator[ForeignProcess]:
    with ForeignProcess(other.pid) as found:
        yield found


def at(process: ForeignProcess, address: int) -> ForeignMapping:
    (found,) = [each for each in process.mappings() if each.address == address]
    return found


def require_map_files() -> None:
    if not may_open_map_files():
        pytest.skip("it takes CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE")
