"""How much can be mapped: limits of kernels and processes, and what Linux has: memory, mappings, descriptors."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import PAGE

import realmap
from realmap import (
    InvalidAddress,
    InvalidSize,
    KernelHandle,
    PhysicalMemoryExhaustion,
    Process,
    VirtualMemoryExhaustion,
)


def with_kernel(check: Callable[[KernelHandle, Process], None], **options: Any) -> None:
    import syscalls

    with realmap.boot(syscalls=syscalls.ALL, **options) as kernel, kernel.connect() as me:
        check(kernel, me)
        assert kernel.audit()


def test_memory_limits_of_kernel_and_process() -> None:
    def check(kernel: KernelHandle, me: Process) -> None:
        mine = me.map(3 * PAGE)
        with pytest.raises(PhysicalMemoryExhaustion, match="limit"):
            me.map(1)
        with kernel.connect() as other:
            theirs = other.map(2 * PAGE, fragment=PAGE)
            with pytest.raises(PhysicalMemoryExhaustion):
                other.map(1)
            mine.unmap()
            other.map(1).unmap()
            theirs.unmap()
        me.map(3 * PAGE).unmap()

    with_kernel(check, memory_limit=5 * PAGE, process_limit=3 * PAGE)


def test_a_small_kernelland_is_exhausted_and_serves_again() -> None:
    def check(kernel: KernelHandle, me: Process) -> None:
        buffer = me.map(8 * PAGE)
        with pytest.raises(VirtualMemoryExhaustion):
            me.call("sha256", buffer)
        for name in "abcd":
            me.call("keep", name, buffer.slice(0, 1))
        with pytest.raises(VirtualMemoryExhaustion):
            me.call("sha256", buffer.slice(0, 1))
        for name in "abcd":
            me.call("read_kept", name)
        assert me.call("sha256", buffer.slice(0, 7 * PAGE))

    with_kernel(check, kernel_land=7 * PAGE)


@pytest.mark.parametrize(
    "option",
    [
        {"memory_limit": -1},
        {"process_limit": -1},
        {"kernel_land": 0},
        {"kernel_land": PAGE + 1},
        {"kernel_land": 1 << 50},
    ],
)
def test_limits_that_are_none(option: dict[str, int]) -> None:
    with pytest.raises((InvalidSize, InvalidAddress)):
        realmap.boot(**option)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        realmap.boot(**dict.fromkeys(option, "x"))  # type: ignore[arg-type]


def run_script(text: str, *prefix: str, **options: Any) -> str:
    """Runs a program of its own; what it printed."""
    done = subprocess.run(
        [*prefix, sys.executable, "-W", "error", "-c", textwrap.dedent(text)],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def unshared() -> list[str]:
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs root, for a mount namespace of its own")
    return ["unshare", "-m"]


def test_a_full_shm_is_an_error_and_nothing_is_lost() -> None:
    shell = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
    out = run_script(
        """
        import realmap
        with realmap.boot() as kernel, kernel.connect() as me:
            first = me.map(500_000)
            for fragment in (None, realmap.PAGE_SIZE):
                try:
                    me.map(800_000, fragment=fragment)
                except realmap.PhysicalMemoryExhaustion as error:
                    print(type(error).__name__, error.size <= 802816, "/dev/shm" in str(error))
            second = me.map(500_000)
            first[499_999] = 1
            print(kernel.stats()["bytes"], bool(kernel.audit()))
        """,
        *unshared(),
        "sh",
        "-c",
        shell,
        "sh",
    )
    assert out.splitlines() == ["PhysicalMemoryExhaustion True True"] * 2 + [f"{2 * 503808} True"]


def test_executable_rights_on_a_noexec_shm_name_the_mount() -> None:
    shell = 'mount -t tmpfs -o noexec tmpfs /dev/shm && exec "$@"'
    out = run_script(
        """
        import realmap
        with realmap.boot() as kernel, kernel.connect() as me:
            try:
                me.map(1, rights=realmap.u_rx)
            except realmap.AccessDenied as error:
                print(error)
            print(kernel.stats()["mappings"])
        """,
        *unshared(),
        "sh",
        "-c",
        shell,
        "sh",
    )
    assert "/dev/shm" in out.splitlines()[0]
    assert "noexec" in out.splitlines()[0]
    assert out.splitlines()[1] == "0"


@pytest.mark.parametrize("where", ["kernel", "user"])
def test_no_descriptors_left(where: str) -> None:
    out = run_script(
        f"""
        import os, resource, realmap
        where = {where!r}
        low = 60
        if where == "kernel":
            resource.setrlimit(resource.RLIMIT_NOFILE, (low, low))
        with realmap.boot() as kernel, kernel.connect() as me:
            kernel.stats()
            held = []
            if where == "user":
                resource.setrlimit(resource.RLIMIT_NOFILE, (low, low))
                while len(os.listdir("/proc/self/fd")) < low - 5:
                    held.append(os.open("/dev/null", os.O_RDONLY))
            try:
                buffers = [me.map(50 * realmap.PAGE_SIZE, fragment=realmap.PAGE_SIZE) for _ in range(2)]
            except realmap.PhysicalMemoryExhaustion as error:
                print("descriptors" in str(error))
            for fd in held:
                os.close(fd)
            print(me.map(5)[:], bool(kernel.audit()))
        """
    )
    assert out.splitlines() == ["True", f"{bytes(5)} True"]


def test_the_limit_of_mappings_of_the_machine() -> None:
    """At Linux's limit: an error, nothing half-mapped, and everything that lives can still be dropped."""
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    if limit > 100_000:
        pytest.skip(f"vm.max_map_count is {limit}: too many to reach here")
    out = run_script(
        f"""
        import realmap
        from realmap.memory import *
        from realmap.rights import *
        P = realmap.PAGE_SIZE
        frames = FrameAllocator().allocate(64 * P, P)
        mapping = Mapping(0x2000_0000_0000, frames, 0, 64 * P, MemoryType.HEAP, u_rw)
        kernel = KernelMemory()
        live = []
        try:
            while len(live) < {limit}:
                live.append(CrossProcessMapping.mirror_mapping(mapping, 0, 64 * P, kernel=kernel))
        except realmap.VirtualMemoryExhaustion as error:
            books = kernel.live == len(live) == frames.refcount - 1
            print("max_map_count" in str(error), len(live) > 500, books)
        for mirror in live:
            mirror.drop()
        from realmap.host import procfs
        left = procfs.maps("self", KERNEL_LAND.start, KERNEL_LAND.end)
        print(kernel.live, frames.refcount, [entry for entry in left if entry.start not in kernel._anchors()])
        """
    )
    assert out.splitlines() == ["True True True", "0 1 []"]


def test_the_hard_limit_of_descriptors_is_the_kernels() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def check(kernel: KernelHandle, me: Process) -> None:
        with open(f"/proc/{kernel.pid}/limits") as lines:
            (line,) = (line for line in lines if line.startswith("Max open files"))
        assert line.split()[3:5] == [str(hard)] * 2
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, hard)

    with_kernel(check)
