"""The example notebook, executed as Jupyter does it; and how things show themselves, alive, closed, dead and forked."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
from conftest import BOUND, PAGE, ROOT, wait_until
from forked import said_in_a_child

import realmap
from realmap import KernelHandle, Process
from realmap.wire.status import look

EXECUTE = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], 4)
nbclient.NotebookClient(notebook, timeout=60).execute()
nbformat.write(notebook, sys.argv[2])
"""
NOTEBOOK = ROOT / "tools" / "examples" / "notebook.ipynb"


def test_the_example_notebook(tmp_path: Path) -> None:
    folders = {name: str(tmp_path / name) for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")}
    done = subprocess.run(
        [sys.executable, "-c", EXECUTE, str(NOTEBOOK), str(tmp_path / "executed.ipynb")],
        capture_output=True, text=True, timeout=2 * BOUND, env=os.environ | folders,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    cells = json.loads((tmp_path / "executed.ipynb").read_text())["cells"]
    shown = [output["data"] for cell in cells for output in cell.get("outputs", ())]
    buffer, digest, kernel, process, took, ended = shown
    assert "68 65 6c 6c 6f" in "".join(buffer["text/html"])
    assert "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824" in digest["text/plain"][0]
    assert "mirror 1: " in "".join(kernel["image/svg+xml"])
    assert "<td>0x200000000000</td>" in "".join(process["text/html"])
    half, most, longest = json.loads("".join(took["text/plain"]))
    assert 0 < half <= most <= longest
    assert list(ended) == ["text/plain"]
    assert not any(cell.get("outputs") for cell in json.loads(NOTEBOOK.read_text())["cells"])  # it is kept without


def test_a_snapshot_shows_itself(kernel: KernelHandle, me: Process) -> None:
    with me.map(3 * PAGE) as buffer:
        me.call("keep", "shown", buffer)
        taken = kernel.snapshot()
        me.call("read_kept", "shown")
    assert repr(taken) == f"<Snapshot of kernel {kernel.pid} at {kernel.path!r}: 1 process, 1 mapping, 1 mirror>"
    drawn = ElementTree.fromstring(taken._repr_svg_())
    assert f"kernel {kernel.pid}" in "".join(drawn.itertext())
    # In a page with other drawings it changes none of them.
    rules = re.sub(r"@media[^{]*{|}$", "", "".join(each.text or "" for each in drawn if each.tag.endswith("style")))
    assert all(rule.strip().startswith(".realmap ") for rule in re.findall(r"([^{}]+){", rules))
    assert not [each for each in drawn.iter() if "id" in each.attrib]
    evil = msgspec.structs.replace(taken, path="/tmp/<script>\x1b[31m&")
    assert "<script>" not in evil._repr_svg_()
    assert "\x1b" not in evil._repr_svg_() + repr(evil)


def test_a_kernel_shows_itself_while_it_can() -> None:
    with realmap.boot() as kernel:
        with kernel.connect() as me, me.map(PAGE):
            assert f"kernel {kernel.pid}" in str(kernel._repr_svg_())
            assert said_in_a_child(lambda: str(kernel._repr_svg_())) == "None"
        os.kill(kernel.pid, signal.SIGSTOP)
        wait_until(lambda: (at := look(kernel.path)) is not None and at.is_stuck, "that it is stopped")
        assert kernel._repr_svg_() is None
        os.kill(kernel.pid, signal.SIGCONT)
        wait_until(kernel._repr_svg_, "that it goes on")
        os.kill(kernel.pid, signal.SIGKILL)
        wait_until(lambda: kernel.has_ended, "its end")
        assert kernel._repr_svg_() is None
        assert "ended" in repr(kernel)


def test_a_process_shows_its_mappings() -> None:
    with realmap.boot() as kernel, kernel.connect() as me:
        assert "table" not in me._repr_html_()
        buffers = [me.map(PAGE) for _ in range(25)]
        buffers.append(me.map(2 * PAGE))
        text = me._repr_html_()
        assert f"<p>&lt;Process 1 (pid {me.pid}) of the kernel at " in text
        assert f"<td>{buffers[0].address:#x}</td><td>{PAGE:,}</td><td>u_rw</td>" in text
        assert text.count("<tr>") == 22
        assert "and 6 more" in text
        said = said_in_a_child(lambda: f"{me._repr_html_()} {me._client.lost_in_child}")
        assert "inherited by a fork" in said and said.endswith("True")
        assert kernel.stats()["processes"] == 1  # nobody connects to be shown
        os.kill(kernel.pid, signal.SIGKILL)
        assert "<table>" in me._repr_html_()  # it has them still
        me.close()
        assert ", ended&gt;" in me._repr_html_()
        assert "table" not in me._repr_html_()


def test_a_buffer_shows_its_first_bytes() -> None:
    with realmap.boot() as kernel, kernel.connect() as me:
        buffer = me.map(3333)
        buffer[5:13] = b"<b>&\xff\x00\x1b'"
        text = buffer._repr_html_()
        assert f"&lt;Buffer {buffer.address:#x}, 3333 bytes, u_rw&gt;" in text
        assert "00 3c 62 3e 26 ff 00 1b 27 00" in text
        assert ".&lt;b&gt;&amp;...&#x27;." in text
        assert "… and 3,205 bytes more" in text
        assert "more" not in buffer.slice(5, 8)._repr_html_()
        assert said_in_a_child(lambda: f"{buffer._repr_html_()} {me._client.lost_in_child}") == f"{text} True"
        os.kill(kernel.pid, signal.SIGKILL)
        assert buffer._repr_html_() == text
        buffer.unmap()
        assert buffer._repr_html_().endswith("<p>it is unmapped: its bytes are no longer there</p>")


@pytest.mark.parametrize("whole", [True, False])
def test_a_buffer_whose_bytes_are_gone(whole: bool) -> None:
    with realmap.boot() as kernel, kernel.connect() as me:
        name = f"realmap-shown-{os.getpid()}"
        with me.map(2 * PAGE, name=name) as buffer:
            os.truncate(f"/dev/shm/{name}", 0 if whole else PAGE)
            text = buffer._repr_html_()
            assert ("are gone" in text or "MemoryFault" in text or "truncated" in text) == whole
