"""`realmap` in this very process, its output as into a pipe: an interpreter of its own takes 0.2 s longer each time."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from realmap.cli import main


def command_line(*words: object, says: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """What it wrote, and its exit status. `says`: what is typed. Not for what takes signals or starts processes."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="") for _ in range(2))
    command = ["realmap", *map(str, words)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", command)
        patched.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(says.encode()), "utf-8"))
        patched.setattr(sys, "stdout", out)
        patched.setattr(sys, "stderr", err)
        for name, value in environment.items():
            patched.setenv(name, value)
        try:
            main()
            status = 0
        except SystemExit as end:
            assert end.code is None or isinstance(end.code, int)
            status = end.code or 0
    said = []
    for stream in (out, err):
        stream.flush()
        said.append(stream.buffer.getvalue().decode(errors="surrogateescape"))  # type: ignore[attr-defined]
    return subprocess.CompletedProcess(command, status, *said)
