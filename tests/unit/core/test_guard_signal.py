"""The SIGBUS guard in programs of their own: whoever else has the signal, and where pages are not to be had."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import BOUND, long

pytestmark = pytest.mark.process

SETUP = """
    import ctypes, faulthandler, mmap, os, signal, sys, tempfile
    import realmap
    from realmap.memory import *

    mapping = Mapping(0x200000000000, FrameAllocator().allocate(65536), 0, 65536, realmap.MemoryType.HEAP, realmap.u_rw)
    land = KernelMemory()

    def ours():
        mirror = CrossProcessMapping.mirror_mapping(mapping, 0, 65536, kernel=land)
        view = memoryview(mirror)
        os.truncate(f"/proc/self/fd/{mapping.frames.segments[0].fd}", 0)
        assert not any(view[::4096])
        view.release()
        try:
            mirror.drop()
        except realmap.MemoryFault:
            print("fault", flush=True)
        os.truncate(f"/proc/self/fd/{mapping.frames.segments[0].fd}", 65536)

    def foreign():
        file = tempfile.TemporaryFile()
        file.truncate(8192)
        theirs = mmap.mmap(file.fileno(), 8192)
        file.truncate(0)
        theirs[4096]
"""


def _run(code: str, *options: str, before: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    script = textwrap.dedent(code)
    return subprocess.run(
        [*(before or []), sys.executable, *options, "-c", script], capture_output=True, text=True, timeout=BOUND
    )


# ---- others who have the signal -----------------------------------------------------------


@pytest.mark.parametrize(
    "order",
    [
        long("faulthandler.enable(); ours()"),
        long("ours(); faulthandler.enable(); ours()"),
        "ours(); faulthandler.enable(); faulthandler.disable(); ours(); faulthandler.enable(); ours()",
        "faulthandler.enable(); ours(); faulthandler.disable(); ours(); faulthandler.enable(); ours()",
        "ours(); signal.signal(signal.SIGBUS, lambda *_: print('no')); ours()",
        "signal.signal(signal.SIGBUS, print); ours(); signal.signal(signal.SIGBUS, signal.SIG_DFL); ours()",
    ],
)
def test_ours_is_ours_whoever_else_has_the_signal(order: str) -> None:
    done = _run(textwrap.dedent(SETUP) + order)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "fault\n" * order.count("ours()")
    assert not done.stderr


@pytest.mark.parametrize(
    "foreign",
    [
        "signal.signal(signal.SIGBUS, signal.SIG_DFL)",
        "signal.signal(signal.SIGBUS, lambda *_: print('no'))",
        "faulthandler.enable()",
    ],
)
def test_between_two_bytes(foreign: str) -> None:
    """Not at each single byte it is asked who has the signal; who takes it in between is noticed all the same."""
    code = f"""
    for at in range(4096, 65536, 4096):
        faulthandler.disable()
        signal.signal(signal.SIGBUS, signal.SIG_IGN)
        mirror = CrossProcessMapping.mirror_mapping(mapping, 0, 65536, kernel=land)
        os.truncate(f"/proc/self/fd/{{mapping.frames.segments[0].fd}}", at)
        for _ in range(100):
            mirror[0]
        {foreign}
        try:
            mirror[at]
        except realmap.MemoryFault:
            print("fault")
        try:
            mirror.drop()
        except realmap.MemoryFault:
            pass
        os.truncate(f"/proc/self/fd/{{mapping.frames.segments[0].fd}}", 65536)
    """
    done = _run(textwrap.dedent(SETUP) + textwrap.dedent(code))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "fault\n" * 15


@pytest.mark.parametrize(
    ("order", "dumped"),
    [
        ("ours(); foreign()", False),
        long("faulthandler.enable(); ours(); foreign()", True),
        long("ours(); faulthandler.enable(); foreign()", True),
        ("ours(); faulthandler.enable(); ours(); foreign()", True),
        ("faulthandler.enable(); ours(); faulthandler.disable(); ours(); foreign()", False),
        ("ours(); faulthandler.enable(); ours(); faulthandler.disable(); foreign()", False),
        long("ours(); os.kill(os.getpid(), signal.SIGBUS)", False),
        ("ours(); faulthandler.enable(); ours(); os.kill(os.getpid(), signal.SIGBUS)", True),
    ],
)
def test_a_foreign_fault_is_who_had_its(order: str, dumped: bool) -> None:
    done = _run(textwrap.dedent(SETUP) + order)
    assert done.returncode == -signal.SIGBUS
    assert ("Fatal Python error: Bus error" in done.stderr) == dumped
    assert done.stderr.count("Fatal Python error") == dumped


def test_a_signal_that_somebody_sends_reaches_pythons_handler() -> None:
    done = _run(
        textwrap.dedent(SETUP)
        + "signal.signal(signal.SIGBUS, lambda *_: print('theirs', flush=True)); ours()\n"
        + "os.kill(os.getpid(), signal.SIGBUS); ours(); os.kill(os.getpid(), signal.SIGBUS)"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "fault\ntheirs\nfault\ntheirs\n"


def test_importing_takes_no_signal() -> None:
    done = _run("import signal, realmap; assert signal.getsignal(signal.SIGBUS) is signal.SIG_DFL")
    assert done.returncode == 0, done.stderr


# ---- pages that are not to be had ----------------------------------------------------------


def test_zero_pages_one_by_one(tmp_path: Path) -> None:
    """Where Linux has no room for all of them at once (simulated: strict accounting is a setting of the machine)."""
    if "LD_PRELOAD" in os.environ:
        pytest.skip("something else is preloaded: a sanitizer")
    (tmp_path / "refuse.c").write_text(
        """
        #define _GNU_SOURCE
        #include <errno.h>
        #include <stddef.h>
        #include <sys/mman.h>
        #include <sys/syscall.h>
        #include <unistd.h>
        void *mmap(void *at, size_t length, int prot, int flags, int fd, off_t offset)
        {
            if ((flags & MAP_FIXED) && (flags & MAP_ANONYMOUS) && length > 4096) {
                errno = ENOMEM;
                return MAP_FAILED;
            }
            return (void *)syscall(SYS_mmap, at, length, prot, flags, fd, offset);
        }
        """
    )
    library = str(tmp_path / "refuse.so")
    subprocess.run(["cc", "-shared", "-fPIC", str(tmp_path / "refuse.c"), "-o", library], check=True)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SETUP) + "ours(); ours()"],
        capture_output=True, text=True, timeout=BOUND, env={**os.environ, "LD_PRELOAD": library},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "fault\nfault\n"


def test_pages_that_are_not_to_be_had() -> None:
    """A full /dev/shm under `commit=False`: what cannot be had at first touch is a fault, too."""
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs root, for a mount namespace of its own")
    code = """
        import realmap
        with realmap.boot() as kernel, kernel.connect() as me:
            buffer = me.map(1 << 20, commit=False)
            for at in range(0, 1 << 20, 4096):
                try:
                    buffer[at] = 1
                except realmap.MemoryFault as error:
                    assert error.address == buffer.address + at
                    assert "room" in str(error)
                    break
            else:
                raise SystemExit("it never became full")
            assert kernel.audit()
    """
    done = _run(
        code, before=["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=512k tmpfs /dev/shm && exec "$@"', "-"]
    )
    assert done.returncode == 0, done.stderr
