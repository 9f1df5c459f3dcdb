"""Where a process of ours starts: which Python, in which surroundings, and what its handlers may start themselves."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from conftest import BOUND, ROOT, long, wait_until

import realmap
from realmap.host import runtime

BOOTS = """
    import realmap
    with realmap.boot() as kernel, kernel.connect() as me:
        print(bytes(me.map(100)[:1]))
"""


def run(text: str, *before: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [*before, sys.executable, "-W", "error", "-c", textwrap.dedent(text)]
    return subprocess.run(command, capture_output=True, text=True, timeout=BOUND, **options)


def works(text: str, *before: str, **options: Any) -> None:
    done = run(text, *before, **options)
    assert (done.stdout, done.stderr) == ("b'\\x00'\n", "")


def test_a_small_program_is_quiet_in_development_mode() -> None:
    """Of a kernel that is collected in a cycle with its process as well: in whatever order that goes."""
    text = """
        import gc
        import realmap, realmap.memory
        from realmap.shared_memory import ShareableList, SharedMemory, SharedMemoryManager
        for _ in range(3):
            kernel = realmap.boot()
            me = kernel.connect()
            buffer = me.map(100)
            kernel.spawn(lambda me: me.map(10)).join()
            cycle = [kernel, me, buffer]
            cycle.append(cycle)
            del kernel, me, buffer, cycle
            gc.collect()
        block = SharedMemory(create=True, size=10)
        kept, left = realmap.boot(), realmap.connect()
    """
    command = [sys.executable, "-W", "error", "-X", "dev", "-c", textwrap.dedent(text)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BOUND)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- which Python --------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [long(""), None, "/bin/true", long("/nowhere/python")])
@pytest.mark.parametrize("when", ["before the import", "after it"])
def test_sys_executable_need_not_be_a_python(wrong: str | None, when: str) -> None:
    change = f"import sys; sys.executable = {wrong!r}\n"
    if wrong is None and run(change + "import multiprocessing.spawn").returncode:
        pytest.skip("this Python (3.11.2, say) cannot import its own multiprocessing there")
    works(
        change + textwrap.dedent(BOOTS)
        if when == "before the import"
        else "import realmap\n" + change + textwrap.dedent(BOOTS)
    )


def test_the_python_that_multiprocessing_was_told_is_taken(tmp_path: Path) -> None:
    told = tmp_path / "told"
    told.write_text(f'#!/bin/sh\necho told\nexec {sys.executable} "$@"\n')
    told.chmod(0o700)
    done = run(f"import multiprocessing\nmultiprocessing.set_executable({str(told)!r})" + textwrap.dedent(BOOTS))
    assert (done.stdout, done.stderr) == ("told\nb'\\x00'\n", "")


FROZEN = """
    import sys
    with open(sys.argv[1], "a") as file:
        file.write("started\\n")
    sys.frozen, sys.executable, sys.exec_prefix, sys.base_exec_prefix = True, {app!r}, "/nowhere", "/no"
    import realmap
    try:
        realmap.boot()
    except realmap.KernelError as error:
        print(error)
"""


def test_a_frozen_program_is_not_started_again(tmp_path: Path) -> None:
    app, count = tmp_path / "python-app", tmp_path / "count"
    code = textwrap.dedent(FROZEN.format(app=str(app)))
    (tmp_path / "app.py").write_text(code)
    app.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/app.py {count} "$@"\n')
    app.chmod(0o700)
    done = subprocess.run([app], capture_output=True, text=True, timeout=BOUND)
    assert count.read_text() == "started\n"
    assert str(app) in done.stdout and "multiprocessing.set_executable" in done.stdout, done.stderr


@pytest.mark.parametrize("told", ["/nowhere/python", "/bin/true", long("/dev/null")])
def test_what_does_not_start_is_named(told: str) -> None:
    done = run(f"import multiprocessing\nmultiprocessing.set_executable({told!r})" + textwrap.dedent(BOOTS))
    assert f"{told!r}" in done.stderr.splitlines()[-1]


# ---- in which surroundings -----------------------------------------------------------------------


# ---- programs that start theirs while they are imported, as a web server's workers do ------------------

HANDLER = """
    import realmap
    @realmap.syscall
    def first(call, data):
        return data.copy_in(1)
