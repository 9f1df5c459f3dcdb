"""`realmap shm`, on segments of its own among whatever else this machine has."""

from __future__ import annotations

import json
import mmap
import os
import secrets
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from command_line import command_line
from conftest import BOUND, PAGE
from terminal import on_a_terminal

from realmap.host import procfs

ODD = "\x1b[31mred\x07\nline \udcff"
FIRST = os.readlink("/proc/self/ns/pid") == "pid:[4026531836]"
#: Where other processes could hide, nothing goes without it.
FORCE = [] if FIRST else ["--force"]


def show(*words: str) -> Any:
    done = command_line("shm", "--json", *words)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def prefix() -> Iterator[str]:
    """What names begin with that are this test's."""
    prefix = f"realmap-test-{os.getpid()}-{secrets.token_hex(4)}-"
    yield prefix
    for name in os.listdir("/dev/shm"):
        if name.startswith(prefix) or prefix.split("-")[3] in name:
            with suppress(FileNotFoundError):
                os.unlink(f"/dev/shm/{name}")


def make(name: str, pages: int = 1) -> None:
    fd = os.open(f"/dev/shm/{name}", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    os.posix_fallocate(fd, 0, pages * PAGE)
    os.close(fd)


@pytest.fixture
def held(prefix: str) -> Iterator[str]:
    """The name of one that this process has mapped, and has open."""
    make(f"{prefix}held", 3)
    fd = os.open(f"/dev/shm/{prefix}held", os.O_RDWR)
    window = mmap.mmap(fd, 3 * PAGE)
    os.close(fd)
    yield f"{prefix}held"
    window.close()


def test_as_json(prefix: str, held: str) -> None:
    make(f"{prefix}alone", 2)
    found = show("--name", f"{prefix}*")
    assert set(found) == {
        "time", "dev_shm", "elsewhere", "totals", "processes", "unseen", "blind", "segments"
    }  # fmt: skip
    assert {"path", "size", "used", "explained", "unexplained"} <= set(found["dev_shm"])
    assert found["dev_shm"]["path"] == "/dev/shm"
    assert found["totals"]["posix"]["segments"] >= 2
    mine, alone = found["segments"]  # the largest first
    assert (mine["name"], mine["kind"], mine["size"], mine["resident"]) == (held, "posix", 3 * PAGE, 3 * PAGE)
    program = procfs.program(os.getpid())
    assert mine["holders"] == [{"pid": os.getpid(), "program": program, "maps": 1, "descriptors": 1}]
    assert (alone["holders"], alone["state"]) == ([], "unsure")


def test_sorted_and_filtered(prefix: str, held: str) -> None:
    make(f"{prefix}alone", 5)
    names = [f"{prefix}alone", held]
    for sort, wanted in (("resident", names), ("size", names), ("holders", names[::-1]), ("name", names)):
        assert [row["name"] for row in show("--name", f"{prefix}*", "--sort", sort)["segments"]] == wanted
    assert [row["name"] for row in show("--name", f"{prefix}*", "--pid", str(os.getpid()))["segments"]] == [held]
    assert show("--name", f"{prefix}*", "--kind", "memfd", "--kind", "sysv")["segments"] == []


def test_in_a_pipe_odd_names_are_shown_safely(prefix: str) -> None:
    make(prefix + ODD)
    done = command_line("shm", "--name", f"{prefix}*")
    assert done.returncode == 0
    heads, *rows = done.stdout.split("\n\n")[1].splitlines()
    assert heads.split() == ["kind", "size", "resident", "age", "family", "maker", "name", "holders"]
    (row,) = rows
    assert row.isprintable()
    assert row.split()[6] == prefix + r"\x1b[31mred\x07\nline\x20\xff"
    (shown,) = show("--name", f"{prefix}*")["segments"]
    gone = command_line(
        "shm", "reclaim", "--yes", *FORCE, shown["name"].encode("unicode_escape").decode().replace("\\\\", "\\")
    )
    assert (gone.returncode, gone.stdout.isprintable() or gone.stdout.count("\n") == 1) == (0, True)
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(prefix)]


