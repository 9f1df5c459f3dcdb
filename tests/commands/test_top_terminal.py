"""The live view as a real process, in a pseudo-terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import BOUND, PAGE, ROOT, wait_until
from pilot import loaded

import realmap

#: Screens take their time; CI runs them with the other long ones.
pytestmark = pytest.mark.slow
__all__ = ["loaded"]


class Terminal:
    """A command in a pseudo-terminal."""

    def __init__(self, *arguments: str, size: tuple[int, int] = (80, 24), **variables: str) -> None:
        self._leader, follower = pty.openpty()
        self._over = False
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
        self.child = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "realmap", *arguments],
            stdin=follower,
            stdout=follower,
            stderr=follower,  # that is where Textual writes
            env={**os.environ, "TERM": "xterm-256color", **variables},
            start_new_session=True,
        )
        os.close(follower)
        self.out = b""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        with suppress(OSError):  # the other end has gone
            while not self._over:
                if select.select([self._leader], [], [], 0.05)[0]:
                    self.out += os.read(self._leader, 65536)
        os.close(self._leader)

    def hang_up(self) -> None:
        """Nobody has the terminal any more."""
        self._over = True
        self._reader.join(BOUND)

    def press(self, keys: str) -> None:
        os.write(self._leader, keys.encode())

    def wait(self) -> int:
        """Its exit status."""
        try:
            return self.child.wait(BOUND)
        finally:
            self.child.kill()  # nothing, where it has ended
            self.child.wait()
            self.hang_up()
            assert b"Traceback" not in self.out


@pytest.mark.parametrize("size", [(80, 24), (20, 10)])
def test_a_real_terminal(loaded: realmap.KernelHandle, size: tuple[int, int]) -> None:
    terminal = Terminal("top", "--kernel", loaded.path, "--interval", "0.1", size=size)
    wait_until(lambda: b"UserLand" in terminal.out or terminal.child.poll() is not None, "the screen")
    pids = [str(process.pid).encode() for process in loaded.snapshot().processes]
    wait_until(lambda: all(pid in terminal.out for pid in pids), "the processes")
    terminal.press("q")
    assert terminal.wait() == 0
    assert terminal.out.index(b"\x1b[?1049h") < terminal.out.index(b"\x1b[?1049l")  # the screen is given back


def test_it_ends_with_its_terminal_and_on_sigterm(kernel: realmap.KernelHandle) -> None:
    """Without a controlling terminal no signal tells of the end of one; and reading goes on to find nothing."""
    terminal = Terminal("top", "--kernel", kernel.path)
    wait_until(lambda: b"UserLand" in terminal.out, "the screen")
    terminal.child.terminate()
    assert terminal.wait() == 0
    assert b"\x1b[?1049l" in terminal.out
    terminal = Terminal("top", "--kernel", kernel.path)
    wait_until(lambda: b"UserLand" in terminal.out, "the screen")
    terminal.hang_up()
    terminal.child.wait(BOUND)
    terminal.wait()


def test_it_waits_for_a_kernel(tmp_path: Path) -> None:
    terminal = Terminal("top", "--wait", REALMAP_DIR=str(tmp_path))
    wait_until(lambda: b"NO KERNEL" in terminal.out, "that there is none")
    with realmap.boot(path=tmp_path / "x.sock") as kernel:
        wait_until(lambda: f"kernel {kernel.pid}".encode() in terminal.out, "the kernel")
        terminal.press("q")
        assert terminal.wait() == 0


def test_no_colour(loaded: realmap.KernelHandle) -> None:
    terminal = Terminal("top", "--kernel", loaded.path, NO_COLOR="1", COLORTERM="truecolor")
    wait_until(lambda: b"UserLand" in terminal.out, "the screen")
    terminal.press("q")
    assert terminal.wait() == 0
    colours = re.findall(rb"[34]8;2;(\d+);(\d+);(\d+)", terminal.out)
    assert all(red == green == blue for red, green, blue in colours)


def test_without_a_terminal_or_a_kernel(kernel: realmap.KernelHandle, tmp_path: Path) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", "realmap", "top", *arguments],
            capture_output=True, text=True, timeout=BOUND,
        )  # fmt: skip
        assert "Traceback" not in done.stderr
        return done.returncode, done.stderr

    status, said = run("--kernel", kernel.path)
    assert status == 1
    assert "realmap ps" in said
    assert said.count("\n") == 1
    assert run("--interval", "0")[0] == 2
    assert run("--port", "0")[0] == 2
    terminal = Terminal("top", "--kernel", str(tmp_path / "none"))
    assert terminal.wait() == 1
    assert b"no kernel" in terminal.out
    assert b"\x1b[?1049h" not in terminal.out


@pytest.mark.parametrize("leave", [False, True])
def test_the_demo_under_it(tmp_path: Path, leave: bool) -> None:
    """It ends with the demo, and then the report is on the terminal; or the demo with it."""
    file = tmp_path / "file"
    file.write_bytes(bytes(3 * PAGE))
    terminal = Terminal("demo", "--top", "--pace", "1000" if leave else "0.05", str(file), size=(120, 30))
    wait_until(lambda: b"UserLand" in terminal.out or terminal.child.poll() is not None, "the screen")
    if leave:
        wait_until(lambda: b"1 lit" in terminal.out, "the first mirror")
        terminal.press("q")
    assert terminal.wait() == (1 if leave else 0)
    report = terminal.out.split(b"\x1b[?1049l")[1]
    assert (b"there is no report" if leave else b"left in the end") in report
    assert b"WRONG" not in report


def test_textual_is_imported_only_where_it_is_needed(tmp_path: Path) -> None:
    """It is an extra: everything else works without it, and top says what to install."""
    hidden = "import sys; sys.modules['textual'] = None\nfrom realmap.cli import main\n"
    environment = {**os.environ, "TEXTUAL_DRIVER": "none"}  # as in a browser: no terminal is asked for
    for arguments, status, word in (
        (["--help"], 0, "top"),
        (["top", "--kernel", "x"], 1, "pip install 'realmap[top]'"),
    ):
        code = f"{hidden}sys.argv[1:] = {arguments!r}\nmain()"
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=environment, timeout=BOUND
        )
        assert done.returncode == status
        assert word in done.stdout + done.stderr
        assert len(done.stderr.splitlines()) <= 1


@pytest.mark.parametrize("tool", ["top_fluid", "snapshot_pause"])
def test_what_measures_it_runs(tool: str) -> None:
    file = ROOT / "tools" / f"{tool}.py"
    done = subprocess.run([sys.executable, str(file), "20", "2", "2"], capture_output=True, text=True, timeout=BOUND)
    assert (done.returncode, done.stderr) == (0, "")
    assert "20 mappings of  2 processes" in done.stdout.replace("of 2", "of  2")