"""
FROM = """
    from {} import *
"""
AT_IMPORT = """
    kernel = realmap.boot(syscalls=[first])
    spawned = kernel.spawn(lambda me: me.call("first", me.map(100)))
    with open("count", "a") as file:
        file.write("imported\\n")
"""
USE = """
    from app import kernel, spawned
    with kernel.connect() as me:
        assert spawned.result() == me.call("first", me.map(100))
        print(bytes(me.map(100)[:1]))
"""


def _modules(place: Path, **texts: str) -> None:
    for name, text in texts.items():
        path = place / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))


@pytest.mark.parametrize("shape", ["one file", "a package"])
def test_a_module_may_start_a_kernel_while_it_is_imported(shape: str, tmp_path: Path) -> None:
    if shape == "one file":
        _modules(tmp_path, app=HANDLER + AT_IMPORT)
    else:
        _modules(tmp_path, **{"app.handlers": HANDLER, "app.__init__": FROM.format("app.handlers") + AT_IMPORT})
    works(USE, cwd=tmp_path)
    assert (tmp_path / "count").read_text() == "imported\n"


def test_a_kernel_that_has_to_import_what_starts_it_is_an_error_at_once(tmp_path: Path) -> None:
    _modules(tmp_path, app=FROM.format("handlers") + AT_IMPORT, handlers=HANDLER + "    import app\n")
    done = run("import app", cwd=tmp_path)
    assert "'first' is to run in a process that a module starts while it is imported" in done.stderr
    assert not (tmp_path / "count").exists()


def test_the_working_directory_may_be_gone(tmp_path: Path) -> None:
    here = tmp_path / "gone"
    here.mkdir()
    leave = f"import os\nos.rmdir({str(here)!r})\n"
    if run(leave + "import socket", cwd=here).returncode:
        pytest.skip("this Python (3.13.0, say) cannot import its own modules there")
    here.mkdir()
    works(leave + textwrap.dedent(BOOTS), cwd=here)


@pytest.mark.parametrize("umask", ["000", long("077"), long("177"), "777"])
def test_any_umask_will_do(umask: str, tmp_path: Path) -> None:
    """Without root's rights, to whom no mode matters."""
    program = f"""
        import os; os.umask(0o{umask})
        import realmap
        with realmap.connect() as me, me.map(100, name="umask.{os.getpid()}") as buffer:
            child = os.fork()
            if not child:
                os._exit(me.map(100)[0])
            assert os.waitpid(child, 0)[1] == 0
            print(bytes(buffer[:1]))
    """
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all"] if os.geteuid() == 0 else []
    works(program, *drop, env={**os.environ, runtime.VARIABLE: str(tmp_path / "run")})
    assert oct((tmp_path / "run").stat().st_mode & 0o777) == "0o700"


