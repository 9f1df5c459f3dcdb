"""`ForeignProcess`: which process it is, whatever becomes of that, and how it is when Linux has no more."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import BOUND, PAGE, in_threads, long, scaled, wait_until
from forked import in_a_child
from strangers import FREE, Stranger, at, other, pattern, process, require_map_files, stranger

from realmap import (
    AccessDenied,
    ForeignProcess,
    InvalidAddress,
    InvalidHandle,
    InvalidMemState,
    MemoryFault,
    PhysicalMemoryExhaustion,
    ProcessKilled,
    k_r,
    k_rw,
)
from realmap.memory import foreign
from realmap.pages import HUGE_SIZE

__all__ = ["other", "process"]


def test_another_program_of_the_same_process(other: Stranger, process: ForeignProcess) -> None:
    place = other.map("memfd", 1, FREE, seed=4)
    mirror = process.mirror(place.address, PAGE)
    assert other.tell("exec") == "ready"
    assert bytes(mirror) == pattern(PAGE, 4)
    for ask in (process.mirror, process.copy_in):
        with pytest.raises(InvalidAddress):
            ask(FREE, 1)
    other.map("memfd", 1, FREE, seed=5)
    with process.mirror(FREE, PAGE) as after:
        assert bytes(after) == pattern(PAGE, 5) != bytes(mirror)
    mirror.drop()


def test_what_is_known_is_not_what_was_there_before(other: Stranger, process: ForeignProcess) -> None:
    for seed in range(5):
        other.map("memfd", 2, FREE, seed=seed)
        for _ in range(2):
            with process.mirror(FREE + PAGE, PAGE) as mirror:
                assert bytes(mirror) == pattern(2 * PAGE, seed)[PAGE:]
    other.tell("unmap", FREE, PAGE)
    with process.mirror(FREE + PAGE, PAGE) as mirror:
        assert bytes(mirror) == pattern(2 * PAGE, 4)[PAGE:]
    with pytest.raises(InvalidAddress):
        process.mirror(FREE, 1)
    gc.collect()
    assert len(process._known) == 1


@pytest.mark.parametrize("size", [0, 1, PAGE, PAGE + 7])
def test_truncated_it_is_a_fault_when_it_is_used(other: Stranger, process: ForeignProcess, size: int) -> None:
    place = other.map("file", 3, flags="k", seed=8)
    mirror = process.mirror(place.address, 3 * PAGE)
    other.tell("truncate", place.fd, size)
    kept = bytes(mirror)
    assert kept[:size] == pattern(3 * PAGE, 8)[:size] and not any(kept[size:])
    with pytest.raises(MemoryFault, match="truncated") as caught:
        mirror.drop()
    assert caught.value.address == place.address + -(-size // PAGE) * PAGE
    with pytest.raises(MemoryFault):
        process.copy_in(place.address, 3 * PAGE)
    with pytest.raises(MemoryFault):
        process.copy_out(place.address, bytes(3 * PAGE))
    if size:  # the page that it ends in is there to its end, and shared
        process.copy_out(place.address + 10, b"behind")
        assert other.tell("get", place.address + 10) == str(ord("b"))
        assert process.copy_in(place.address + 10, 6) == b"behind"


def test_the_standard_librarys_shared_memory() -> None:
    text = "from multiprocessing.shared_memory import SharedMemory as S; s = S(create=True, size=5000)\n"
    text += "s.buf[:] = bytes(i % 251 for i in range(len(s.buf))); print(s.name, flush=True); input()\n"
    text += "s.close(); s.unlink()"
    with subprocess.Popen([sys.executable, "-c", text], stdin=-1, stdout=-1, text=True) as child:
        assert child.stdin is not None and child.stdout is not None
        name = child.stdout.readline().strip()
        with ForeignProcess(child.pid) as process:
            (place,) = [each for each in process.mappings() if each.name == f"/dev/shm/{name.lstrip('/')}"]
            with process.mirror(place.address, 5000) as mirror:
                assert bytes(mirror) == bytes(i % 251 for i in range(5000))
                assert mirror.array("uint8")[300] == 49
        child.communicate("\n", BOUND)


def test_every_byte_that_can_be_read_is_read(other: Stranger, process: ForeignProcess) -> None:
    kinds = set()
    for each in process.mappings():
        kinds.add(each.kind)
        if each.name == "[vsyscall]":
            with pytest.raises(AccessDenied):
                process.copy_in(each.address, 1)
        elif each.name.startswith("[vvar"):
            with pytest.raises(InvalidMemState, match="cannot be copied"):
                process.copy_in(each.address, 1)
        elif each.rights & k_r:
            length = min(each.length, 1 << 24)  # a sanitizer has terabytes
            assert len(process.copy_in(each.address, length)) == length
        else:
            with pytest.raises(AccessDenied):
                process.copy_in(each.address, 1)
        if each.kind in ("private", "special"):
            assert each.why_not
            with pytest.raises((InvalidMemState, AccessDenied)):
                process.mirror(each.address, 1)
    assert {"private", "special"} <= kinds


def test_a_name_that_does_its_worst(tmp_path: Path) -> None:
    name = "two\nlines \\012 \r and a blank (deleted) "
    path = tmp_path / name
    path.write_bytes(b"odd" * 2000)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 6000) as shown, ForeignProcess(os.getpid()) as process:
        (place,) = [each for each in process.mappings() if "lines" in each.name and each.kind == "file"]
        with process.mirror(place.address + 3, 3) as mirror:
            assert bytes(mirror) == b"odd"
        assert len(shown) == 6000


def test_ourselves(tmp_path: Path) -> None:
    with mmap.mmap(-1, PAGE) as shown, ForeignProcess(os.getpid()) as process:
        require_map_files()
        address = ctypes.addressof(ctypes.c_char.from_buffer(shown))
        process.copy_out(address, b"mine")
        assert shown[:4] == b"mine"
        with process.mirror(address, 4) as mirror:
            assert bytes(mirror) == b"mine"
            assert any(each.address == mirror.address for each in process.mappings())
        assert process.pid == os.getpid() and process.name
    gc.collect()


def test_no_process_is_said_by_name() -> None:
    ended = subprocess.Popen(["true"])
    wait_until(lambda: Path(f"/proc/{ended.pid}/stat").read_text().split()[2] == "Z")
    with pytest.raises(InvalidHandle, match="reaped"):
        ForeignProcess(ended.pid)
    ended.wait(BOUND)
    for pid in (ended.pid, 0, -1, 1 << 22 | 1, 1 << 40):
        with pytest.raises(InvalidHandle, match="there is no process"):
            ForeignProcess(pid)
    for wrong in ("1", 1.0, None):
        with pytest.raises(TypeError, match="a pid is an integer"):
            ForeignProcess(wrong)  # type: ignore[arg-type]
    thread = threading.Thread(target=threading.Event().wait, args=(BOUND,), daemon=True)
    done = threading.Event()
    thread = threading.Thread(target=done.wait, args=(BOUND,))
    thread.start()
    try:
        with pytest.raises(InvalidHandle, match="thread of one"):
            ForeignProcess(thread.native_id or 0)
    finally:
        done.set()
        thread.join()


def test_whose_first_thread_has_ended() -> None:
    lives = "import ctypes, sys, threading; threading.Thread(target=sys.stdin.read).start(); "
    lives += "ctypes.PyDLL(None).pthread_exit(None)"
    with subprocess.Popen([sys.executable, "-c", lives], stdin=subprocess.PIPE) as running:
        try:
            wait_until(lambda: Path(f"/proc/{running.pid}/stat").read_text().rpartition(") ")[2][0] == "Z", "its end")
            with pytest.raises(InvalidHandle, match="the first thread of process"):
                ForeignProcess(running.pid)
        finally:
            running.kill()


def test_a_thread_of_linux_itself() -> None:
    if not Path("/proc/2/status").exists() or "kthreadd" not in Path("/proc/2/comm").read_text():
        pytest.skip("they are in another pid namespace")
    with pytest.raises(InvalidHandle, match="Linux itself"):
        ForeignProcess(2)


@pytest.mark.alone
def test_a_pid_that_is_reused_is_another_process(other: Stranger, tmp_path: Path) -> None:
    require_map_files()  # to choose a pid takes the same
    last = Path("/proc/sys/kernel/ns_last_pid")
    place = other.map("memfd", 1, FREE, seed=1)
    with ForeignProcess(other.pid) as process:
        process.mirror(place.address, 1).drop()
        other.end()
        for _ in range(1000):
            last.write_text(str(other.pid - 1))
            with stranger(tmp_path) as next_one:
                if next_one.pid == other.pid:
                    next_one.map("memfd", 1, FREE, seed=2)
                    for ask in (process.mirror, process.copy_in):
                        with pytest.raises(ProcessKilled, match="its pid is another process's now"):
                            ask(FREE, 1)
                    return
        pytest.skip("others take every pid")


@pytest.mark.parametrize(("how", "said"), [("leave", "^the first thread of process"), ("kill", "has ended$")])
def test_its_pid_is_no_other_processs_before_it_is_reaped(other: Stranger, how: str, said: str) -> None:
    with ForeignProcess(other.pid) as process:
        if how == "kill":
            other.process.kill()
            os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        else:
            other.tell(how)
        for ask in (lambda: process.mirror(FREE, 1), process.mappings):
            with pytest.raises(ProcessKilled, match=said):
                ask()


def test_closed_it_says_so(other: Stranger) -> None:
    place = other.map("memfd", 1)
    process = ForeignProcess(other.pid)
    assert repr(process) == f"<ForeignProcess {other.pid}, 'stranger'>"
    kept = process.mirror(place.address, 1)
    process.close()
    process.close()
    for ask in (lambda: process.mirror(place.address, 1), process.mappings, lambda: process.copy_in(place.address, 1)):
        with pytest.raises(InvalidHandle, match="closed"):
            ask()
    kept.drop()
    other.end()
    assert process.name == "stranger"


@pytest.mark.parametrize("count", [600, long(10_000)])
def test_more_segments_than_are_known_at_a_time(other: Stranger, process: ForeignProcess, count: int) -> None:
    require_map_files()
    count = max(600, scaled(count))
    for number in range(count):
        other.map("memfd", 1, FREE + 2 * number * PAGE, flags="", seed=number % 256)
    for number in range(count):
        with process.mirror(FREE + 2 * number * PAGE, 3) as mirror:
            assert bytes(mirror) == pattern(3, number % 256)
    assert len(process._known) == foreign.KNOWN + 1
    assert sum(each.kind == "memfd" and not each.why_not for each in process.mappings()) == count


@pytest.mark.alone
def test_huge_pages(other: Stranger, process: ForeignProcess) -> None:
    require_map_files()
    setting = Path("/proc/sys/vm/nr_hugepages")
    before = setting.read_text()
    try:
        setting.write_text(str(int(before) + 2))
        if int(setting.read_text()) < int(before) + 2:
            pytest.skip("no memory for them")
        size = 2 * HUGE_SIZE // PAGE
        place = other.map("huge", size)
        other.tell("fill", place.address + HUGE_SIZE - 50, 100, 7)
        with process.mirror(place.address + HUGE_SIZE - 50, 100, k_rw) as mirror:
            assert bytes(mirror) == pattern(100, 7)
        other.end()
    except PermissionError:
        pytest.skip("to have some takes root")
    finally:
        setting.write_text(before)


def test_what_is_no_memory_of_files(other: Stranger, process: ForeignProcess) -> None:
    place = other.map("ring", 1)
    entry = at(process, place.address)
    assert entry.why_not
    with pytest.raises((InvalidMemState, AccessDenied)):
        process.mirror(place.address, 1)
    for each in process.mappings():
        assert (each.kind in foreign._KINDS.values()) or each.kind in ("private", "special")


def test_in_a_forked_child(other: Stranger, process: ForeignProcess) -> None:
    place = other.map("memfd", 2, seed=9)
    mirror = process.mirror(place.address, PAGE)

    def work() -> None:
        with pytest.raises(BufferError):  # the parent's
            mirror[0]
        with process.mirror(place.address + 5, 7) as own:
            assert bytes(own) == pattern(12, 9)[5:]

    in_a_child(work)
    assert bytes(mirror) == pattern(PAGE, 9)
    mirror.drop()


def test_without_descriptors(other: Stranger, process: ForeignProcess) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    places = [other.map("memfd", 1, FREE + 2 * number * PAGE, seed=number) for number in range(40)]
    process.mirror(places[0].address, 1).drop()
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 12, limits[1]))
    try:
        for number, place in enumerate(places):  # what is known makes room
            with process.mirror(place.address, 1) as mirror:
                assert mirror[0] == pattern(1, number)[0]
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        with pytest.raises(PhysicalMemoryExhaustion, match="no descriptors"):
            process.copy_in(other.map("private", 1).address, 1)
        with pytest.raises(PhysicalMemoryExhaustion, match="no descriptors"):
            ForeignProcess(other.pid)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_from_many_threads(other: Stranger, process: ForeignProcess) -> None:
    places = [other.map("memfd", 1, seed=number) for number in range(8)]

    def work(thread: int) -> None:
        for turn in range(200):
            number = (thread * 3 + turn) % 8
            if turn % 50 == 49:
                process._forget()
            with process.mirror(places[number].address, 100) as mirror:
                assert bytes(mirror) == pattern(100, number)

    in_threads(4, work)


def test_stopped_it_can_be_looked_into(other: Stranger, process: ForeignProcess) -> None:
    place = other.map("memfd", 1, seed=7)
    os.kill(other.pid, signal.SIGSTOP)
    with process.mirror(place.address, 5) as mirror:
        assert bytes(mirror) == pattern(5, 7)
