"""How kernels start and end: scripts, shells, signals, exits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import syscalls
from conftest import BOUND, ROOT, land_maps, long, wait_until

import realmap
from realmap import KernelDied, KernelHandle, Process
from realmap.host import liveness, runtime


def program(tmp_path: Path, text: str, **options: Any) -> subprocess.Popen[str]:
    """A script of a user's own, started."""
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(text))
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def run(tmp_path: Path, text: str, status: int = 0) -> str:
    child = program(tmp_path, text)
    out, err = child.communicate(timeout=BOUND)
    assert (child.returncode, err) == (status, "")
    return out


# ---- boot ---------------------------------------------------------------------------------


def test_functions_of_a_script_need_no_main_guard(tmp_path: Path) -> None:
    out = run(
        tmp_path,
        """
        import os, realmap
        FACTOR = 3

        def helper(x):
            return x * FACTOR

        @realmap.syscall(name="times")
        def anything(call, x):
            return [helper(x), os.getpid() == call.kernel and 0 or os.getcwd()]

        def child(me, text):
            print(text, me.call("times", 7)[0], flush=True)

        with realmap.boot(syscalls=[anything]) as kernel:
            job = kernel.spawn(child, "seven times three is")
            assert job.join(60) == 0 == job.exitcode
            with kernel.connect() as me:
                print(me.call("times", 1)[1] == os.getcwd())
        """,
    )
    assert out.splitlines() == ["seven times three is 21", "True"]


def test_the_program_of_the_design_runs(tmp_path: Path) -> None:
    text = (ROOT / "tools" / "examples" / "digest.py").read_text()
    assert "the kernel says: 2cf24dba5fb0a30e" in run(tmp_path, text)


def test_functions_typed_into_a_shell() -> None:
    text = "import realmap\n@realmap.syscall\ndef one(call): return 1\n\nk = realmap.boot(syscalls=[one])\n"
    text += "m = k.connect()\nprint('said', m.call('one'))\nm.close(); k.shutdown()\n"
    done = subprocess.run([sys.executable, "-i", "-q"], input=text, capture_output=True, text=True, timeout=BOUND)
    assert "said 1" in done.stdout
    assert "Traceback" not in done.stderr


def test_what_cannot_be_sent_is_named() -> None:
    lock = threading.Lock()

    def locked(call: realmap.Call) -> None:
        with lock:
            pass

    with pytest.raises(TypeError, match=r"'locked'.*'lock'"):
        realmap.boot(syscalls=[locked])
    with realmap.boot() as kernel:
        with pytest.raises(TypeError, match=r"'locked'.*'lock'"):
            kernel.spawn(locked)
        with pytest.raises(TypeError, match="argument 2"):
            kernel.spawn(print, 1, lock)


def test_syscalls_that_are_none() -> None:
    for bad, error in [([3], TypeError), ([syscalls.nop, syscalls.nop], ValueError), (3, TypeError)]:
        with pytest.raises(error):
            realmap.boot(syscalls=bad)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        realmap.syscall(3)  # type: ignore[call-overload]
    with pytest.raises(TypeError):
        realmap.syscall(name=3)(syscalls.nop)  # type: ignore[call-overload]


def test_an_undecorated_function_goes_by_its_name() -> None:
    def plain(call: realmap.Call) -> str:
        return call.name

    with realmap.boot(syscalls=[plain]) as kernel, kernel.connect() as me:
        assert me.call("plain") == "plain"


def test_spawned_processes(kernel: KernelHandle) -> None:
    def fail(me: Process) -> None:
        raise SystemExit(3)

    def wait(me: Process) -> None:
        signal.pause()

    failing, waiting = kernel.spawn(fail), kernel.spawn(wait)
    assert failing.join(BOUND) == failing.exitcode == 3
    assert waiting.exitcode is None
    assert waiting.join(0.01) is None
    assert "running" in repr(waiting)
    waiting.kill()
    assert waiting.join(BOUND) == -signal.SIGKILL
    waiting.kill()


def test_a_spawned_process_that_raises_says_so(tmp_path: Path) -> None:
    child = program(
        tmp_path,
        """
        import realmap
        def fail(me):
            raise ValueError("in the child")
        with realmap.boot() as kernel:
            print(kernel.spawn(fail).join())
        """,
    )
    out, err = child.communicate(timeout=BOUND)
    assert (out, child.returncode) == ("1\n", 0)
    assert "ValueError: in the child" in err


