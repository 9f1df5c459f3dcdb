"""`realmap peek`, `poke` and `maps`, of a process that is no user of any kernel."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path

import click
import pytest
from command_line import command_line
from conftest import BOUND, PAGE, wait_until
from strangers import FREE, Stranger, other, pattern
from terminal import on_a_terminal

import realmap
from realmap.cli.peek import CHANGED, lines
from realmap.cli.values import form_of, values, written

__all__ = ["other"]


def good(*arguments: object, says: str = "") -> str:
    done = command_line(*arguments, says=says)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("kind", ["memfd", "private"])
def test_peek_shows_hex_and_text(other: Stranger, kind: str) -> None:
    place = other.map(kind, 2, FREE, seed=65)
    shown = good("peek", other.pid, hex(place.address + 3), 21).splitlines()
    data = pattern(24, 65)[3:]
    letters = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in data)
    assert shown == [
        f"{place.address + 3:#x} {data[:16].hex(' ')} {letters[:16]}",
        f"{place.address + 19:#x} {data[16:].hex(' ')} {' ' * 33}{letters[16:]}",
    ]
    assert max(map(len, shown)) < 80
    end = place.address + 2 * PAGE
    assert len(good("peek", other.pid, end - 100).splitlines()) == 7  # 256 bytes, or up to the hole
    whole = json.loads(good("peek", other.pid, place.address, PAGE, "--json"))
    assert (whole["hex"], whole["length"], whole["pid"]) == (pattern(PAGE, 65).hex(), PAGE, other.pid)


def test_peek_in_other_forms(other: Stranger) -> None:
    place = other.map("memfd", 1)
    with realmap.ForeignProcess(other.pid) as process:
        process.copy_out(place.address, struct.pack("=dd", 2.5, -3) + "né\x1b\n".encode())
    assert good("peek", other.pid, place.address, 17, "--as", "f8").split()[1::2] == ["2.5", "-3.0"]
    assert good("peek", other.pid, place.address + 16, 5, "--as", "utf8") == "né\\x1b\n\n"
    found = json.loads(good("peek", other.pid, place.address, 16, "--as", "struct <i4s", "--json"))
    assert found["values"] == [[0, "\x00\x00\x04@"], [0, "\x00\x00\x08\\xc0"]]


def test_a_segment_by_its_name(other: Stranger) -> None:
    """As `realmap shm` prints it, on a terminal and in a pipe."""
    memfd, posix = other.map("memfd", 2, seed=65), other.map("posix", 2, seed=9)
    name = os.path.basename(posix.name)
    assert good("peek", other.pid, name, 16) == good("peek", other.pid, posix.address, 16)
    shown = command_line("shm", "--pid", other.pid, "--kind", "memfd").stdout.splitlines()[-1].split()[6]
    for each in (shown, "stranger \n\\012's"):
        assert good("peek", other.pid, each, 16) == good("peek", other.pid, memfd.address, 16)
    assert "2 bytes written" in good("poke", other.pid, name, "68 69", "--yes")
    assert other.tell("get", posix.address + 1) == str(0x69)
    done = command_line("peek", other.pid, "nobody")
    assert done.returncode == 2 and f"process {other.pid} has mapped no segment of that name:" in done.stderr
    assert f"{posix.address:#x}  posix  {name}\n" in done.stderr and f"{memfd.address:#x}  memfd  " in done.stderr
    again = other.map("memfd", 1)
    done = command_line("poke", other.pid, shown, "00", "--yes")
    assert done.returncode == 2 and "mapped more than once" in done.stderr
    assert f"{memfd.address:#x}" in done.stderr and f"{again.address:#x}" in done.stderr


@pytest.mark.parametrize("end", ["pieces", "x (deleted)"])
def test_a_segment_in_pieces_begins_with_its_first(end: str) -> None:
    import mmap

    name = f"realmap-test-{os.getpid()}-{end}"
    fd = os.open(f"/dev/shm/{name}", os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        os.pwrite(fd, b"AB\0C" + bytes(3 * PAGE), 0)
        with mmap.mmap(fd, PAGE), mmap.mmap(fd, PAGE, offset=2 * PAGE):  # Linux puts the later one below
            assert good("peek", os.getpid(), name, 4).endswith(" 41 42 00 43" + " " * 37 + "AB.C\n")
    finally:
        os.close(fd)
        os.unlink(f"/dev/shm/{name}")


def test_what_cannot_be_looked_at_is_said_in_a_line(other: Stranger) -> None:
    place = other.map("memfd", 1)
    for words, why in [
        (("peek", other.pid, 4096), "nothing is mapped there"),
        (("peek", other.pid, "zz"), "no address"),
        (("peek", other.pid, 0, 0), "not in the range"),
        (("peek", other.pid, 0, "--as", "f3"), "none of i1"),
        (("peek", other.pid, 0, "--as", "struct !?*"), "no format"),
        (("peek", other.pid, place.address, 3, "--as", "f8"), "has 8 bytes, and here are 3"),
        (("peek", 1 << 30, 0), "there is no process"),
        (("poke", other.pid, 4096, "00", "--yes"), "nothing is mapped there"),
        (("poke", other.pid, 4096, "hello"), "not hex digits"),
        (("poke", other.pid, 4096, "1,x", "--as", "i4"), "not of that form"),
        (("poke", other.pid, 4096, "300", "--as", "u1"), "not of that form"),
        (("maps", 1 << 30), "there is no process"),
    ]:
        done = command_line(*words)
        assert done.returncode != 0 and not done.stdout
        assert why in done.stderr and "Traceback" not in done.stderr


def test_poke_asks_first(other: Stranger) -> None:
    place = other.map("private", 1, seed=1)
    words = [sys.executable, "-W", "error", "-m", "realmap", "poke", str(other.pid), hex(place.address), "68 69"]
    done = subprocess.run(words, input="n\n", capture_output=True, text=True, timeout=BOUND)
    assert done.returncode == 1 and "01 08" in done.stdout and "68 69" in done.stdout
    assert other.tell("get", place.address) == "1"
    assert "2 bytes written" in good("poke", other.pid, place.address, "68 69", says="y\n")
    assert other.tell("get", place.address + 1) == str(0x69)
    assert "Write 1 byte into" in good("poke", other.pid, place.address, "68", says="y\n")
    good("poke", "--yes", "--as", "i2", other.pid, place.address, "--", "-2,3")
    assert json.loads(good("peek", other.pid, place.address, 4, "--as", "i2", "--json"))["values"] == [-2, 3]


def test_watched_in_a_pipe_changes_are_lines(other: Stranger) -> None:
    place = other.map("memfd", 1, seed=0)
    words = [sys.executable, "-u", "-m", "realmap", "peek", str(other.pid), str(place.address), "64", "--watch", "0.05"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        first = [child.stdout.readline() for _ in range(4)]
        other.tell("put", place.address + 33, 255)
        changed = child.stdout.readline()
        assert changed.startswith(hex(place.address + 32)) and changed != first[2] and " ff " in changed
        child.terminate()
        assert child.wait(BOUND) == 0
        assert child.stdout.read() == ""


def test_watched_on_a_terminal_changes_are_lit(other: Stranger) -> None:
    place = other.map("memfd", 1, seed=0)
    over = threading.Event()

    def change() -> None:
        number = 0
        while not over.wait(0.01):
            number += 1
            other.tell("put", place.address + 5, number % 256)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        words = ["peek", str(other.pid), str(place.address), "32", "--watch", "0.05"]
        shown = on_a_terminal(words, {}, stop=4000)
    finally:
        over.set()
        thread.join()
    assert "stranger" in shown
    assert "\x1b[1;30;43m" in shown


def test_only_what_changed_is_lit() -> None:
    before, now = bytes(40), bytes(20) + b"x" + bytes(19)
    found = lines(0x1000, now, None, before)
    assert [sum(CHANGED == str(span.style) for span in line.spans) for line in found] == [0, 2, 0]
    assert [sum(CHANGED == str(span.style) for span in line.spans) for line in lines(0, now, None, now)] == [0, 0, 0]
    numbers = lines(0x1000, now, form_of("i4"), before)
    assert [CHANGED in map(str, [span.style for span in line.spans]) for line in numbers].index(True) == 5


def test_forms_there_and_back() -> None:
    assert values(form_of("u2"), written(form_of("u2"), "1, 0x10,65535")) == [1, 16, 65535]
    assert values(form_of("struct <Bd"), written(form_of("struct <Bd"), "1,2.5,3,4")) == [[1, 2.5], [3, 4.0]]
    assert written(None, "0x6869") == b"hi"
    for wrong in ("struct", "struct 0s", "i3"):
        with pytest.raises(click.BadParameter):
            form_of(wrong)
    with pytest.raises(click.UsageError, match="a record has 2"):
        written(form_of("struct <Bd"), "1,2,3")


def test_maps_of_any_process(other: Stranger) -> None:
    kept, private = other.map("memfd", 3, flags="k", seed=1), other.map("private", 1)
    rows = {row["address"]: row for row in json.loads(good("maps", other.pid, "--json"))}
    row = rows[kept.address]
    assert (row["kind"], row["length"], row["rights"], row["why_not"]) == ("memfd", 3 * PAGE, "u_rw", "")
    assert row["name"] == "/memfd:stranger \\012\\012's (deleted)"
    text = good("maps", other.pid)
    shown = {line.split()[0]: line.split() for line in text.splitlines()}
    assert shown["address"] == "address length kind rights offset resident inode name mirror".split()
    assert shown[hex(kept.address)][1:4] == [str(3 * PAGE), "memfd", "rw"]
    assert shown[hex(kept.address)][-1] == "yes"
    assert rows.get(private.address, {"kind": "private"})["kind"] == "private"


def test_maps_that_are_shared(other: Stranger) -> None:
    places = [other.map(kind, 1).address for kind in ("memfd", "posix", "anonymous", "file", "private")]
    rows = json.loads(good("maps", other.pid, "--shared", "--json"))
    assert {row["kind"] for row in rows} == {"memfd", "posix", "anonymous", "file"}
    assert {row["address"] for row in rows} >= set(places[:4])
    assert len(good("maps", other.pid, "--shared").splitlines()) == len(rows) + 1


def test_maps_of_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    import mmap

    path = os.fsencode(tmp_path) + b"/odd\xff\r\n"
    with open(path, "w+b") as file:
        file.truncate(PAGE)
        with mmap.mmap(file.fileno(), PAGE):
            rows = json.loads(good("maps", os.getpid(), "--json"))
            assert any(row["name"].endswith("/odd\\xff\r\\012") for row in rows)
            assert "/odd\\udcff\\r\\012" in good("maps", os.getpid())


def test_peek_ends_with_its_process(other: Stranger) -> None:
    place = other.map("memfd", 1, seed=0)
    words = [sys.executable, "-u", "-m", "realmap", "peek", str(other.pid), str(place.address), "16", "--watch", "0.05"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stderr is not None
        child.stdout.readline()
        other.end()
        wait_until(lambda: child.poll() is not None)
        assert "has ended" in child.stderr.read() and child.returncode == 1
