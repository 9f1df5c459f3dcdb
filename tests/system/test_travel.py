"""A buffer through multiprocessing: the same memory on the other side, whoever ends first, and nothing left."""

from __future__ import annotations

import copy
import gc
import hashlib
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import resource_tracker
from pathlib import Path

import pytest
import syscalls
import travellers
from conftest import BOUND, PAGE, SUPPORT, wait_until

import realmap
from realmap import InvalidAddress, InvalidHandle, KernelHandle, Process
from realmap.memory.lands import HEAP_SHARE, USER_LAND
from realmap.user import inheritance, travel

METHODS = ("fork", "spawn", "forkserver")
ENDINGS = ("receiver first", "sender first", "both killed")
#: Of all combinations, what every run tries: each method, each way and each ending at least once.
SOME = [
    ("fork", "args", "sender first"),
    ("fork", "pool", "receiver first"),
    ("spawn", "queue", "sender first"),
    ("spawn", "executor", "both killed"),
    ("forkserver", "pipe", "receiver first"),
    ("forkserver", "args", "both killed"),
    ("spawn", "joblib", "receiver first"),
]


@pytest.fixture
def short_transit(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on its way outlives its sender by little."""
    monkeypatch.setattr(travel, "TRANSIT", 1.0)


class Control:
    """Where sender and receiver tell how it goes."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.path)
        self._listener.listen()
        self._listener.settimeout(BOUND)
        self.sockets: dict[str, socket.socket] = {}
        self.pids: dict[str, int] = {}
        self._lines: dict[str, object] = {}

    def accept(self) -> None:
        """Somebody connects, and says who it is."""
        sock, _ = self._listener.accept()
        sock.settimeout(BOUND)
        lines = sock.makefile("r")
        pid, who = lines.readline().split()
        self.sockets[who], self.pids[who], self._lines[who] = sock, int(pid), lines

    def hear(self, who: str) -> list[str]:
        """The next line of somebody, without its pid."""
        return self._lines[who].readline().split()[1:]  # type: ignore[attr-defined, no-any-return]

    def close(self) -> None:
        for lines in self._lines.values():
            lines.close()  # type: ignore[attr-defined]
        for sock in [*self.sockets.values(), self._listener]:
            sock.close()


def ended(pid: int) -> bool:
    """Whether it has ended; one that nobody reaps is a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def group(leader: int) -> list[int]:
    """The processes of a process group."""
    found = []
    for name in os.listdir("/proc"):
        with suppress(OSError):
            if name.isdigit() and os.getpgid(int(name)) == leader:
                found.append(int(name))
    return found


def travels(kernel: KernelHandle, tmp_path: Path, method: str, way: str, ending: str) -> None:
    """One cell of the matrix."""
    control = Control(tmp_path / "control")
    folder = tempfile.mkdtemp(prefix="rm")  # multiprocessing leaves its own there when it is killed; a short path
    sender = subprocess.Popen(
        [sys.executable, travellers.__file__, method, way, kernel.path, control.path],
        cwd=SUPPORT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "TMPDIR": folder, "JOBLIB_TEMP_FOLDER": folder},
    )
    try:
        control.accept()
        control.accept()
        data = bytearray(number % 253 for number in range(travellers.SIZE))
        digest = hashlib.sha256(data).hexdigest()
        assert control.hear("receiver") == [digest, digest]
        assert control.hear("receiver") == ["written"]
        data[:8] = b"received"
        digest = hashlib.sha256(data).hexdigest()
        if ending == "receiver first":
            control.sockets["receiver"].sendall(b"!")
            assert control.hear("receiver") == [digest, digest]
            control.sockets["sender"].sendall(b"!")
            assert control.hear("sender") == ["received"]
            assert sender.wait(BOUND) == 0, sender.stderr.read() if sender.stderr else ""
        else:
            os.kill(sender.pid, signal.SIGKILL)
            sender.wait(BOUND)
            if ending == "both killed":
                os.kill(control.pids["receiver"], signal.SIGKILL)
            else:
                wait_until(lambda: kernel.stats()["processes"] == 1)
                control.sockets["receiver"].sendall(b"!")
                assert control.hear("receiver") == [digest, digest]
                if way == "executor":  # the standard library lets such a worker wait for ever for its dead parent
                    os.kill(control.pids["receiver"], signal.SIGKILL)
            wait_until(lambda: ended(control.pids["receiver"]))
    finally:
        sender.kill()
        sender.wait(BOUND)
        if "receiver" in control.pids:
            with suppress(ProcessLookupError):
                os.kill(control.pids["receiver"], signal.SIGKILL)
        # multiprocessing's own helpers end by themselves, and unlink its semaphores.
        with suppress(ProcessLookupError):
            end = time.monotonic() + 10
            while time.monotonic() < end and not all(ended(pid) for pid in group(sender.pid)):
                time.sleep(0.01)
            os.killpg(sender.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
        assert sender.stderr is not None
        sender.stderr.close()
        control.close()
    wait_until(lambda: not any(kernel.stats()[name] for name in ("processes", "segments", "handles")), "nothing left")
    assert kernel.audit()


@pytest.fixture(scope="module")
def reader() -> Iterator[KernelHandle]:
    """A kernel that can digest."""
    with realmap.boot(syscalls=syscalls.ALL) as kernel:
        kernel.stats()
        yield kernel


@pytest.mark.parametrize(("method", "way", "ending"), SOME)
def test_some_of_the_matrix(reader: KernelHandle, tmp_path: Path, method: str, way: str, ending: str) -> None:
    travels(reader, tmp_path, method, way, ending)


@pytest.mark.slow
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("way", travellers.WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_the_matrix(reader: KernelHandle, tmp_path: Path, method: str, way: str, ending: str) -> None:
    travels(reader, tmp_path, method, way, ending)


def test_it_is_the_same_memory_and_good_once(kernel: KernelHandle, me: Process) -> None:
    with me.map(3 * PAGE) as buffer:
        part = buffer.slice(PAGE + 5, 100)
        part[:5] = b"hello"
        data = pickle.dumps(part)
        assert buffer.refcount == 2
        again = pickle.loads(data)
        assert again.address != part.address
        assert (len(again), again[:5]) == (100, b"hello")
        again[:5] = b"world"
        assert part[:5] == b"world"
        assert buffer.refcount == 2
        with pytest.raises(InvalidHandle, match="spent"):
            pickle.loads(data)
        again.unmap()
    assert kernel.audit()


def test_it_is_unpickled_as_often_as_it_was_pickled(kernel: KernelHandle, me: Process) -> None:
    """Dask, for one, pickles an argument four times, to have a key, a size and a message, and sends one of these."""
    with me.map(3 * PAGE) as buffer:
        part = buffer.slice(7, 500)
        same = {pickle.dumps(part) for _ in range(300)}
        other = {pickle.dumps(buffer) for _ in range(2)}
        assert len(same) == len(other) == 1 and kernel.stats()["handles"] == 2
        for data, times in (same.pop(), 300), (other.pop(), 2):
            for _ in range(times):
                pickle.loads(data).unmap()
            with pytest.raises(InvalidHandle, match="it is spent"):
                pickle.loads(data)
        fresh = pickle.dumps(buffer)
        assert fresh != data and pickle.loads(fresh).refcount == 2
    assert kernel.stats()["handles"] == 0


def test_what_cannot_be_pickled(me: Process) -> None:
    buffer = me.map(PAGE)
    for copied in (copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="bytes"):
            copied(buffer)
    buffer.unmap()
    with pytest.raises(InvalidAddress, match="unmapped"):
        pickle.dumps(buffer)


def test_without_its_kernel() -> None:
    with realmap.boot() as kernel, kernel.connect() as me:
        data = pickle.dumps(me.map(PAGE))
    with pytest.raises(realmap.KernelDied):
        pickle.loads(data)


def test_a_pickle_that_nobody_reads(monkeypatch: pytest.MonkeyPatch, short_transit: None) -> None:
    from realmap.kernel import watchdog

    monkeypatch.setattr(watchdog, "TICK", 0.05)
    with realmap.Kernel() as kernel:
        with realmap.connect(kernel.path) as me:
            data = pickle.dumps(me.map(PAGE))
        wait_until(lambda: not len(kernel.books.processes))
        assert kernel.frames.segments == 1  # on its way
        wait_until(lambda: not kernel.frames.segments, "the end of what nobody reads")
        with realmap.connect(kernel.path), pytest.raises(InvalidHandle, match="expired"):
            pickle.loads(data)


def test_a_pickle_that_nobody_reads_goes_some_time_after_its_buffer(
    monkeypatch: pytest.MonkeyPatch, short_transit: None
) -> None:
    """Also where its maker lives on: whoever should have read it was killed."""
    from realmap.kernel import watchdog

    monkeypatch.setattr(watchdog, "TICK", 0.05)
    with realmap.Kernel() as kernel, realmap.connect(kernel.path) as me:
        buffer = me.map(PAGE)
        part = buffer.slice(5, 10)
        data, kept = pickle.dumps(buffer), me.share(part, keep=True)
        buffer.unmap()
        again = pickle.loads(data)  # in time
        again.unmap()
        assert me.attach(kept).address
        me.revoke(kept)
        wait_until(lambda: not kernel.frames.segments)
        buffer = me.map(PAGE)
        pickle.dumps(buffer)
        buffer.unmap()
        assert kernel.frames.segments == 1
        wait_until(lambda: not kernel.frames.segments, "the end of what nobody reads")


def _double(buffer: realmap.Buffer) -> int:
    buffer[:] = bytes(2 * byte % 256 for byte in buffer[:])
    return os.getpid()


def test_a_pool_works_in_place(kernel: KernelHandle, me: Process) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool, me.map(8 * PAGE) as buffer:
        buffer[:] = b"\3" * len(buffer)
        parts = [buffer.slice(number * PAGE, PAGE) for number in range(8)]
        assert os.getpid() not in pool.map(_double, parts)
        assert buffer[:] == b"\6" * len(buffer)
        pool.close()
        pool.join()
    del pool
    gc.collect()
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]  # the standard library's own helper process
    wait_until(lambda: kernel.stats()["processes"] == 1)


# ---- forks ----------------------------------------------------------------------------------


def _child(work: object) -> int:
    """Runs in a forked child; its exit status, 0 where all held."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            work()  # type: ignore[operator]
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_child_that_touches_nothing_costs_nothing(kernel: KernelHandle, me: Process) -> None:
    buffer = me.map(PAGE)
    calls = kernel.stats()["calls"]

    def work() -> None:
        assert kernel.path
        buffer[0] = 7

    assert _child(work) == 0
    assert (kernel.stats()["processes"], kernel.stats()["calls"]) == (1, calls)
    assert buffer[0] == 7


def test_a_child_has_what_its_parent_had(kernel: KernelHandle, me: Process) -> None:
    buffers = [me.map(2 * PAGE, fragment=PAGE), me.map(PAGE, rights=realmap.u_r), me.map(PAGE)]
    buffers[0][:5] = b"hello"
    gone = buffers.pop()

    def work() -> None:
        gone.unmap()  # before a word was said: its own copy, and nobody else's business
        assert me.call("peek", buffers[0], 5, 0) == b"hello"
        report = realmap.connect(kernel.path)
        assert me.call("who")[0] == os.getpid()
        found = me.query(buffers[0].address)
        assert (found.length, found.refcount) == (2 * PAGE, 2)
        with pytest.raises(realmap.AccessDenied):
            me.call("poke", buffers[1], b"x", 0)
        own = me.map(PAGE)
        assert own.address not in [buffer.address for buffer in buffers]
        buffers[0].unmap()
        report.close()

    assert _child(work) == 0
    wait_until(lambda: kernel.stats()["processes"] == 1)
    assert me.call("peek", buffers[0], 5, 0) == b"hello"
    assert gone[0] == 0
    assert kernel.audit()


def test_an_orphan_still_has_it(kernel: KernelHandle, me: Process) -> None:
    """The parent is killed before its child says a word; the books keep what it had for the child, and then no more."""
    reader, writer = os.pipe()
    go, gone = os.pipe()
    parent = os.fork()
    if not parent:
        with suppress(BaseException):
            mine = kernel_connect(kernel.path)
            buffer = mine.map(3 * PAGE, fragment=PAGE)
            buffer[:] = b"heirloom" * (3 * PAGE // 8)
            if not os.fork():
                os.write(writer, b"child")
                os.read(go, 1)
                found = mine.call("sha256", buffer) == hashlib.sha256(buffer).hexdigest()
                os.write(writer, b"right" if found else b"wrong")
                os._exit(0)
            os.read(go, 1)
        os._exit(1)
    assert os.read(reader, 5) == b"child"
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    wait_until(lambda: kernel.stats()["processes"] == 1)
    assert kernel.stats()["segments"] == 3
    assert kernel.audit()
    os.write(gone, b"!")
    assert os.read(reader, 5) == b"right"
    wait_until(lambda: kernel.stats()["segments"] == 0, "the end of the child, and of what it had")
    for fd in (reader, writer, go, gone):
        os.close(fd)


def kernel_connect(path: str) -> Process:
    """By name, for a child that must not inherit `me`."""
    return realmap.connect(path)


def test_nobody_adopts_without_the_secret(kernel: KernelHandle, me: Process) -> None:
    from realmap.wire.messages import Adopt

    buffer = me.map(PAGE)
    with kernel.connect() as other:
        for secret in ("", "0" * 32, other._own_client.secret):
            places = [(buffer._window._base, PAGE, buffer._window._serial)]
            answer, _ = other._own_client.request(Adopt(other._own_client.next_id(), secret, places))
            assert answer == [False]
        base, serial = buffer._window._base, buffer._window._serial
        places = [
            (base, PAGE, serial + 1),
            (base, PAGE, serial),
            (base, PAGE, serial),
            (base, 2 * PAGE, serial),
            (5, 7, 1),
        ]
        answer, _ = other._own_client.request(Adopt(other._own_client.next_id(), me._own_client.secret, places))
        assert answer == [False, True, False, False, False]


def test_a_forked_child_never_gets_what_came_to_lie_there_since(kernel: KernelHandle) -> None:
    with kernel.connect() as me:
        old = me.map(3 * PAGE)
        kept = me.map(PAGE)
        old[:5], kept[:4] = b"child", b"kept"
        (go_on, gone), (said, saying) = os.pipe(), os.pipe()
        pid = os.fork()
        if not pid:
            try:
                os.read(go_on, 1)
                found = me.call("peek", kept, 4, 0)
                try:
                    found += me.call("peek", old, 5, 0)
                except realmap.InvalidAddress as error:
                    found += b", " + type(error).__name__.encode()
                os.write(saying, found + b", " + old[:5])
            finally:
                os._exit(0)
        address = old.address
        old.unmap()
        # Where it was is what the search for space comes to next, when all behind it is taken.
        behind = me.map(realmap.PAGE_SIZE)
        rest = USER_LAND.end - USER_LAND.length // HEAP_SHARE - behind.address - PAGE
        far = [me.map(rest // 2 // PAGE * PAGE, commit=False), me.map(rest - rest // 2 // PAGE * PAGE, commit=False)]
        new = me.map(3 * PAGE)
        assert new.address == address
        new[:13] = b"parent secret"
        os.write(gone, b"!")
        assert os.read(said, 100) == b"kept, InvalidAddress, child"
        os.waitpid(pid, 0)
        for fd in (go_on, gone, said, saying):
            os.close(fd)
        assert kernel.audit()
        assert len(far) == 2


def test_a_forked_child_adopts_in_several_messages(
    kernel: KernelHandle, me: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inheritance, "AT_ONCE", 3)
    buffers = [me.map(PAGE) for _ in range(7)]
    said, saying = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            for number, buffer in enumerate(buffers):
                buffer[0] = number
            os.write(saying, b"".join(me.call("peek", buffer, 1, 0) for buffer in buffers))
        finally:
            os._exit(0)
    assert os.read(said, 100) == bytes(range(7))
    os.waitpid(pid, 0)
    os.close(said)
    os.close(saying)
