"""What the dead leave, and who sweeps it; where sockets lie, and the paths that will do."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import posix_ipc
import pytest
from conftest import PAGE, left_names

from realmap.errors import AccessDenied, InvalidHandle
from realmap.host import procfs, runtime
from realmap.host.segment import Segment


def dead_stamp() -> str:
    child = subprocess.Popen([sys.executable, "-c", ""])
    start = procfs.start_time(child.pid)
    child.wait()
    return f"{procfs.pid_namespace()}.{child.pid}.{start}"


def killed_maker(name: str, then: str = "") -> None:
    """A process makes a segment of this name, does what else it is told, and is killed."""
    program = f"""
import os, signal
from realmap.host.segment import Segment
made = Segment({PAGE}, name={name!r})
{then}
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL


@pytest.mark.alone
def test_a_named_segment_of_a_killed_maker_is_swept() -> None:
    name = f"test-{os.getpid()}"
    killed_maker(name)
    assert os.path.exists(f"/dev/shm/{name}")
    assert runtime.sweep() == [name]
    assert not os.path.exists(f"/dev/shm/{name}")
    assert left_names() == []
    assert runtime.sweep() == []


@pytest.mark.alone
@pytest.mark.parametrize("what", ["a new one", "another link"])
def test_a_sweep_leaves_what_the_dead_did_not_make(what: str) -> None:
    name = f"test-{os.getpid()}"
    killed_maker(name, f"os.rename('/dev/shm/{name}', '/dev/shm/{name}.kept')" if what == "another link" else "")
    if what == "a new one":
        os.unlink(f"/dev/shm/{name}")
    later = Segment(PAGE, name=name)
    assert len(runtime.sweep()) == 1  # the name that it was made under
    assert os.stat(f"/dev/shm/{name}").st_ino == later.inode
    later.close()
    if what == "another link":  # somebody gave it a name that its maker knew nothing of
        os.unlink(f"/dev/shm/{name}.kept")
    assert not os.path.exists(f"/dev/shm/{name}")


@pytest.mark.alone
def test_of_those_who_sweep_at_the_same_time_one_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"test-{os.getpid()}"
    killed_maker(name)
    rename, later = os.rename, []

    def late(old: str, new: str) -> None:
        monkeypatch.undo()
        assert runtime.sweep() == [name]  # the other one, and then somebody makes it anew
        later.append(Segment(PAGE, name=name))
        rename(old, new)

    monkeypatch.setattr(os, "rename", late)
    assert runtime.sweep() == []
    assert os.stat(f"/dev/shm/{name}").st_ino == later[0].inode
    later[0].close()


@pytest.mark.alone
def test_who_comes_second_leaves_the_first_ones_name_as_it_is() -> None:
    name = f"test-{os.getpid()}"
    killed_maker(
        name,
        f"""
for _ in range(3):
    try:
        Segment({PAGE}, name={name!r})
    except Exception as error:
        assert "exists already" in str(error)
if not os.fork():
    try:
        Segment({PAGE}, name={name!r})
    finally:
        os._exit(0)
os.wait()
""",
    )
    assert runtime.sweep() == [name]
    assert left_names() == []


@pytest.mark.alone
def test_sweeping_takes_what_the_dead_left_and_nothing_else() -> None:
    folder = runtime.directory()
    dead, alive = dead_stamp(), runtime.stamp()
    for stamp in (dead, alive):
        shm = posix_ipc.SharedMemory(f"/{runtime.SEGMENT_PREFIX}{stamp}.0", posix_ipc.O_CREX)
        os.close(shm.fd)
    (folder / f"{dead}.0.sock.lock").touch()
    (folder / f"{dead}.0.sock").touch()  # no socket: not ours to remove
    held = runtime.SocketLock(str(folder / f"{alive}.9.sock"))
    named = Segment(PAGE, name=f"mine-{os.getpid()}")

    gone = runtime.sweep()

    assert f"{runtime.SEGMENT_PREFIX}{dead}.0" in gone
    assert os.path.exists(f"/dev/shm/{runtime.SEGMENT_PREFIX}{alive}.0")
    assert os.path.exists(f"/dev/shm/mine-{os.getpid()}")
    assert os.path.exists(held.path + ".lock")
    os.unlink(f"/dev/shm/{runtime.SEGMENT_PREFIX}{alive}.0")
    os.unlink(folder / f"{dead}.0.sock")
    (folder / f"{dead}.0.sock.lock").unlink(missing_ok=True)
    named.close()
    held.release()
    assert not [name for name in runtime.sweep() if str(os.getpid()) in name or dead in name]


def test_the_directory_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(runtime.VARIABLE, str(tmp_path / "here"))
    folder = runtime.directory()
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    with pytest.raises(AccessDenied, match="nobody else"):
        runtime.directory()
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(AccessDenied, match=f"set .{runtime.VARIABLE}"):
        runtime.directory()


def test_sockets_are_listed_again_where_they_have_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, listed = tmp_path / "sockets", itertools.count()
    monkeypatch.setenv(runtime.VARIABLE, str(place))
    find = runtime.directory
    monkeypatch.setattr(runtime, "directory", lambda: (next(listed), find())[1])
    found: list[str] = []
    for _ in range(3):  # one right after the other: its time alone does not tell that it has changed
        assert runtime.sockets() == found
        path = str(place / f"{runtime.stamp()}.{len(found)}.sock")
        Path(path).touch()
        Path(path + ".lock").touch()
        found.append(path)
    os.utime(place, (1e9, 1e9))
    assert runtime.sockets() == found
    before = next(listed)
    assert runtime.sockets() == found
    assert next(listed) == before + 1
    monkeypatch.setattr(runtime, "maker_lives", lambda path: path != found[1])
    assert runtime.sockets() == [found[0], found[2]]
    os.unlink(found[0])
    assert runtime.sockets() == [found[2]]


def test_there_is_one_directory_whatever_others_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(runtime.VARIABLE)
    found = set()
    for variable in ("TMPDIR", "XDG_RUNTIME_DIR", "HOME"):
        monkeypatch.setenv(variable, str(tmp_path / ("long" * 50)))
        found.add(str(runtime.directory()))
    assert found == {f"/dev/shm/realmap-{os.geteuid()}"}


def test_a_directory_that_cannot_be_made_is_said_with_what_to_change(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for place, why in ((tmp_path / "missing" / "here", "No such file"), (tmp_path / "file", "a directory of yours")):
        monkeypatch.setenv(runtime.VARIABLE, str(place))
        with pytest.raises(AccessDenied, match=f"(?s){place}.*{why}.*REALMAP_DIR"):
            runtime.directory()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[str]:
    yield str(tmp_path / "k.sock")


def test_a_path_serves_one_kernel(place: str) -> None:
    lock = runtime.SocketLock(place)
    with pytest.raises(InvalidHandle, match="serves"):
        runtime.SocketLock(place)
    lock.release()
    lock.release()
    runtime.SocketLock(place).release()
    assert not os.path.exists(place + ".lock")


def test_paths_that_will_not_do(place: str) -> None:
    Path(place).touch()
    for path, words in [
        (place, "no socket"),
        ("/tmp/" + "x" * 103, "shorten"),
        ("/tmp/\udcff", "UTF-8"),
        (place + "/k.sock", "directory"),
    ]:
        with pytest.raises(InvalidHandle, match=words):
            runtime.SocketLock(path)
    assert not os.path.exists(place + ".lock")
