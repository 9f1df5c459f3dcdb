"""Names, columns and bytes, as commands print them."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import threading
from pathlib import Path

import pytest
from conftest import wait_until
from rich.console import Console

from realmap.cli.output import Column, plain, show_json, table, until_interrupted, write_files
from realmap.host import procfs
from realmap.observe.words import harmless


def test_names_are_shown_harmless() -> None:
    assert harmless("a\x1b[0m\n\t\x7f\x9b\u202e\udc80é ü") == "a\\x1b[0m\\n\\t\\x7f\\x9b\\u202e\\udc80é ü"


def test_columns_in_a_pipe() -> None:
    columns = [Column("n", "number"), Column("at", "hex"), Column("name"), Column("last")]
    text = plain(columns, [[1, 4096, "a b", "c d"], [None, 1, "", []], [22, 0, "x" * 50, "e"]])
    assert [line.split(maxsplit=3) for line in text.splitlines()] == [
        ["n", "at", "name", "last"],
        ["1", "0x1000", "a\\x20b", "c d"],
        ["-", "0x1", "-", "-"],
        ["22", "0x0", "x" * 50, "e"],
    ]
    assert text.splitlines()[0].index("last") == text.splitlines()[1].index("c d")


def test_columns_that_nobody_needs_are_left_out_on_a_terminal() -> None:
    columns = [Column("n", "number"), Column("name", optional=True), Column("huge", "bytes", optional=True)]
    assert [str(each.header) for each in table(columns, [[1, None, 0], [2, "", 0]]).columns] == ["n"]
    made = table(columns, iter([[1, None, 0], [2, "", 4096]]))
    assert [str(each.header) for each in made.columns] == ["n", "huge"]
    assert [str(cell) for cell in made.columns[1].cells] == ["0 B", "4 KiB"]
    assert plain(columns, [[1, None, 0]]).splitlines()[0].split() == ["n", "name", "huge"]


def test_a_narrow_terminal_gets_whole_columns_and_word_of_the_others() -> None:
    columns = [Column("at", "hex"), Column("uid", "number", spare=2), Column("size", "bytes", spare=1), Column("who")]
    rows = [[0x200000000000, 1000, 4096, "a name that is long enough to be folded"]]
    for width, names in ((80, "at uid size who"), (47, "at uid size who"), (40, "at size who"), (33, "at who")):
        made = table(columns, rows, width)
        assert [str(each.header) for each in made.columns] == names.split()
        missing = [column.name for column in columns if column.name not in names.split()]
        assert made.caption == (f"no room for: {', '.join(missing)}" if missing else None)
        console = Console(width=width, file=io.StringIO(), color_system=None)
        console.print(made)
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert "0x200000000000" in lines[1]  # no number is broken
        assert max(map(len, lines)) <= width


def test_of_a_long_list_a_terminal_shows_the_first() -> None:
    columns = [Column("segments"), Column("holders", "lines")]
    row = [list(range(1000)), [f"holder {each}" for each in range(1000)]]
    cells = [str(cell) for column in table(columns, [row]).columns for cell in column.cells]
    assert cells == ["0,… (1000)", "holder 0\nholder 1\nholder 2\nand 997 more"]
    short = table(columns, [[[1, 2, 3], ["a", "b", "c", "d"]]]).columns
    assert [str(cell) for column in short for cell in column.cells] == ["1,2,3", "a\nb\nc\nd"]
    line = plain(columns, [row]).splitlines()[1]
    assert line.startswith(",".join(map(str, range(1000))) + " ")
    assert line.endswith("; holder 999")


def test_times_have_units_on_a_terminal_and_seconds_in_a_pipe() -> None:
    columns = [Column("took", "seconds")]
    assert plain(columns, [[1.25e-5], [None]]).split() == ["took", "0.000012500", "-"]
    assert [str(cell) for cell in table(columns, [[1.25e-5], [None]]).columns[0].cells] == ["12.5 µs", "-"]


@pytest.mark.parametrize(
    ("command", "script"),
    [("x/y.py -v", "y.py"), ("-m http.server 1", "http.server"), ("-u -W error z.py", "z.py"), ("-c 1", ""), ("", "")],
)
def test_python_is_called_by_its_script(command: str, script: str) -> None:
    assert procfs._script([b"python3", *command.encode().split()]) == script.encode()


def test_signals_end_a_watch_at_any_moment() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        for _ in range(100):
            with until_interrupted() as is_over:
                assert not is_over(0)
                sender = threading.Thread(target=os.kill, args=(os.getpid(), number))
                sender.start()
                wait_until(lambda: is_over(0.0001), "the signal")
                sender.join()


def test_a_file_that_cannot_be_written_is_named_and_not_left_behind(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    paths = [str(tmp_path / name) for name in ("there", "new")]
    Path(paths[0]).touch()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        assert write_files((None, bytes), *((path, lambda: b"found") for path in paths)) == paths
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capsys.readouterr().err == "".join(f"Error: cannot write {path}: File too large\n" for path in paths)
    assert os.listdir(tmp_path) == ["there"]
    assert write_files((paths[1], lambda: b"found")) == []
    assert Path(paths[1]).read_bytes() == b"found"


def test_json_on_a_terminal_is_harmless(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"name": "\x1b[31m\x9b31m\x7f→"}
    show_json(value)
    out = capsys.readouterr().out
    assert out.replace("\n", "").isprintable()
    assert json.loads(out) == value
