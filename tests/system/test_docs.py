"""The examples in docstrings run, and the public face has the types that a client's checker sees."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import os
import pydoc
import shutil
import subprocess
import sys
from functools import partial
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import pytest
from conftest import BOUND, PAGE, ROOT, SUPPORT

import realmap
from realmap import ambient, shared_memory

CLIENT = SUPPORT / "typed_client.py"
MODULES = [
    "realmap.rights",
    "realmap.memory.frames",
    "realmap.memory.cross_process",
    "realmap.memory.foreign",
    "realmap.user.buffer",
    "realmap.user.handle",
]


@pytest.mark.skipif(PAGE != 4096, reason="the examples count in pages of 4096 bytes")
@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings(name: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert not failed and tried


def test_the_example_of_shared_memory() -> None:
    """In a process tree of its own."""
    text = """if __name__ == "__main__":
        import doctest
        from realmap.shared_memory import block, manager
        print(doctest.testmod(block), doctest.testmod(manager))
        """
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=BOUND, env=clean())
    assert "failed=0, attempted=5" in done.stdout and "failed=0, attempted=1" in done.stdout, done


def clean() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in (ambient.VARIABLE, ambient.TREE)}


def test_everything_public_says_what_it_is() -> None:
    """Stand-alone docstrings, in an editor: of every name at the top, and of its public methods."""
    silent = []
    for name in realmap.__all__:
        found = getattr(realmap, name)
        if inspect.ismodule(found) or not callable(found) or isinstance(found, type | type(len)) is False:
            continue
        if not inspect.getdoc(found):
            silent.append(name)
        if isinstance(found, type) and not issubclass(found, BaseException):
            for key, value in vars(found).items():
                if not key.startswith("_") and callable(value) and not inspect.getdoc(value):
                    silent.append(f"{name}.{key}")
    assert silent == []


#: What is public: `help(realmap)` shows no more. What is new here is documented, and stays.
BYTES = "address alive array cast exports fault rights"
FACE = {
    "Buffer": f"{BYTES} check huge process refcount slice unmap writable",
    "Call": "cancelled deadline kernel name process",
    "CrossProcessMapping": f"{BYTES} drop mapping mappings mirror_mapping offset",
    "ForeignMapping": "address device inode kind length name offset resident rights why_not",
    "ForeignProcess": "close copy_in copy_out mappings mirror name pid",
    "Handle": "length parse path rights token",
    "Kernel": "ending process processes register serve start stop unregister",
    "KernelHandle": "audit connect has_ended pid register settle shutdown snapshot spawn stats trace unregister",
    "Limits": "buffers calls connections given_up grants half_sent handles inheritances mappings orphans processes "
    "reserve running seats seconds segments sessions stock undecoded unread",
    "MappingAccessRights": " ".join(realmap.MappingAccessRights.__members__),
    "MemoryInfo": "address length phys_offset refcount rights type",
    "MemoryType": " ".join(realmap.MemoryType.__members__),
    "Process": "acall attach call close has_ended map path pid query revoke serve session share",
    "Service": "calls close has_ended names wait",
    "Session": "acall call close name pid",
    "ShareableList": "count format index",
    "SharedMemory": "buf close name size unlink",
    "SharedMemoryManager": "ShareableList SharedMemory",
    "SpawnedProcess": "exitcode join kill pid result",
    "UserBuffer": "access address array copy_in copy_out fault has_ended mappings mirror process rights",
    "UserspacePtr": f"{BYTES} drop mapping writable",
}


def test_nothing_private_is_in_the_public_face() -> None:
    theirs = {*dir(int), *dir(SyncManager)}  # what an enum of integers and a manager have anyway
    found = {}
    for module in realmap, shared_memory:
        for name in module.__all__:
            each = getattr(module, name)
            if isinstance(each, type) and issubclass(each, realmap.KernelError):
                own = {key for key in vars(each) if key[0] != "_"}
                assert own <= {"code", "fields", "facts"}, name
            elif isinstance(each, type) and each is not realmap.KernelPanic:
                found[name] = {key for key in dir(each) if key[0] != "_"} - theirs
    expected = {name: set(text.split()) for name, text in FACE.items()}
    assert found == {name: keys - theirs for name, keys in expected.items()}


def test_help_can_be_asked_for() -> None:
    """pydoc resolves annotations: each must be found."""
    for found in [realmap, *(getattr(realmap, name) for name in realmap.__all__ if name[0] != "_")]:
        assert pydoc.render_doc(found)


def test_types_from_a_clients_side() -> None:
    pytest.importorskip("mypy", reason="mypy is part of the lint extra; CI has it")
    checked(sys.executable, env={**os.environ, "MYPYPATH": str(ROOT)})


def checked(python: str, **options: Any) -> None:
    """The client's program holds, with what that interpreter has installed."""
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--python-executable", python]
    command.append("--follow-imports=silent")  # what is wrong inside is told elsewhere
    done = subprocess.run(
        [*command, str(CLIENT)],
        capture_output=True,
        text=True,
        timeout=4 * BOUND,
        cwd=SUPPORT,
        **options,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_source_distribution_installs_with_a_compiler(tmp_path: Path) -> None:
    """In an environment of its own: it works there, its types are seen, and there is one wheel for 3.11 and up."""
    made = tmp_path / "source"
    ignore = shutil.ignore_patterns(
        ".git", ".venv*", "*.so", "*.egg-info", "build", "dist", ".mypy_cache", "__pycache__"
    )
    shutil.copytree(ROOT, made, ignore=ignore)
    run = partial(subprocess.run, check=True, capture_output=True, text=True, timeout=10 * BOUND)
    text = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    venv = tmp_path / "venv"
    run([sys.executable, "-m", "venv", str(venv)])
    python = str(venv / "bin" / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    run([*pip, "install", "setuptools>=77"])
    name = run([python, "-c", text, str(tmp_path)], cwd=made).stdout.split()[-1]
    run([*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(tmp_path / name)])
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp311-abi3-linux_" in wheel.name
    run([*pip, "install", str(wheel)])
    done = run([python, str(CLIENT)], cwd=tmp_path, env=clean())
    assert done.stderr == ""
    if importlib.util.find_spec("mypy"):
        checked(python)


def test_what_was_checked_runs() -> None:
    done = subprocess.run([sys.executable, str(CLIENT)], capture_output=True, text=True, timeout=BOUND, env=clean())
    assert (done.returncode, done.stderr) == (0, "")