def test_on_a_terminal(prefix: str, held: str) -> None:
    shown = on_a_terminal(["shm", "--name", f"{prefix}*"], {"COLUMNS": "200"})
    assert "1 segment of 12 KiB" in shown
    assert "explained" in shown
    assert "(1x mapped, 1x open)" in shown


def test_watched(prefix: str, held: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "realmap", "shm", "--json", "--watch", "0.1", "--name", f"{prefix}*"],
        stdout=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        assert child.stdout is not None
        first = json.loads(child.stdout.readline())
        make(f"{prefix}more")
        while len(json.loads(child.stdout.readline())["segments"]) < 2:
            pass
        child.terminate()
        child.communicate(timeout=BOUND)
    assert child.returncode == 0
    assert [row["name"] for row in first["segments"]] == [held]


# ---- reclaim ----------------------------------------------------------------------------------


@pytest.fixture
def orphan(prefix: str) -> str:
    """The name of one that torch would have made in a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        pass
    name = f"torch_{child.pid}_{int(prefix.split('-')[3], 16)}_0"
    make(name, 2)
    return name


def left(name: str) -> bool:
    return Path(f"/dev/shm/{name}").exists()


def test_orphans_are_listed_with_the_reason(orphan: str) -> None:
    try:
        done = command_line("shm", "--orphans", "--name", orphan)
        (row,) = done.stdout.split("\n\n")[1].splitlines()[1:]
        pid = orphan.split("_")[1]
        assert row.split(maxsplit=3) == ["posix", str(2 * PAGE), orphan, f"its maker, {pid}, has ended"]
        assert f" {pid}:gone " in command_line("shm", "--name", orphan).stdout
    finally:
        os.unlink(f"/dev/shm/{orphan}")


def test_it_asks_first(orphan: str) -> None:
    try:
        for words in (["--dry-run"], []):
            done = command_line("shm", "reclaim", orphan, *FORCE, *words, says="n\n")
            assert (done.returncode, left(orphan)) == (0 if words else 1, True)
            assert orphan in done.stdout + done.stderr
        done = command_line("shm", "reclaim", orphan, *FORCE)
        assert (done.returncode, left(orphan)) == (1, True)
        done = command_line("shm", "reclaim", orphan, *FORCE, says="y\n")
        assert (done.returncode, done.stdout, left(orphan)) == (0, f"removed {orphan}, 8 KiB\n", False)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(f"/dev/shm/{orphan}")


def test_what_is_used_stays_also_by_force(prefix: str, held: str) -> None:
    make(f"{prefix}alone")
    done = command_line("shm", "reclaim", held, f"{prefix}alone", f"{prefix}nope", "--yes", "--force", "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert [row["name"] for row in found["gone"]] == [f"{prefix}alone"]
    why = {each["name"]: each["why"] for each in found["stay"]}
    assert set(why) == {held, f"{prefix}nope"}
    assert f"in use by {os.getpid()}" in why[held]
    assert (left(held), left(f"{prefix}alone")) == (True, False)


def test_what_is_taken_between_the_question_and_the_answer_stays(orphan: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "realmap", "shm", "reclaim", orphan, *FORCE],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        assert child.stderr is not None
        asked = ""
        while "Unlink" not in asked:
            asked += child.stderr.read(1)
        fd = os.open(f"/dev/shm/{orphan}", os.O_RDONLY)
        out, said = child.communicate("y\n", timeout=BOUND)
    os.close(fd)
    assert (child.returncode, out) == (1, "")
    assert "in use by" in said
    os.unlink(f"/dev/shm/{orphan}")


def inside(mount: str, *words: str) -> subprocess.CompletedProcess[str]:
    """The command in namespaces of its own."""
    if os.geteuid() or subprocess.run(["unshare", "-mpf", "true"], capture_output=True).returncode:
        pytest.skip("needs root, for namespaces of its own")
    unshare, _, shell = mount.partition(": ")
    return subprocess.run(
        ["unshare", *unshare.split(), "sh", "-c", f'mount -t tmpfs -o size=1m tmpfs /dev/shm; {shell}; exec "$@"', "-",
         sys.executable, "-m", "realmap", "shm", *words],
        capture_output=True, text=True, timeout=BOUND,
    )  # fmt: skip


MAKE = "echo x > /dev/shm/torch_999999999_1_2; echo x > /dev/shm/mine; ln -s $(printf %0300d 0) /dev/shm/link"


@pytest.mark.skipif(not FIRST, reason="makers outside of this pid namespace cannot be seen")
def test_without_names_every_orphan_goes_and_nothing_else() -> None:
    done = inside(f"-m: {MAKE}", "reclaim", "--yes")
    assert (done.returncode, done.stdout) == (0, "removed torch_999999999_1_2, 4 KiB\n")


def test_where_not_all_can_be_seen_nothing_goes_without_force() -> None:
    done = inside(f"-mpf --mount-proc: {MAKE}", "reclaim", "--yes")
    assert done.returncode == 1
    assert done.stderr.startswith("Error: this is a pid namespace of its own")
    assert "--force" in done.stderr
    done = inside(f"-mpf --mount-proc: {MAKE}", "reclaim", "--yes", "--force")
    assert (done.returncode, done.stdout) == (0, "removed torch_999999999_1_2, 4 KiB\n")


def test_without_proc_the_names_are_shown_and_nothing_goes() -> None:
    mount = f"-m: mount -t tmpfs tmpfs /proc; {MAKE}"
    found = json.loads(inside(mount, "--json").stdout)
    assert {row["name"] for row in found["segments"]} == {"torch_999999999_1_2", "mine"}
    done = inside(mount, "reclaim", "--yes")
    assert done.returncode == 1
    assert done.stderr.startswith("Error: /proc shows no processes")


AS_ANOTHER = """
import bisect, os, sys
import realmap.memory, realmap.cli.shm, realmap.host.reclaim, realmap.host.runtime  # which that user may not read
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
sys.argv = ["realmap", "shm", *sys.argv[1:]]
realmap.cli.main()
"""


USER = f"shift 4; set -- {shlex.quote(sys.executable)} -c '{AS_ANOTHER}' \"$@\""


def test_what_a_process_has_that_is_not_there_or_may_not_be_looked_into() -> None:
    none = command_line("shm", "--pid", 99999999)
    assert (none.returncode, none.stdout, none.stderr) == (1, "", "Error: there is no process 99999999\n")
    done = inside(f"-m: {USER}", "--pid", str(os.getpid()))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"Error: cannot read the maps of process {os.getpid()}: it takes ")


def test_hidepid() -> None:
    """As another user, who sees nobody else's processes."""
    done = inside(f"-m: mount -t proc -o hidepid=2 proc /proc; {MAKE}; {USER}", "reclaim", "--yes")
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("Error: /proc hides processes of others (hidepid)")