@pytest.mark.parametrize("gone", ["socket", "lock", "directory", "directory, by a rename"])
def test_a_kernel_makes_a_socket_anew_that_somebody_removes(
    gone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As cleaners of /tmp do, and systemd at a logout."""
    place = tmp_path / "run"
    monkeypatch.setenv(runtime.VARIABLE, str(place))
    with realmap.boot() as kernel, kernel.connect() as me:
        path, lock = Path(kernel.path), Path(kernel.path + ".lock")
        for number in range(2):
            if gone == "directory":
                shutil.rmtree(place)
            elif gone == "socket":
                path.unlink()
            elif gone == "lock":
                lock.unlink()
            else:
                place.rename(tmp_path / f"elsewhere-{number}")
            wait_until(lambda: path.exists() and lock.exists() and lock.stat().st_size)
            assert realmap.connect(path).map(100)[:1] == me.map(100)[:1]
            assert runtime.kernel_at(str(path))[0] == kernel.pid
            with pytest.raises(realmap.InvalidHandle, match="a kernel serves"):
                realmap.boot(path=path)
    assert list(place.iterdir()) == []


def test_a_kernel_goes_on_where_its_socket_cannot_be_made_anew(tmp_path: Path) -> None:
    place = tmp_path / "mine"
    place.mkdir()
    with realmap.boot(path=place / "sock") as kernel, kernel.connect() as me:
        assert kernel.stats()["processes"] == 1
        shutil.rmtree(place)
        with pytest.raises(realmap.KernelDied):
            realmap.connect(place / "sock")
        assert me.map(100)[:1] == b"\0" and kernel.stats()["processes"] == 1
    assert not place.exists()


def test_blocks_are_found_by_workers_after_the_directory_was_removed(tmp_path: Path) -> None:
    text = """
        import multiprocessing, os, shutil, time
        from realmap.shared_memory import SharedMemory
        def look(name, there):
            block = SharedMemory(name)
            there.send(bytes(block.buf[:3]))
        if __name__ == "__main__":
            block = SharedMemory(create=True, size=64)
            block.buf[:3] = b"abc"
            for method in "fork", "spawn":
                shutil.rmtree(os.environ["REALMAP_DIR"])
                # Who is not forked from somebody connected does not wait for a socket that is not there.
                while method == "spawn" and not os.path.exists(os.environ["REALMAP_TREE"]):
                    time.sleep(0.001)
                context = multiprocessing.get_context(method)
                here, there = context.Pipe()
                worker = context.Process(target=look, args=(block.name, there))
                worker.start()
                print(here.recv())
                worker.join()
            block.unlink()
    """
    bare = {name: value for name, value in os.environ.items() if not name.startswith("REALMAP")}
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(text))
    done = subprocess.run(
        [sys.executable, program],
        capture_output=True,
        text=True,
        timeout=BOUND,
        env=bare | {runtime.VARIABLE: str(tmp_path / "run")},
    )
    assert (done.stdout, done.stderr) == ("b'abc'\n" * 2, "")


def test_a_path_may_be_longer_than_a_socket_s(tmp_path: Path) -> None:
    place = tmp_path.joinpath(*["a-name-of-27-bytes-or-about"] * 20)
    place.mkdir(parents=True)
    with realmap.boot(path=place / "sock") as kernel, realmap.connect(place / "sock") as me:
        assert len(kernel.path) > 500 and kernel.audit()
        assert kernel.spawn(lambda me: bytes(me.map(100)[:1])).result() == me.map(100)[:1]
        with pytest.raises(realmap.InvalidHandle, match="a kernel serves"):
            realmap.boot(path=place / "sock")
    assert list(place.iterdir()) == []
    with pytest.raises(
        realmap.InvalidHandle, match=f"at most .* bytes, or else its name alone {runtime.LONGEST_NAME}; shorten"
    ):
        realmap.boot(path=place / ("x" * 100))
    with pytest.raises(realmap.KernelDied, match="no kernel listens"):
        realmap.connect(place / "sock")


def test_blocks_are_found_whatever_the_environment_says(tmp_path: Path) -> None:
    """As from a batch job, or a login: another TMPDIR, another XDG_RUNTIME_DIR, or none."""
    text = """
        import os, subprocess, sys
        from realmap.shared_memory import SharedMemory
        block = SharedMemory(create=True, size=64)
        block.buf[:3] = b"abc"
        code = f"from realmap.shared_memory import SharedMemory as S; s = S({block.name!r}); print(bytes(s.buf[:3]))"
        bare = {name: value for name, value in os.environ.items() if not name.startswith("REALMAP")}
        for more in {}, {"TMPDIR": sys.argv[1]}, {"XDG_RUNTIME_DIR": sys.argv[1]}:
            subprocess.run([sys.executable, "-c", code], env=bare | more)
        block.unlink()
    """
    bare = {name: value for name, value in os.environ.items() if not name.startswith("REALMAP")}
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(text))
    done = subprocess.run([sys.executable, program, tmp_path], capture_output=True, text=True, timeout=BOUND, env=bare)
    assert (done.stdout, done.stderr) == ("b'abc'\n" * 3, "")


def test_a_kernel_in_the_usual_place_has_clean_books() -> None:
    """Its lock lies on the file system of the segments, and is none."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith("REALMAP")}
    text = """
        import os, realmap
        with realmap.boot() as kernel, kernel.connect() as me:
            me.map(100)
            print(os.path.dirname(kernel.path), list(kernel.audit().differences))
    """
    done = run(text, env=bare)
    assert (done.stdout, done.stderr) == (f"/dev/shm/realmap-{os.geteuid()} []\n", "")


# ---- what handlers start -------------------------------------------------------------------------


@realmap.syscall(blocking=True)
def terminated(call: realmap.Call) -> int | None:
    import multiprocessing
    import time

    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(3600,))
    child.start()
    child.terminate()
    child.join()
    return child.exitcode


