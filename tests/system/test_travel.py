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
from realmap.user import travel

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


def _digest(path: str, buffer: realmap.Buffer, own: int) -> str:
    with realmap.connect(path) as me, me.map(own):
        assert buffer.process is not me
        return str(me.call("sha256", buffer))


def nothing_of_a_pool_is_left(kernel: KernelHandle) -> None:
    gc.collect()
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]  # the standard library's own helper process
    wait_until(lambda: kernel.stats()["processes"] == 1)


def test_a_worker_connects_and_calls_with_what_came_before(kernel: KernelHandle, me: Process) -> None:
    with me.map(3333) as buffer, multiprocessing.get_context("spawn").Pool(1) as pool:
        buffer[:] = b"\3" * 3333
        expected = hashlib.sha256(buffer).hexdigest()
        assert [pool.apply(_digest, (kernel.path, buffer, 100)) for _ in range(2)] == [expected] * 2
        pool.close()
        pool.join()
    del pool
    nothing_of_a_pool_is_left(kernel)


def test_a_pool_works_in_place(kernel: KernelHandle, me: Process) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool, me.map(8 * PAGE) as buffer:
        buffer[:] = b"\3" * len(buffer)
        parts = [buffer.slice(number * PAGE, PAGE) for number in range(8)]
        assert os.getpid() not in pool.map(_double, parts)
        assert buffer[:] == b"\6" * len(buffer)
        pool.close()
        pool.join()
    del pool
    nothing_of_a_pool_is_left(kernel)