def test_the_totals_of_one_of_its_own() -> None:
    done = inside(f"-m: {MAKE}; exec 3< /dev/shm/mine; rm /dev/shm/mine", "--json")
    found = json.loads(done.stdout)
    ours = found["dev_shm"]
    assert (ours["used"], ours["explained"], ours["unexplained"]) == (3 * PAGE, 3 * PAGE, 0)
    assert (ours["named"], ours["unlinked"], ours["other"]) == (PAGE, PAGE, PAGE)
    (mine,) = [row for row in found["segments"] if (row["kind"], row["name"]) == ("unlinked", "mine")]
    assert {holder["descriptors"] for holder in mine["holders"]} == {1}


def test_drawn_with_who_shares_it(held: str) -> None:
    with subprocess.Popen(
        ["sh", "-c", 'exec 3< "$0"; exec "$@"', f"/dev/shm/{held}", sys.executable, "-c",
         "import mmap; kept = mmap.mmap(3, 0, prot=mmap.PROT_READ); print(flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        assert child.stdout is not None
        child.stdout.readline()
        done = command_line("snapshot", "--machine", "--svg", "-")
        child.communicate("\n", timeout=BOUND)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f" {pid}</text>" in done.stdout for pid in (os.getpid(), child.pid))
    for wrong in ([], ["--json"], ["--svg", "-", "--kernel", "x"]):
        assert command_line("snapshot", "--machine", *wrong).returncode == 2