@realmap.syscall(blocking=True)
def pooled(call: realmap.Call) -> list[int]:
    import multiprocessing

    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(abs, range(-5, 0))


@realmap.syscall(blocking=True)
def left(call: realmap.Call) -> list[int]:
    """Processes that nobody ends: of a pool, by multiprocessing, by subprocess."""
    import multiprocessing
    import subprocess
    import time

    fork = multiprocessing.get_context("fork")
    kept = fork.Pool(1), fork.Process(target=time.sleep, args=(3600,)), subprocess.Popen(["sleep", "3600"])
    kept[1].start()
    call.kernel.kept = kept  # type: ignore[attr-defined]
    return [child.pid for child in multiprocessing.active_children() if child.pid] + [kept[2].pid]


HANDLERS = [terminated, pooled, left]


def test_a_handler_may_fork_as_any_program() -> None:
    with realmap.boot(syscalls=HANDLERS) as kernel, kernel.connect() as me:
        assert me.call("terminated", timeout=BOUND) == -signal.SIGTERM
        assert me.call("pooled", timeout=BOUND) == [5, 4, 3, 2, 1]
        kernel.shutdown()


def test_what_handlers_have_started_ends_with_a_kernel_that_is_killed() -> None:
    kernel = realmap.boot(syscalls=HANDLERS)
    with kernel.connect() as me:
        pids = me.call("left", timeout=BOUND)
    assert len(pids) == 3
    kernel.shutdown(timeout=0.1)
    wait_until(lambda: not any(lives(pid) for pid in pids), "the end of all of them")


def test_what_handlers_have_started_ends_with_a_booter_that_is_killed() -> None:
    reader, writer = os.pipe()
    booter = os.fork()
    if not booter:
        try:
            kernel = realmap.boot(syscalls=HANDLERS)
            with kernel.connect() as me:
                os.write(writer, repr(me.call("left", timeout=BOUND)).encode())
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(booter, 0)
    os.close(writer)
    pids = [int(pid) for pid in os.read(reader, 1000).decode().strip("[]").split(",")]
    os.close(reader)
    assert len(pids) == 3
    wait_until(lambda: not any(lives(pid) for pid in pids), "the end of all of them")


def lives(pid: int) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


# ---- a checkout ----------------------------------------------------------------------------------


def copied(to: Path) -> Path:
    """A checkout as it is when cloned."""
    ignored = ".git", ".venv*", "*.so", "*.egg-info", "build", "dist", ".*_cache", "__pycache__", ".hypothesis"
    shutil.copytree(ROOT, to, ignore=shutil.ignore_patterns(*ignored))
    return to


def test_an_import_from_a_checkout_that_was_not_built_says_what_to_do(tmp_path: Path) -> None:
    made = copied(tmp_path / "checkout")
    done = run("import realmap", cwd=made)
    said = done.stderr.splitlines()[-1]
    assert said.startswith(f"ImportError: realmap is not built in {made}: ") and f"pip install -e {made}" in said
    assert done.stderr.count("Traceback") == 1


@pytest.mark.slow
def test_the_demo_of_a_fresh_checkout_installs_little_and_says_what_it_does(tmp_path: Path) -> None:
    made = copied(tmp_path / "checkout")
    first = subprocess.run([made / "tools" / "demo"], capture_output=True, text=True, timeout=10 * BOUND)
    assert first.returncode == 0, first.stderr
    steps = [line for line in first.stderr.splitlines() if line.startswith("tools/setup: ")]
    assert [step.split()[1] for step in steps] == ["making", "building", "done"]
    megabytes = sum(path.lstat().st_blocks for path in (made / ".venv").rglob("*")) * 512 >> 20
    assert megabytes < 60
    again = subprocess.run([made / "tools" / "demo"], capture_output=True, text=True, timeout=BOUND)
    assert (again.returncode, again.stderr) == (0, "")