# ---- ends ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ending",
    [
        "",
        "kernel = me = buffer = None",
        long("import sys; sys.exit(0)"),
        long("del kernel"),
        long("me.close()"),
        "view = memoryview(buffer)",
    ],
)
def test_exit_without_with_is_silent_and_leaves_nothing(tmp_path: Path, ending: str) -> None:
    out = run(
        tmp_path,
        f"""
        import realmap
        kernel = realmap.boot()
        me = kernel.connect()
        buffer = me.map(100_000)
        buffer[5] = 5
        print(kernel.pid, kernel.path, flush=True)
        {ending}
        """,
    )
    pid, path = out.split()
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"))
    assert not os.path.exists(path)


def test_the_kernel_ends_with_its_booter(tmp_path: Path) -> None:
    child = program(
        tmp_path,
        """
        import realmap, signal
        def user(me):
            buffer = me.map(100_000)
            print("user", flush=True)
            signal.pause()
        kernel = realmap.boot()
        job = kernel.spawn(user)
        print(kernel.pid, job.pid, flush=True)
        signal.pause()
        """,
    )
    assert child.stdout is not None
    lines = sorted(child.stdout.readline().split() for _ in range(2))
    pids = [int(pid) for pid in lines[0]]
    pidfds = [os.pidfd_open(pid) for pid in pids]
    child.kill()
    child.wait()
    for pidfd in pidfds:
        assert liveness.wait_death(pidfd, BOUND)
        os.close(pidfd)
    child.stdout.close()
    assert child.stderr is not None
    child.stderr.close()


def test_a_kernel_whose_handler_never_returns_ends_with_its_booter(tmp_path: Path) -> None:
    child = program(
        tmp_path,
        """
        import realmap, time
        class Sooner:
            def __reduce__(self):  # the kernel's process, which gets this with its handler, waits less long
                return setattr, (realmap.system, "GRACE", 0.2)
        @realmap.syscall
        def stuck(call, sooner=Sooner()):
            while True:
                time.sleep(1)
        kernel = realmap.boot(syscalls=[stuck])
        me = kernel.connect()
        print(kernel.pid, flush=True)
        me.call("stuck")
        """,
    )
    assert child.stdout is not None
    pidfd = os.pidfd_open(int(child.stdout.readline()))
    child.kill()
    child.communicate()
    assert liveness.wait_death(pidfd, BOUND)
    os.close(pidfd)


def test_ctrl_c_ends_the_program_and_not_the_kernel_under_it(tmp_path: Path) -> None:
    """SIGINT to the whole process group, as a terminal sends it."""
    child = program(
        tmp_path,
        """
        import realmap, sys, time
        @realmap.syscall(blocking=True)
        def wait(call):
            time.sleep(0.2)
        with realmap.boot(syscalls=[wait]) as kernel, kernel.connect() as me:
            try:
                print("ready", flush=True)
                while True:
                    me.call("wait")
            except KeyboardInterrupt:
                me.call("wait")  # the kernel is still there
                print("still there", kernel.stats()["processes"])
        """,
        start_new_session=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    os.killpg(child.pid, signal.SIGINT)
    out, err = child.communicate(timeout=BOUND)
    assert (out, err, child.returncode) == ("still there 1\n", "", 0)


def test_shutdown_with_a_handler_that_never_returns_is_bounded() -> None:
    @realmap.syscall
    def stuck(call: realmap.Call) -> None:
        while True:
            time.sleep(1)

    kernel = realmap.boot(syscalls=[stuck])
    with kernel.connect() as me:
        with pytest.raises(realmap.SyscallTimeout):
            me.call("stuck", timeout=0.05)
        start = time.monotonic()
        kernel.shutdown(timeout=0.5)
        assert time.monotonic() - start < BOUND
        with pytest.raises(KernelDied):
            me.call("stuck")
    runtime.sweep()


def test_users_are_told_of_a_shutdown_and_keep_their_memory() -> None:
    kernel = realmap.boot(syscalls=syscalls.ALL)
    me = kernel.connect()
    buffer = me.map(100)
    buffer[0:4] = b"kept"
    kernel.shutdown()
    kernel.shutdown()
    for use in (
        lambda: me.call("nop"),
        lambda: me.map(1),
        lambda: me.query(buffer.address),
        kernel.stats,
        kernel.connect,
    ):
        with pytest.raises(KernelDied):
            use()
    with pytest.raises(KernelDied):
        kernel.spawn(print)
    assert buffer[0:4] == b"kept"
    buffer.unmap()
    assert land_maps() == []
    me.close()


def test_the_ambient_kernel_is_one_for_the_process_tree(tmp_path: Path) -> None:
    out = run(
        tmp_path,
        """
        import os, subprocess, sys, realmap
        assert "REALMAP_KERNEL" not in os.environ
        with realmap.connect() as me, realmap.connect() as again:
            print(me.path == again.path == os.environ["REALMAP_KERNEL"])
            code = "import realmap; print(realmap.connect().path, end='')"
            print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == me.path)
        """,
    )
    assert out.splitlines() == ["True", "True"]
