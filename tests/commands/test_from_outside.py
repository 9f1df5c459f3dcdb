"""Commands that look at a running kernel, or take up what a killed one has left: `audit`, `gc`, `kernel`."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import syscalls
from command_line import command_line
from conftest import BOUND, PAGE, wait_until
from test_commands import realmap

from realmap import KernelHandle, boot
from realmap.user import names


@pytest.fixture
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KernelHandle]:
    """A kernel in the private directory of this test alone (a short path: a socket's has 107 bytes at most)."""
    before = os.environ["REALMAP_DIR"]
    os.environ["REALMAP_DIR"] = str(tmp_path_factory.mktemp("k"))
    try:
        with boot(syscalls=syscalls.ALL) as kernel:
            yield kernel
    finally:
        os.environ["REALMAP_DIR"] = before


@pytest.mark.parametrize("how", ["option", "variable", "only one"])
def test_an_audit_of_a_running_kernel(running: KernelHandle, how: str) -> None:
    with running.connect() as me, me.map(5 * PAGE, fragment=2 * PAGE), me.map(PAGE, name=f"named-{os.getpid()}"):
        options = ["--kernel", running.path] if how == "option" else []
        variables = {"REALMAP_KERNEL": running.path} if how == "variable" else {}
        done = command_line("audit", *options, **variables)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == "0 differences in 1 process, 2 mappings, 0 mirrors, 2 frames\n"
        report = json.loads(command_line("audit", "--json", *options, **variables).stdout)
        assert (report["differences"], report["mappings"], report["faulted"]) == ([], 2, [])


def test_an_audit_names_each_difference(running: KernelHandle) -> None:
    with running.connect() as me, me.map(2 * PAGE) as buffer:
        me.call("truncate_and_sum", buffer.slice(0, 1), 2 * PAGE, "dropped")
        address = buffer._window._base
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.munmap(ctypes.c_void_p(address + PAGE), ctypes.c_size_t(PAGE)) == 0
        done = command_line("audit", "--kernel", running.path)
        assert done.returncode == 1
        assert f"UserLand of pid {os.getpid()} at {address:#x}" in done.stdout
        assert done.stdout.startswith("2 differences")
        page = running.snapshot().frames[0].segments[0]
        fd = next(
            int(fd)
            for fd in os.listdir(f"/proc/{running.pid}/fd")
            if os.stat(f"/proc/{running.pid}/fd/{fd}").st_ino == page.inode
        )
        again = libc.syscall(438, os.pidfd_open(running.pid), fd, 0)  # pidfd_getfd; and then a mapping again
        found = libc.mmap
        found.restype = ctypes.c_void_p
        found.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        assert found(address + PAGE, PAGE, 3, 0x100001, again, PAGE) == address + PAGE
        os.close(again)
        os.close(again - 1)
        assert running.audit()


def test_an_audit_finds_a_descriptor_too_many(running: KernelHandle) -> None:
    with running.connect() as me, me.map(PAGE) as buffer:
        me.call("leak_descriptor", buffer)
        report = running.audit()
        assert [difference.linux for difference in report.differences] == ["2 are open in the kernel"]


@pytest.mark.parametrize("command", [["audit"]])
def test_no_kernel_and_several(running: KernelHandle, command: list[str], tmp_path: Path) -> None:
    with boot() as second:
        done = realmap(*command)  # as a process of its own
        assert done.returncode == 1
        assert running.path in done.stderr
        assert second.path in done.stderr
        assert f"  of process {os.getpid()}, " in done.stderr  # who booted it
    running.shutdown()
    done = command_line(*command)
    assert done.returncode == 1
    assert "start one: realmap kernel (or, if one has a --path PATH, name it: --kernel PATH)" in done.stderr
    file, dead = tmp_path / "file", tmp_path / "dead"
    file.touch()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(dead))
    for path, words in (
        (tmp_path / "none", "no kernel listens at"),
        (dead, f"any more; clear it away: realmap gc {dead}"),
        (tmp_path, "is a directory, not the socket of a kernel: give what"),
        (file, "is a file, not the socket of a kernel: give what"),
        (file / "x", "no kernel listens at"),
    ):
        done = command_line(*command, "--kernel", path)
        assert done.returncode == 1
        assert done.stderr.startswith("Error: ")
        assert done.stderr.count("\n") == 1
        assert repr(str(path)) in done.stderr
        assert words in done.stderr


@pytest.mark.alone
def test_gc_takes_what_a_killed_kernel_left_and_nothing_else(running: KernelHandle, tmp_path: Path) -> None:
    name, path = f"left-{os.getpid()}", str(tmp_path / "own.sock")
    killed, at_path = boot(), boot(path=path)
    with killed.connect() as me, me.map(PAGE, name=name), running.connect() as other:
        with other.map(PAGE, name=name + "-living"):
            assert command_line("gc").stdout == "nothing was left over\n"
            for kernel in (killed, at_path):
                os.kill(kernel.pid, signal.SIGKILL)
                kernel._child.wait(BOUND)
            gone = json.loads(command_line("gc", "--json", path, running.path[:-5] + ".none").stdout)
            # The segment may be swept by a kernel of somebody else's that starts just now.
            assert gone in ([name, killed.path, path], [killed.path, path])
            assert not os.path.exists(f"/dev/shm/{name}")
            assert not os.path.exists(path)
            assert not os.path.exists(path + ".lock")
            done = realmap("gc", running.path)
            assert done.returncode == 1
            assert done.stderr == f"Error: {running.path!r} is in use: a kernel, or another program, serves it\n"
            assert command_line("gc", __file__).stderr == f"Error: {__file__!r} is no socket\n"
            assert os.path.exists(f"/dev/shm/{name}-living")
            assert other.call("nop") is None
    killed.shutdown()
    at_path.shutdown()


def test_gc_gives_back_what_was_to_outlive_its_maker(running: KernelHandle) -> None:
    with running.connect() as me, running.connect() as other:
        labels = [other.share(other.map(PAGE), keep=True).token[:8] for _ in range(2)]
        mine, name = me.share(me.map(PAGE), keep=True), f"kept-{os.getpid()}"
        names.make(other, PAGE, name, keep=True)
        other.close()
        wait_until(lambda: running.stats()["orphans"] == 3)
        done = command_line("gc", "--orphans", "--kernel", running.path)
        assert done.stdout == "".join(f"removed the handle {label}…\n" for label in labels)
        assert (running.stats()["orphans"], running.stats()["handles"]) == (1, 2)
        assert command_line("gc", "--orphans", "--kernel", running.path).stdout == "nothing was left over\n"
        assert len(me.attach(mine)) == PAGE
        assert len(names.attach(me, name)) == PAGE
        names.unlink(me, name)
        me.revoke(mine)
    assert command_line("gc", "--orphans", "--kernel", running.path + ".none").returncode == 1


def test_a_path_is_taken_over_from_a_killed_kernel(tmp_path: Path) -> None:
    path = str(tmp_path / "again.sock")
    for _ in range(3):
        kernel = boot(path=path)
        with kernel.connect() as me:
            assert len(me.map(PAGE)) == PAGE
            os.kill(kernel.pid, signal.SIGKILL)
            kernel._child.wait(BOUND)
        kernel.shutdown()
    with boot(path=path) as kernel, kernel.connect() as me:
        assert kernel.audit()
