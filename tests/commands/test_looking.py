"""`realmap ps`, `maps`, `segments`, `stats` and `call`, on a real kernel that is under load."""

from __future__ import annotations

import base64
import ctypes
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import syscalls
from command_line import command_line
from conftest import BOUND, PAGE, long, wait_until
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from terminal import on_a_terminal

import realmap
from realmap import KernelHandle, Process
from realmap.cli import command
from realmap.cli.prometheus import COUNTERS, GAUGES
from realmap.cli.stats import DONE, _screen, rates_between
from realmap.observe import maps, tables
from realmap.observe.control import Control
from realmap.observe.words import harmless

#: A syscall and a segment that are named by somebody who means no good.
EVIL = 'ev\x1b[31mil\n"quo\\te'
ODD = "odd \x1b]0;title\x07 name"


@realmap.syscall(name=EVIL)
def evil(call: realmap.Call) -> None:
    """Nothing."""


@realmap.syscall
def raw(call: realmap.Call) -> bytes:
    """No UTF-8."""
    return b"\xff\x00"


@realmap.syscall
def count(call: realmap.Call, data: realmap.UserBuffer) -> int:
    """How many bytes there are."""
    return len(data.copy_in())


def work(me: Process) -> None:
    """Maps and calls without end; some of it stays, and is the same in every look."""
    keep = [
        me.map(3333),
        me.map(10 * PAGE, fragment=PAGE),
        me.map(2 * PAGE, type=realmap.MemoryType.NORMAL),
        me.map(5 * PAGE, name=f"{ODD}{os.getpid()}"),
        me.map(2 * PAGE),
    ]
    keep[0][:] = b"x" * 3333
    handles = [me.share(keep[3]), me.share(keep[4])]
    me.call("keep", "mine", keep[0])
    while True:
        with me.attach(handles[1]) as buffer:  # no new segment: for a moment it would have a name
            me.call("copy", buffer, buffer)
            me.call("slow_sha256", buffer)
            with pytest.raises(realmap.SyscallFailed):
                me.call("explode", "ValueError", "no")
        time.sleep(0.003)  # others want a CPU, too


@pytest.fixture(scope="module")
def busy() -> Iterator[tuple[KernelHandle, int]]:
    """A kernel under load, and the pid of its one user."""
    with realmap.boot(syscalls=[*syscalls.ALL, evil, raw, count], lazy_unmap=1 << 20, memory_limit=1 << 30) as kernel:
        user = kernel.spawn(work)
        wait_until(lambda: user.exitcode is not None or kernel.stats()["calls"] > 100, "the load")
        assert user.exitcode is None
        yield kernel, user.pid


