"""Whom a kernel lets in, what a fork may do, and a kernel in this very process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
import syscalls
from conftest import BOUND, PAGE, land_maps, wait_until
from forked import in_a_child

import realmap
from realmap import AccessDenied, InvalidHandle, KernelDied, KernelHandle, Process, VersionMismatch
from realmap.host import procfs
from realmap.wire import channel, messages
from realmap.wire.client import Client

# ---- who is let in ------------------------------------------------------------------------


def test_no_kernel_there(tmp_path: Path) -> None:
    with pytest.raises(KernelDied, match="boot"):
        realmap.connect(tmp_path / "nothing.sock")
    (tmp_path / "file").touch()
    with pytest.raises((KernelDied, InvalidHandle)):
        realmap.connect(tmp_path / "file")
    with pytest.raises((KernelDied, InvalidHandle)):
        realmap.connect("x" * 200)
    with socket.socket(socket.AF_UNIX) as stream:
        stream.bind(str(tmp_path / "stream"))
        stream.listen()
        with pytest.raises(InvalidHandle):
            realmap.connect(tmp_path / "stream")


def test_paths_of_kernels(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with realmap.boot(path=path) as kernel:
        assert kernel.path == str(path)
        with pytest.raises(InvalidHandle, match="serves"):
            realmap.boot(path=path)
        with realmap.connect(path) as me:
            assert me.map(1)[0] == 0
        assert path.stat().st_mode & 0o777 == 0o600
    assert not path.exists()
    path.touch()
    with pytest.raises(InvalidHandle, match="no socket"):
        realmap.boot(path=path)
    with pytest.raises(InvalidHandle, match="directory"):
        realmap.boot(path=tmp_path / "none" / "a.sock")
    with pytest.raises(InvalidHandle, match="shorten"):
        realmap.boot(path=tmp_path / ("x" * 108))


def test_a_killed_kernels_path_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    first = realmap.boot(path=path)
    os.kill(first.pid, signal.SIGKILL)
    first._child.wait(BOUND)
    assert path.exists()
    with realmap.boot(path=path) as second, realmap.connect(path) as me:
        assert me._own_client.kernel_pid == second.pid
    first.shutdown()


def hello(**changes: Any) -> bytes:
    fields = {"type": "hello", "protocol": messages.PROTOCOL, "version": "0", "pid": os.getpid()}
    fields["start"] = procfs.start_time(os.getpid())
    return b"\0" + msgspec.msgpack.encode(fields | changes)


def answer_to(kernel: KernelHandle, data: bytes) -> Any:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(BOUND)
        sock.connect(kernel.path)
        sock.send(data)
        said = sock.recv(1 << 16)
    return msgspec.msgpack.decode(said[1:], type=messages.Welcome | messages.Refused) if said else None


def test_the_handshake_refuses_what_it_cannot_name(kernel: KernelHandle) -> None:
    for changes, error in [
        ({"protocol": 999, "version": "9.9"}, VersionMismatch),
        ({"pid": os.getpid() + 1}, AccessDenied),
        ({"start": 1}, AccessDenied),
    ]:
        answer = answer_to(kernel, hello(**changes))
        assert isinstance(answer, messages.Refused)
        found = messages.exception_of(answer.error)
        assert type(found) is error
        assert len(str(found)) > 20
    assert isinstance(answer_to(kernel, hello(later="unknown fields are ignored")), messages.Welcome)


def test_a_kernel_of_another_version_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "other.sock")
    for reply, words in [
        (messages.Refused(2, "9.9", messages.error_of(VersionMismatch("9.9", "0.1", why="of another version"))), "9.9"),
        ({"what": "is this"}, "does not speak"),
    ]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(path)
            listener.listen()

            def serve(listener: socket.socket = listener, reply: Any = reply) -> None:
                with listener.accept()[0] as sock:
                    sock.recv(1 << 16)
                    sock.send(b"\0" + msgspec.msgpack.encode(reply))

            thread = threading.Thread(target=serve)
            thread.start()
            with pytest.raises(VersionMismatch, match=words):
                Client(path)
            thread.join()
        os.unlink(path)


def test_a_peer_of_another_uid_is_refused(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("needs root, to become another user")
    path = Path("/tmp") / f"realmap-test-{os.getpid()}.sock"
    with realmap.boot(path=path) as kernel:
        for mode, why in ((0o666, "uid 65534"), (0o600, "")):  # the kernel refuses it; Linux does
            os.chmod(path, mode)

            def work(why: str = why) -> None:
                os.setgid(65534)
                os.setuid(65534)
                with pytest.raises(AccessDenied, match=why or None):
                    realmap.connect(kernel.path)

            in_a_child(work)


def test_a_peer_of_another_pid_namespace_is_refused(kernel: KernelHandle) -> None:
    if os.geteuid() or subprocess.run(["unshare", "-pf", "true"], capture_output=True).returncode:
        pytest.skip("needs root, for a pid namespace of its own")
    code = f"import realmap\ntry: realmap.connect({kernel.path!r})\nexcept realmap.AccessDenied as e: print(e)"
    done = subprocess.run(
        ["unshare", "-pf", "--mount-proc", sys.executable, "-c", code], capture_output=True, text=True, timeout=BOUND
    )
    assert "pid namespace" in done.stdout, done.stderr


# ---- forks --------------------------------------------------------------------------------


def test_a_forked_child_is_a_process_of_its_own(me: Process, kernel: KernelHandle) -> None:
    buffer = me.map(100)
    buffer[0:6] = b"parent"

    def work() -> None:
        with pytest.raises(InvalidHandle, match="connect"):
            kernel.stats()
        assert buffer[0:6] == b"parent"
        assert me.call("who")[0] == me.pid == os.getpid()
        assert me.call("peek", buffer, 6, 0) == b"parent" and buffer.refcount == 2
        with realmap.connect(kernel.path) as mine:
            own = mine.map(100)
            assert own.address != buffer.address and mine.call("sha256", own)

    in_a_child(work)
    assert me.call("echo", 5) == [5]
    assert buffer[0:6] == b"parent"


def test_a_child_that_collects_does_not_unmap_for_its_parent(me: Process, kernel: KernelHandle) -> None:
    buffer = me.map(100)

    def work() -> None:
        nonlocal buffer
        buffer = None  # type: ignore[assignment]
        assert land_maps() == []

    in_a_child(work)
    assert kernel.stats()["mappings"] == 1
    assert buffer.alive


def test_a_forked_child_keeps_no_connection_open(kernel: KernelHandle) -> None:
    me = kernel.connect()
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    me.close()
    wait_until(lambda: kernel.stats()["processes"] == 0)
    os.close(reader)
    os.close(writer)
    os.waitpid(child, 0)


def test_a_fork_of_the_kernel_keeps_nothing(me: Process) -> None:
    buffer = me.map(PAGE)
    me.call("keep", "fork", buffer)
    assert me.call("fork") == [0, 0]
    me.call("read_kept", "fork")


# ---- a kernel in this process -------------------------------------------------------------


def test_case_1_no_mapping_happens() -> None:
    with realmap.Kernel(syscalls=syscalls.ALL) as kernel, realmap.connect(kernel.path) as me:
        buffer = me.map(2 * PAGE)
        assert me.call("access", buffer.slice(PAGE - 1, 5)) == ["UserspacePtr", buffer.address + PAGE - 1, 0]
        assert buffer[PAGE - 1] == 1
        assert me.call("sha256", buffer)
        kernel.stop()
        with pytest.raises(KernelDied):
            me.call("nop")
    assert not os.path.exists(kernel.path)


def test_case_1_checks_the_callers_rights() -> None:
    with realmap.Kernel(syscalls=syscalls.ALL) as kernel, realmap.connect(kernel.path) as me:
        with pytest.raises(AccessDenied):
            me.call("access", me.map(100, rights=realmap.u_r))


def test_a_kernel_runs_once() -> None:
    kernel = realmap.Kernel()
    with kernel:
        with pytest.raises(realmap.KernelError, match="runs already"):
            kernel.start()
    with pytest.raises(realmap.KernelError, match="stopped"):
        kernel.start()
    kernel.stop()


def test_two_kernels_in_one_process() -> None:
    with realmap.Kernel(syscalls=syscalls.ALL) as one, realmap.Kernel(syscalls=syscalls.ALL) as two:
        with realmap.connect(one.path) as first, realmap.connect(two.path) as second:
            ours, theirs = first.map(3 * PAGE), second.map(3 * PAGE)
            assert ours.address != theirs.address
            assert first.call("sha256", ours) == second.call("sha256", theirs)
            assert first.call("reverse", ours)[1] != 0


def test_serving_in_the_foreground(tmp_path: Path) -> None:
    path = tmp_path / "fg.sock"
    for number in (signal.SIGINT, signal.SIGTERM):
        child = subprocess.Popen(
            [sys.executable, "-m", "realmap", "kernel", "--path", str(path)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        assert child.stdout.readline() == f"realmap: ready at {path}\n"
        with realmap.connect(path) as me:
            assert me.map(5)[:] == bytes(5)
        child.send_signal(number)
        assert child.wait(BOUND) == 0
        child.stdout.close()
        assert not path.exists()


def test_an_assembler_takes_parts_and_refuses_what_is_none() -> None:
    message = os.urandom(5 * channel.CHUNK + 3)
    parts = channel.datagrams(message)
    taker = channel.Assembler()
    assert [taker.feed(part) for part in parts[:-1]] == [None] * 5
    assert taker.feed(b"\0between") == b"between"
    assert taker.feed(parts[-1]) == message
    taker.feed(parts[0])  # interrupted here
    assert [taker.feed(part) for part in parts][-1] == message
    for bad in (b"", b"\0", b"\4x", b"\2x", b"\3x", b"\0" * (channel.DATAGRAM + 1)):
        with pytest.raises(channel.NotAMessage):
            channel.Assembler().feed(bad)
    with pytest.raises(channel.NotAMessage, match="more than"):
        for part in [parts[0], *(bytes(bytearray(parts[1])) for _ in range(300))]:
            taker.feed(part)
