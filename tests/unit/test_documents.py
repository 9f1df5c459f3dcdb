"""The documents name what is there: files, tests, and one another."""

from __future__ import annotations

import pydoc
import re
from pathlib import Path

import pytest
from conftest import ROOT

import realmap

ROOMS = ("realmap", "tests", "tools")
#: Where this project's own text is.
TEXTS = [ROOT / name for name in (*ROOMS, "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "pyproject.toml", ".ci")]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for each in TEXTS
    for path in ([each] if each.suffix == ".md" else each.rglob("*.md"))
)
#: A path from the top of the repository; and the name of a test, or the beginning of some.
PATH = re.compile(r"(?<![\w./-])(?:\./)?((?:realmap|tests|tools|\.ci)/[\w./-]*[\w/])")
TEST = re.compile(r"\btest_\w+(?:\.py)?")


def missing(text: str) -> set[str]:
    """The paths in it that do not exist."""
    return {path for path in PATH.findall(text) if not (ROOT / path).exists()}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_what_a_document_names_is_there(name: str) -> None:
    text = (ROOT / name).read_text()
    assert not missing(text)
    tests = "\n".join(f"{path.name}\n{path.read_text()}" for path in (ROOT / "tests").rglob("test_*.py"))
    unknown = {
        each for each in TEST.findall(text) if not re.search(rf"\b{each.replace('_N_', '_1_').rstrip('_')}", tests)
    }
    assert not unknown


def test_every_document_that_code_refers_to_is_there() -> None:
    wrong: dict[str, set[str]] = {}
    for folder in TEXTS:
        for path in [folder] if folder.is_file() else folder.rglob("*"):
            if path.suffix not in (".py", ".pyi", ".c", ".h", ".toml", ".sh", ".md", "") or not path.is_file():
                continue
            named = set(re.findall(r"[\w./-]*\w\.md\b", path.read_text(errors="replace")))
            gone = {each for each in named if not any((base / each).exists() for base in (ROOT, path.parent))}
            if gone and path != Path(__file__):
                wrong[path.relative_to(ROOT).as_posix()] = gone
    assert not wrong


def test_a_path_that_is_not_there_is_found() -> None:
    assert missing("see `realmap/nowhere.py`, `./tools/test` and realmap/kernel/.") == {"realmap/nowhere.py"}


def test_help_names_what_there_is_and_no_more() -> None:
    """`help(realmap)` begins with a line for each thing that a program uses."""
    offered = {
        name
        for name in realmap.__all__
        if not (isinstance(found := getattr(realmap, name), type) and issubclass(found, Exception))
        and not re.fullmatch(r"[ku]_[rwx]+|__version__|PAGE_SIZE", name)
    }
    lines = re.findall(r"^([A-Za-z.]\S*(?:, \w+)*)  +\S", realmap.__doc__ or "", re.M)
    named = {name.removeprefix("realmap.") for line in lines for name in line.split(", ")}
    assert named == offered | {"KernelError", "KernelPanic", "shared_memory", "sync"}
    shown = pydoc.plain(pydoc.render_doc(realmap))
    assert not re.findall(r"^ \|  (_[a-z]\w*)", shown, re.M)  # nothing that is private
