"""What the demo is to check, and what it found: records, and the files and ranges that it looks at."""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from realmap.errors import InvalidSize
from realmap.memory.cross_process import CrossProcessMapping
from realmap.pages import PAGE_SIZE, align_down

#: Bytes a segment in every second file, so that ranges cross segments.
FRAGMENT = 5 * PAGE_SIZE


def digest(content: bytes | memoryview | CrossProcessMapping) -> str:
    return hashlib.sha256(content).hexdigest()


class Check(msgspec.Struct):
    """One range of one file, as the kernel saw it. Addresses, offsets and lengths in bytes."""

    file: int
    offset: int
    length: int
    user_address: int = 0
    kernel_address: int = 0
    segments: int = 0
    #: Of its frames, before, during and after its mirror.
    refcounts: Sequence[int] = (0, 0, 0)
    digest: str = ""
    expected: str = ""
    #: The page frame numbers behind its first and last byte, as its user has them, and the kernel.
    frames: list[tuple[int | None, int | None]] = []

    @property
    def page_offset(self) -> int:
        return self.user_address % PAGE_SIZE

    @property
    def same_frames(self) -> bool | None:
        """Whether user's page and mirror are the same physical frames; None where Linux does not tell (not root)."""
        known = [(user, kernel) for user, kernel in self.frames if user is not None and kernel is not None]
        return all(user == kernel for user, kernel in known) if known else None

    @property
    def placed(self) -> bool:
        """Whether its mirror starts where it does in its page, and is in the same frames (as far as Linux tells)."""
        return self.kernel_address % PAGE_SIZE == self.page_offset and self.same_frames is not False

    @property
    def digested(self) -> bool:
        """Whether the kernel read what is on disk."""
        return self.digest == self.expected != ""

    @property
    def counted(self) -> bool:
        """Whether its mirror counted as one holder of its memory, and as none when it was dropped."""
        before, during, after = self.refcounts
        return during == before + 1 and after == before

    @property
    def ok(self) -> bool:
        return self.placed and self.digested and self.counted


class FileReport(msgspec.Struct):
    """A file, the process that loaded it, and what was checked."""

    path: str
    size: int
    fragment: int | None
    pid: int = 0
    checks: list[Check] = []


class KillReport(msgspec.Struct):
    """The owner that was killed while the kernel held a mirror of its memory."""

    pid: int
    exitcode: int | None
    length: int
    digest: str
    expected: str
    refcounts: tuple[int, int]

    @property
    def died(self) -> bool:
        return self.exitcode == -9

    @property
    def digested(self) -> bool:
        """Whether the mirror's bytes stayed what they were."""
        return self.digest == self.expected != ""

    @property
    def counted(self) -> bool:
        """Whether owner and mirror held them, and then the mirror alone."""
        return self.refcounts == (2, 1)

    @property
    def ok(self) -> bool:
        return self.died and self.digested and self.counted


class Race(msgspec.Struct):
    """A mirror and a copy of the same bytes, timed in turns in the kernel. Bytes, and medians in nanoseconds."""

    length: int
    mirror: int
    copy: int
    #: With a digest of them all.
    mirror_digest: int
    copy_digest: int
    ok: bool


class Report(msgspec.Struct):
    """All that the demo found; `ok` where everything held."""

    kernel: int
    files: list[FileReport]
    races: list[Race]
    #: Whether the user found in its own memory what the kernel wrote into a mirror of it.
    written: bool
    killed: KillReport
    balance: dict[str, int]
    ok: bool = False

    def holds(self) -> bool:
        checked = [check.ok for file in self.files for check in file.checks]
        raced = bool(self.races) and all(race.ok for race in self.races)
        held = self.written and self.killed.ok and not any(self.balance.values())
        return bool(checked) and all(checked) and raced and held


def default_files() -> list[str]:
    """A handful of real files that every Python installation has, some MB in all, and that this user may read.

    Of its library, and the interpreter.
    """

    def is_readable(path: Path) -> bool:
        return path.is_file() and os.access(path, os.R_OK)

    library = Path(sysconfig.get_path("stdlib"))
    candidates = [path for folder in (".", "pydoc_data", "lib-dynload") for path in (library / folder).glob("*.*")]
    largest = sorted(filter(is_readable, candidates), key=lambda path: path.stat().st_size)[-6:]
    shared = Path(str(sysconfig.get_config_var("LIBDIR")), str(sysconfig.get_config_var("INSTSONAME")))
    interpreter = shared if shared.is_file() else Path(sys.executable).resolve()
    return [str(path) for path in dict.fromkeys([library / "this.py", *largest, interpreter]) if is_readable(path)]


def ranges_of(size: int) -> list[tuple[int, int]]:
    """The (offset, length) that are checked of a file of `size` bytes.

    Whole, odd, across pages and segments, one byte.
    """
    wanted = [
        (0, size),
        (1, size - 2),
        (0, 1),
        (size - 1, 1),
        (PAGE_SIZE - 1, 2),
        (FRAGMENT - 7, 14),
        (FRAGMENT + 3, 3 * FRAGMENT + 5),
        (align_down(size - 1), size - align_down(size - 1)),
        (size // 3 | 1, 3333),
    ]
    return [
        (offset, length)
        for offset, length in dict.fromkeys(wanted)
        if offset >= 0 and length > 0 and offset + length <= size
    ]


def plan(paths: Iterable[str]) -> list[FileReport]:
    """What is to be checked of each file, with the digests of its bytes on disk.

    OSError: a file cannot be read. InvalidSize: it is empty, and there is nothing to map.
    """
    files = []
    for number, path in enumerate(paths):
        if not os.path.getsize(path):
            raise InvalidSize(0, why=f"{path} is empty: there is nothing to map")
        content = memoryview(Path(path).read_bytes())
        size = len(content)
        checks = [
            Check(number, offset, length, expected=digest(content[offset : offset + length]))
            for offset, length in ranges_of(size)
        ]
        files.append(FileReport(str(path), size, FRAGMENT if number % 2 and size > FRAGMENT else None, checks=checks))
    return files
