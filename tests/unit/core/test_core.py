"""The C core as a whole: odd arguments, what cannot be set, a second import. What each type does has its own tests."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from conftest import BOUND, PAGE, SUPPORT, long, scaled

import realmap
from realmap import _core
from realmap.memory import USER_LAND, CrossProcessMapping, FrameAllocator, KernelMemory, Mapping
from realmap.rights import MemoryType, u_rw

ODD = SUPPORT / "odd_arguments.py"


def _odd_arguments(seed: int, count: int, log: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ODD), str(seed), str(count), str(log)], capture_output=True, text=True, timeout=20 * BOUND
    )
    assert done.returncode == 0, f"{done.stderr[-2000:]}\nseed {seed}, at: {log.read_text()}"
    assert int(done.stdout) > count // 4, "most steps are refused: too few get anywhere"


@pytest.mark.process
@pytest.mark.parametrize("seed", [0, *map(long, range(1, 6))])
def test_odd_arguments(seed: int, tmp_path: Path) -> None:
    """No argument of any method crashes the process, nor has C return without an exception (SystemError)."""
    _odd_arguments(seed, 3000, tmp_path / "log")


@pytest.mark.slow
def test_many_odd_arguments(tmp_path: Path) -> None:
    for seed in range(6, 6 + scaled(200)):
        _odd_arguments(seed, 5000, tmp_path / "log")


def _run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=BOUND)


@pytest.mark.process
def test_it_is_imported_again() -> None:
    """By a reload, or where sys.modules has lost it: the types stay the same, and what was made by them works on."""
    done = _run("""
        import gc, importlib, sys
        import realmap
        from realmap import _core
        from realmap.memory import *

        mapping = Mapping(0x200000000000, FrameAllocator().allocate(4096), 0, 4096, MemoryType.HEAP, realmap.u_rw)
        mirror = CrossProcessMapping.mirror_mapping(mapping, 0, 10, kernel=KernelMemory())
        importlib.reload(_core)
        del sys.modules["realmap._core"], realmap._core
        again = importlib.import_module("realmap._core")
        assert again is not _core and again.Window is _core.Window and again.Mirror is CrossProcessMapping.__base__
        del _core
        gc.collect()
        mirror[0] = 7
        print(mirror[0], CrossProcessMapping.mirror_mapping(mapping, 0, 1, kernel=KernelMemory())[:])
    """)
    assert (done.stdout, done.stderr) == ("7 b'\\x07'\n", "")


@pytest.mark.process
def test_another_interpreter_of_the_process_cannot_have_it() -> None:
    done = _run("""
        try:
            import _interpreters as interpreters
        except ImportError:
            import _xxsubinterpreters as interpreters
        import realmap
        code = '''if True:
            try:
                import realmap._core
            except ImportError as error:
                print(error, flush=True)
            else:
                print("imported", flush=True)
        '''
        try:
            number = interpreters.create("legacy")  # it shares the GIL: Python lets it try
        except TypeError:
            number = interpreters.create(isolated=False)
        interpreters.run_string(number, code)
        interpreters.destroy(number)
    """)
    assert "main interpreter" in done.stdout, done.stderr


@pytest.fixture
def land() -> KernelMemory:
    return KernelMemory()


def test_what_the_core_relies_on_cannot_be_set(frames: FrameAllocator, land: KernelMemory) -> None:
    shared = frames.allocate(PAGE)
    mapping = Mapping(USER_LAND.start, shared, 0, PAGE, MemoryType.HEAP, u_rw)
    mirror = CrossProcessMapping.mirror_mapping(mapping, 0, 10, kernel=land)
    things: list[tuple[Any, str]] = [
        (shared, "serial huge refcount freed _fd"),
        (mapping, "address frames rights phys_offset length released"),
        (mirror, "mapping mappings address exports alive fault _start _caller _base _span _prot"),
        (land, "live _cursor _budget _kept_bytes _made"),
    ]
    for thing, names in things:
        for name in names.split():
            before = getattr(thing, name)
            for value in (None, 5, object()):
                with pytest.raises(AttributeError):
                    setattr(thing, name, value)
            with pytest.raises(AttributeError):
                delattr(thing, name)
            assert getattr(thing, name) == before
    mirror.drop()


def test_what_is_set_once_is_checked(frames: FrameAllocator, land: KernelMemory) -> None:
    shared = frames.allocate(2 * PAGE)
    mapping = Mapping(USER_LAND.start, shared, 0, PAGE, MemoryType.HEAP, u_rw)
    who = ("mapping", 0, "")
    for again in (lambda: mapping._set(0, None, 0, PAGE, 3, who), lambda: shared._set(0, 0)):
        with pytest.raises(ValueError, match="once"):
            again()
    for address, offset, length in [(1, 0, PAGE), (0, 1, PAGE), (0, 0, 1), (0, 0, 0), ((1 << 64) - PAGE, 0, 2 * PAGE)]:
        with pytest.raises(ValueError):
            _core.Mapping()._set(address, None, offset, length, 3, who)
    for rights in (None, 1.0, 1 << 40, _Number(3)):
        with pytest.raises(TypeError):
            _core.Mapping()._set(0, None, 0, PAGE, rights, who)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        _core.Mapping()._set(0, None, 0, PAGE, 3, "")  # type: ignore[arg-type]
    end = land.land.end
    for cursor in (0, land.start + 1, end + 2 * PAGE):
        with pytest.raises(ValueError):
            land._move(land._cursor, cursor, end)
    assert not land._move(land._cursor + PAGE, land.start, end), "somebody has taken space meanwhile"
    for start, stop in [(0, PAGE), (USER_LAND.start + 1, end), (end, end), (land.start, 1 << 63)]:
        with pytest.raises(ValueError):
            land._prepare(start, stop, 0, 1000)
    with pytest.raises(ValueError, match="forked child"):
        land._lose()
    assert (shared.refcount, land.live) == (1, 0)


class _Number:
    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


def test_what_was_never_begun_says_so() -> None:
    for kind in (_core.Frames, _core.Mapping, _core.Land, Mapping, realmap.memory.SharedFrames, KernelMemory):
        begun = kind.__new__(kind)  # type: ignore[call-overload]
        for name in dir(kind):
            if not name.startswith("__") and callable(getattr(kind, name)):
                try:
                    getattr(begun, name)()
                except (AttributeError, TypeError, ValueError, RuntimeError, OSError):
                    pass
    mapping = Mapping.__new__(Mapping)
    mapping.release()
    assert mapping.released
    with pytest.raises(AttributeError):
        mapping.frames  # noqa: B018
    with pytest.raises(RuntimeError, match="pinned"):
        mapping.pin()
    assert _core.copy_in(mapping, 0, 1) is None
    with pytest.raises(realmap.InvalidHandle, match="gone"):
        _core.Frames().hold(mapping, "nobody")
    for kind in (_core.Window, _core.View, _core.Mirror, CrossProcessMapping, realmap.Buffer):
        with pytest.raises(TypeError):
            object.__new__(kind)
    with pytest.raises(TypeError, match="land"):
        CrossProcessMapping._map(USER_LAND.start, 3, [(-1, 0, PAGE)], 0, PAGE, 0)


def test_frames_that_go_while_they_are_mirrored(frames: FrameAllocator, land: KernelMemory) -> None:
    """What is freed from within the call that wants them is gone for it, too."""
    shared = frames.allocate(PAGE)
    mapping = Mapping(USER_LAND.start, shared, 0, PAGE, MemoryType.HEAP, u_rw)

    class Pieces(list[Any]):
        def __iter__(self) -> Any:
            mapping.release()
            return super().__iter__()

    pieces = Pieces([(shared._fd, 0, PAGE)])
    with pytest.raises((realmap.InvalidHandle, OSError)):
        _core.Mirror._open_at(land, land.start, (mapping,), (shared,), pieces, 0, 0, PAGE, 3)
    assert (shared.freed, land.live, frames.used) == (True, 0, 0)


def test_a_file_is_read_from_its_beginning(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(range(256)) * 20)
    place = str(file).encode()
    for most in (0, 1, 333, 4096):
        assert _core.read_file(place, most) == file.read_bytes()[:most]
    assert len(_core.read_file(place, 1 << 40)) == 4096  # it never takes more
    with pytest.raises(FileNotFoundError):
        _core.read_file(place + b"x", 10)
    with pytest.raises(IsADirectoryError):
        _core.read_file(str(tmp_path).encode(), 10)
    with pytest.raises(ValueError, match="null"):
        _core.read_file(place + b"\0", 10)