def run(kernel: KernelHandle | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    return command_line(*arguments, **({"REALMAP_KERNEL": kernel.path} if kernel is not None else {}))


def good(kernel: KernelHandle, *arguments: str) -> str:
    done = run(kernel, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    return done.stdout


def refused(kernel: KernelHandle | None, *arguments: str) -> str:
    """What is said in one line, and in words, by a command that cannot do what was asked."""
    done = run(kernel, *arguments)
    assert done.returncode != 0
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line and not line.startswith(("Usage:", "Try "))]
    assert len(lines) == 1
    return lines[0]


def last_line(kernel: KernelHandle, *arguments: str) -> str:
    """The last one that a command says, on stderr where it fails."""
    done = run(kernel, *arguments)
    return (done.stderr or done.stdout).splitlines()[-1]


def rows_of(text: str) -> list[list[str]]:
    """The rows below the headings, as awk sees them."""
    return [line.split() for line in text.splitlines()[1:]]


# ---- what they show ------------------------------------------------------------------------


def test_ps(busy: tuple[KernelHandle, int]) -> None:
    kernel, pid = busy
    text = good(kernel, "ps")
    heads = "pid number uid mappings mapped frames handles calls running waits_for serves program"
    assert text.splitlines()[0].split() == heads.split()
    (row,) = rows_of(text)
    assert row[0:3:2] == [str(pid), str(os.geteuid())]
    assert row[6] == "2"
    assert row[8] in ("slow_sha256", "copy", "explode", "-")
    assert row[11] == "work"  # what was spawned
    (entry,) = json.loads(good(kernel, "ps", "--json"))
    assert set(entry) == {*heads.split(), "limit"}
    assert entry["frames"] == (1 + 10 + 5 + 2) * PAGE
    assert entry["mapped"] in (entry["frames"] + 2 * PAGE, entry["frames"] + 4 * PAGE)


def test_a_process_that_has_gone_between_two_reads(busy: tuple[KernelHandle, int]) -> None:
    kernel, _ = busy
    child = os.fork()
    if not child:
        signal.pause()
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert tables.program(child) == "gone"  # a zombie
    os.waitpid(child, 0)
    assert tables.program(child) == "gone"
    taken = kernel.snapshot()
    gone = msgspec.structs.replace(taken.processes[0], pid=child)
    (row,) = tables.processes(msgspec.structs.replace(taken, processes=[gone]))
    assert (row.pid, row.program) == (child, "gone")


def test_maps_beside_linux(busy: tuple[KernelHandle, int]) -> None:
    kernel, pid = busy
    text = good(kernel, "maps", str(pid))
    assert text.splitlines()[0].split()[-1] == "linux"
    found = json.loads(good(kernel, "maps", str(pid), "--json"))
    assert {row["linux"] for row in found} <= {"agrees", "changing"}
    first, fragments, private, named = found[:4]
    assert [row["linux"] for row in found[:4]] == ["agrees"] * 4
    assert (first["length"], first["resident"], first["refcount"], first["rights"]) == (PAGE, PAGE, 2, "u_rw")
    assert len(fragments["segments"]) == 10
    assert (private["type"], private["segments"], private["refcount"]) == ("NORMAL", [], None)
    assert (named["length"], named["refcount"], named["resident"]) == (5 * PAGE, 2, 0)
    assert rows_of(text)[0][0] == hex(first["address"])
    shared = {row["address"] for row in json.loads(good(kernel, "maps", str(pid), "--shared", "--json"))}
    assert {first["address"], fragments["address"]} <= shared and private["address"] not in shared


def test_maps_of_the_kernel_itself(busy: tuple[KernelHandle, int]) -> None:
    kernel, pid = busy
    found = json.loads(good(kernel, "maps", str(kernel.pid), "--json"))
    kept = next(row for row in found if row["type"] == "mirror" and row["linux"] == "agrees")
    (first, *_) = json.loads(good(kernel, "maps", str(pid), "--json"))
    assert kept["segments"] == first["segments"]
    assert kept["process"] is None
    assert {"mirror", "anchor"} <= {row["type"] for row in found} <= {"mirror", "anchor", "kept"}
    assert "anchor" in good(kernel, "maps", str(kernel.pid))


def test_maps_tells_where_linux_disagrees(busy: tuple[KernelHandle, int]) -> None:
    kernel, _ = busy
    with kernel.connect() as me, me.map(2 * PAGE) as buffer, me.map(PAGE) as whole:
        assert ctypes.CDLL(None).munmap(ctypes.c_void_p(buffer.address + PAGE), ctypes.c_size_t(PAGE)) == 0
        found = {row["address"]: row for row in json.loads(good(kernel, "maps", str(os.getpid()), "--json"))}
        gone = found[buffer.address]["linux"]
        assert f"{buffer.address + PAGE:#x}) rw- of inode" in gone
        assert found[whole.address]["linux"] == "agrees"
        assert f"[{buffer.address:#x}" in good(kernel, "maps", str(os.getpid()))


def test_maps_of_somebody_else(busy: tuple[KernelHandle, int]) -> None:
    kernel, pid = busy
    said = refused(kernel, "maps", str(os.getppid()), "--kernel", kernel.path)
    assert f"process {os.getppid()} is no user" in said
    assert str(pid) in said
    assert "not a valid int" in refused(kernel, "maps", "me")
    other = json.loads(good(kernel, "maps", str(os.getppid()), "--json"))
    assert {"private", "special"} <= {row["kind"] for row in other}


def test_maps_of_a_process_that_ended_meanwhile(busy: tuple[KernelHandle, int]) -> None:
    kernel, _ = busy
    child = os.fork()
    if not child:
        buffer = realmap.connect(kernel.path).map(PAGE)
        signal.pause()
        os._exit(len(buffer))
    try:
        wait_until(lambda: any(each.pid == child and each.mappings for each in kernel.snapshot().processes))
        before = kernel.snapshot()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with pytest.raises(realmap.InvalidHandle, match="has ended meanwhile"):
        maps.view(lambda: before, child)


def test_segments(busy: tuple[KernelHandle, int]) -> None:
    kernel, pid = busy
    text = good(kernel, "segments")
    assert harmless(ODD).replace(" ", "\\x20") + str(pid) in text
    found = json.loads(good(kernel, "segments", "--json"))
    named = next(row for row in found if row["name"])
    assert named["name"] == f"{ODD}{pid}"
    assert (named["length"], named["resident"], named["refcount"]) == (5 * PAGE, 5 * PAGE, 2)
    assert any(holder.startswith("handle ") for holder in named["holders"])
    assert any(f"(pid {pid})" in holder for holder in named["holders"])
    fragments = [row for row in found if row["serial"] == found[1]["serial"]]
    assert [row["index"] for row in fragments] == list(range(10))
    assert "mirror 0x3" in text


def test_stats(busy: tuple[KernelHandle, int]) -> None:
    kernel, _ = busy
    text = good(kernel, "stats")
    rows = {row[0]: row[1:] for row in rows_of(text) if len(row) == 4}
    assert int(rows["calls"][0]) > 100
    assert int(rows["failed"][0]) > 10
    assert rows["bytes"][2] == str(1 << 30)
    assert harmless(EVIL) in text
    found = json.loads(good(kernel, "stats", "--json"))
    assert set(found) == {"time", "stats", "limits", "calls"}
    calls = {call["name"]: call for call in found["calls"]}
    assert calls["explode"]["failed"] == calls["explode"]["count"] > 10
    assert calls["slow_sha256"]["blocking"] is True
    for call in found["calls"]:
        assert (call["p50"] is None) == (call["count"] == 0)
        assert call["p50"] is None or 0 < call["p50"] <= call["p99"] <= call["longest"] < BOUND
    heads, *rows = [line.split() for line in text.split("\n\n")[1].splitlines()]
    assert heads == "calls failed per second p50 p99 longest blocking servers syscall".split()
    (copy,) = (row for row in rows if row[-1] == "copy")
    assert 0 < float(copy[3]) <= float(copy[4]) <= float(copy[5]) < BOUND
    assert sum(call["count"] for call in found["calls"]) == found["stats"]["calls"]
    assert found["limits"]["lazy_unmap"] == 1 << 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_watch_ends_with_a_signal(busy: tuple[KernelHandle, int], number: int) -> None:
    kernel, _ = busy
    words = [sys.executable, "-W", "error", "-u", "-m", "realmap", "stats", "--kernel", kernel.path]
    options = ["--watch", "0.1"] if number == signal.SIGINT else ["--json", "--watch", "0.1"]
    with subprocess.Popen([*words, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stderr is not None
        lines = [child.stdout.readline() for _ in range(4)]
        child.send_signal(number)
        rest, errors = child.communicate(timeout=BOUND)
    assert (child.returncode, errors) == (0, "")
    if number == signal.SIGINT:
        heads = lines[0].split()
        assert len(heads) == len(lines[1].split())
        rates = [int(line.split()[heads.index("calls/s")]) for line in lines[1:]]
    else:
        rates = [json.loads(line)["rates"]["calls"] for line in lines]
        assert set(json.loads(lines[0])["rates"]) == set(DONE)
    assert max(rates) > 0
    assert "Traceback" not in rest


def test_a_watch_ends_with_its_kernel(tmp_path_factory: pytest.TempPathFactory) -> None:
    with realmap.boot() as kernel:
        words = [sys.executable, "-u", "-m", "realmap", "stats", "--watch=0.1", "--kernel", kernel.path]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            child.stdout.readline(), child.stdout.readline()
            kernel.shutdown()
            _, errors = child.communicate(timeout=BOUND)
    assert child.returncode == 1
    assert (errors.startswith("Error: "), errors.count("\n")) == (True, 1)


def test_what_prometheus_reads(busy: tuple[KernelHandle, int]) -> None:
    kernel, pid = busy
    text = good(kernel, "stats", "--prometheus")
    families = {family.name: family for family in text_string_to_metric_families(text)}
    calls = {sample.labels["syscall"]: sample.value for sample in families["realmap_calls"].samples}
    assert families["realmap_calls"].type == "counter"
    assert {sample.name for sample in families["realmap_calls"].samples} == {"realmap_calls_total"}
    assert calls["copy"] > 30
    assert harmless(EVIL) in calls
    took = {(each.labels["syscall"], each.labels["quantile"]): each.value
            for each in families["realmap_handler_seconds"].samples}  # fmt: skip
    assert 0 < took["copy", "0.5"] <= took["copy", "0.99"] <= took["copy", "1"]
    assert {(name, "1") in took for name, count in calls.items() if not count} == {False}
    assert families["realmap_frames_bytes"].type == "gauge"
    assert families["realmap_limit_frames_bytes"].samples[0].value == 1 << 30
    copied = {sample.labels["direction"]: sample.value for sample in families["realmap_copied_bytes"].samples}
    assert copied["in"] == copied["out"] > 0 or abs(copied["in"] - copied["out"]) == 2 * PAGE
    sizes = {sample.labels["pid"]: sample.value for sample in families["realmap_process_frames_bytes"].samples}
    assert sizes[str(pid)] >= 16 * PAGE
    for name, family in families.items():
        assert name.startswith("realmap_")
        assert family.documentation.endswith(".")
        assert re.search(r"_(limit|bytes|info|kernel|running|threads)|s$|made$|taken$", name), name
    named = {total for _, total, _ in GAUGES + COUNTERS} | {name for name in DONE if name.startswith("copied_")}
    assert named | {"calls", "failed"} == set(json.loads(good(kernel, "stats", "--json"))["stats"])
    assert "--prometheus goes with neither" in refused(kernel, "stats", "--prometheus", "--watch")
    assert "'nan' is not a time in seconds" in refused(kernel, "stats", "--watch", "nan")


# ---- call ----------------------------------------------------------------------------------


def test_call_with_values(busy: tuple[KernelHandle, int]) -> None:
    kernel, _ = busy
    text = good(kernel, "call", "echo", "1", "-2.5", "true", "null", '"5"', "[1,{}]", "some text", "@@at", "", "-x")
    assert json.loads(text) == [1, -2.5, True, None, "5", [1, {}], "some text", "@at", "", "-x"]
    assert json.loads(last_line(kernel, "call", "raw")) == {"base64": base64.b64encode(b"\xff\x00").decode()}
    assert last_line(kernel, "call", EVIL) == "null"


def test_call_with_files(busy: tuple[KernelHandle, int], tmp_path: Path) -> None:
    kernel, _ = busy
    file = tmp_path / "some file"
    content = os.urandom(3 * PAGE + 333)
    file.write_bytes(content)
    assert json.loads(last_line(kernel, "call", "count", f"@{file}")) == len(content)
    words = [sys.executable, "-m", "realmap", "call", "--kernel", kernel.path, "--out", "1", "reverse", f"@{file}"]
    assert subprocess.run(words, capture_output=True, timeout=BOUND).stdout == content[::-1]
    words = [sys.executable, "-W", "error", "-m", "realmap", "call", "--kernel", kernel.path, "count", "@/dev/stdin"]
    assert subprocess.run(words, capture_output=True, input=b"four", timeout=BOUND).stdout == b"4\n"
    assert json.loads(last_line(kernel, "call", "count", "@/proc/self/stat")) > 10


def test_calls_that_cannot_be(busy: tuple[KernelHandle, int], tmp_path: Path) -> None:
    kernel, _ = busy
    empty = tmp_path / "empty"
    empty.touch()
    said = refused(kernel, "call", "nope")
    assert "no syscall 'nope'" in said
    assert harmless(EVIL) in said
    assert "ValueError: \\x1b[1m" in refused(kernel, "call", "explode", "ValueError", "\x1b[1m")
    hint = "; a buffer is passed as @FILE"
    assert refused(kernel, "call", "explode", "ValueError", "no").endswith("ValueError: no")
    for unfit in (["count", "text"], ["count"]):  # no such method; not so many arguments
        assert refused(kernel, "call", *unfit).endswith(hint)
    assert "is empty" in last_line(kernel, "call", "count", f"@{empty}")
    assert "No such file" in last_line(kernel, "call", "count", f"@{tmp_path}/none")
    assert "directory" in last_line(kernel, "call", "count", f"@{tmp_path}")
    assert "device" in last_line(kernel, "call", "count", "@/dev/zero")
    assert "cannot be sent" in last_line(kernel, "call", "echo", str(1 << 70))
    assert "--out 2" in last_line(kernel, "call", "--out", "2", "count", f"@{empty}")
    assert "within 0.2 s" in last_line(kernel, "call", "--timeout", "0.2", "sleep", "2")
    assert "--kernel comes before echo" in last_line(kernel, "call", "echo", "5", "--kernel", "/nowhere")
    assert last_line(kernel, "call", "echo", '"--kernel"') == '["--kernel"]'


# ---- bad input and odd places ----------------------------------------------------------------

LOOKS = [("stats",), ("maps", "1")]


@pytest.mark.parametrize("words", [("ps",), long(("call", "nop"))], ids=lambda each: each[0])
def test_no_kernel_and_a_dead_socket(words: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("s")
    before = os.environ["REALMAP_DIR"]
    os.environ["REALMAP_DIR"] = str(folder)
    try:
        assert "start one: realmap kernel" in refused(None, *words)
    finally:
        os.environ["REALMAP_DIR"] = before
    path = str(folder / "dead.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
    name, *rest = words
    said = refused(None, name, "--kernel", path, *rest)
    assert f"realmap gc {path}" in said
    assert run(None, "gc", path).stdout == f"removed {path}\n"


@pytest.mark.parametrize("words", LOOKS, ids=lambda each: each[0])
def test_a_narrow_terminal_and_no_colour(busy: tuple[KernelHandle, int], words: tuple[str, ...]) -> None:
    kernel, pid = busy
    words = (*(str(pid) if word == "1" else word for word in words), "--kernel", kernel.path)
    variables = {"COLUMNS": "20"} if words[0] != "stats" else {"COLUMNS": "80", "NO_COLOR": "1"}
    out = on_a_terminal([*words], variables)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out)
    assert "Traceback" not in shown
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= int(variables["COLUMNS"])
    assert "NO_COLOR" not in variables or not re.search(r"\x1b\[[0-9;]*3[0-7]", out)


@pytest.mark.parametrize("height", [14, 24, 40])
def test_a_watch_on_a_low_terminal_shows_the_syscalls_and_what_is_not_zero(
    busy: tuple[KernelHandle, int], height: int
) -> None:
    kernel, _ = busy
    console = Console(file=io.StringIO(), width=100, height=height)
    with Control(kernel.path) as control:
        before, now = control.snapshot(), control.snapshot()
    found = rates_between(before, now, 1.0)
    console.print(_screen(now, found, console.width, height))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count("\n") <= height
    assert re.search(r"  copy *$", shown, re.M), shown
    rows = [line.split()[0] for line in shown.split("\n\n")[1].splitlines()[1:]]
    assert rows and all(now.stats[name] for name in rows)
    assert f"no room for {len(now.stats) - len(rows)} totals and " in shown


def test_a_watch_on_a_terminal(busy: tuple[KernelHandle, int]) -> None:
    kernel, _ = busy
    out = on_a_terminal(
        ["stats", "--watch", "0.1", "--kernel", kernel.path], {"COLUMNS": "40", "LINES": "10"}, stop=5000
    )
    assert "Traceback" not in out
    assert "per second" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out)


@pytest.mark.parametrize("width", ["60", long("80"), long("200")])
def test_many_segments_fit_a_terminal(width: str) -> None:
    with realmap.boot() as kernel:
        for words, said in (("ps", "no process is connected"), ("segments", "it has no segments")):
            assert said in on_a_terminal([words, "--kernel", kernel.path], {"COLUMNS": width})
        with kernel.connect() as me, me.map(1000 * PAGE, fragment=PAGE) as buffer:
            handles = [me.share(buffer) for _ in range(100)]
            for words, count in ((["maps", str(me.pid)], 1), (["segments"], 4)):
                out = on_a_terminal([*words, "--kernel", kernel.path], {"COLUMNS": width})
                lines = [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out).splitlines()]
                assert max(map(len, lines)) <= int(width)
                assert len([line for line in lines if line and not line.startswith("no room for: ")]) <= 1 + 2 * count
                if width == "200":
                    assert re.search(r" [0-9]+,… \(1000\) ", out)
            assert "and 98 more" in out
            assert len(good(kernel, "segments").splitlines()) == 1001
            assert len(handles) == 100


@pytest.mark.parametrize("words", [("ps",), ("stats", "--watch", "0.05"), ("doctor",)], ids=" ".join)
def test_output_to_a_closed_pipe(busy: tuple[KernelHandle, int], words: tuple[str, ...]) -> None:
    kernel, _ = busy
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "realmap", *words],
        stdout=writer,
        stderr=subprocess.PIPE,
        env=os.environ | {"REALMAP_KERNEL": kernel.path},
        timeout=BOUND,
    )
    os.close(writer)
    assert done.stderr == b""
    assert done.returncode in (0, 1)


def test_help_has_an_example() -> None:
    for name, each in command.commands.items():
        assert each.help is not None
        assert f"Example: realmap {name}" in " ".join(each.help.split()), name
