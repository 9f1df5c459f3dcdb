"""Memory cgroups, of both versions: those above this process, and one of its own below them."""

from __future__ import annotations

import contextlib
import errno
import time
from pathlib import Path
from typing import NamedTuple

MOUNT = Path("/sys/fs/cgroup")
#: How long Linux may take to let go of a group whose processes have just ended. Seconds.
PATIENCE = 5.0


class Place(NamedTuple):
    """Where this process is in a hierarchy of cgroups, and the top of that."""

    version: int
    folder: Path
    top: Path

    @property
    def levels(self) -> list[Path]:
        """Its folder and those above, nearest first."""
        return [level for level in (self.folder, *self.folder.parents) if level.is_relative_to(self.top)]


def places(controller: str = "memory") -> list[Place]:
    """Of this process, in each hierarchy that may have this controller. OSError: /proc does not say."""
    found = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            found.append(Place(2, MOUNT / path.lstrip("/"), MOUNT))
        elif controller in controllers.split(","):
            found.append(Place(1, MOUNT / controller / path.lstrip("/"), MOUNT / controller))
    return found


class MemoryCgroup:
    """A group of its own, below that of this process. Whoever is left in it when it is closed goes back there."""

    def __init__(self, name: str) -> None:
        """OSError: none can be made; it says why, and what would help."""
        place, parent = _parent()
        self._version, self._home = place.version, place.folder
        self._folder = parent / name
        try:
            self._folder.mkdir()
        except OSError as error:
            why = f"{error.strerror}: be root, or have the group delegated (systemd-run --user --scope -p Delegate=yes)"
            raise OSError(error.errno, why, str(parent)) from None

    def enter(self, pid: int) -> None:
        """Puts a process there: what it takes from now on counts here. OSError: as Linux says."""
        self._write("cgroup.procs", pid)

    def limit(self, length: int) -> None:
        """No more than so many bytes from now on. OSError: more are in use."""
        self._write("memory.limit_in_bytes" if self._version == 1 else "memory.max", length)

    def reclaim(self, length: int) -> None:
        """Takes back what it can of so many bytes; version 1: of all of them. OSError: as Linux says."""
        with contextlib.suppress(BlockingIOError):  # EAGAIN: there was less
            if self._version == 1:
                self._write("memory.force_empty", 0)
            else:
                self._write("memory.reclaim", length)

    @property
    def kills(self) -> int:
        """How many processes Linux has killed because it was full."""
        text = (self._folder / ("memory.oom_control" if self._version == 1 else "memory.events")).read_text()
        return int(dict(line.split() for line in text.splitlines())["oom_kill"])

    def close(self) -> None:
        """Sends everyone home, and removes it. Again: nothing. OSError: Linux does not let go of it."""
        end = time.monotonic() + PATIENCE
        while self._folder.exists():
            try:
                for pid in (self._folder / "cgroup.procs").read_text().split():
                    with contextlib.suppress(ProcessLookupError):
                        (self._home / "cgroup.procs").write_text(pid)
                self._folder.rmdir()
            except FileNotFoundError:
                return
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > end:
                    raise
                time.sleep(0.01)

    def _write(self, name: str, value: int) -> None:
        (self._folder / name).write_text(str(value))


def _parent() -> tuple[Place, Path]:
    """The nearest group in which groups that count memory can be made."""
    for place in places():
        for level in place.levels:
            if place.version == 1 and (level / "memory.force_empty").exists():
                return place, level
            if place.version == 2 and "memory" in _text(level / "cgroup.subtree_control").split():
                return place, level
    raise OSError(errno.ENOENT, "no memory cgroup above this process: mount one, or start it by systemd-run --scope")


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
