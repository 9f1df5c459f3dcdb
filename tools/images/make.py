"""The README's pictures, each from a real run on this machine: tools/pictures [NAME ...] (demo, top, lands, access).

They go beside this file, or into the directory $REALMAP_PICTURES.

demo    what `realmap demo` says on a terminal
top     `realmap top`, over processes at work
lands   `realmap snapshot --svg` of the same
access  the crossover curves of `realmap bench --quick access --plot`
"""

from __future__ import annotations

import asyncio
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

import realmap
from realmap.cli.demo import OPENING, render
from realmap.cli.top.app import Top
from realmap.lab import demo as lab
from realmap.observe.svg import svg
from realmap.observe.tables import programs

INTO = Path(os.environ.get("REALMAP_PICTURES", Path(__file__).parent))
#: Of a path that is short enough to be read in a picture.
PATH = "demo.sock"
SIZE = (92, 22)
#: Bytes of each buffer: what six processes have.
SIZES = [
    [4096, 300_000, 12_288],
    [1 << 20, 8192],
    [65_536, 65_536, 20_480, 4096, 2 << 20],
    [4096],
    [16 << 20, 100_000],
    [40_960, 4096, 4096, 700_000],
]


def demo() -> None:
    """The whole story, in colours."""
    with lab.boot() as kernel:
        story = lab.run(kernel, lab.plan(lab.default_files()))
    console = Console(
        record=True, width=92, file=io.StringIO(), force_terminal=True, color_system="truecolor", highlight=False
    )
    console.print(Text("$ realmap demo", style="bold"))
    console.print(OPENING)
    render(console, story)
    write("demo", console.export_svg(title="realmap demo", unique_id="demo"))


@realmap.syscall(blocking=True)
def look(call: realmap.Call, data: realmap.UserBuffer, seconds: float) -> int:
    """Keeps a mirror for a while."""
    with data.mirror(realmap.k_r) as mirror:
        time.sleep(seconds)
        return len(mirror)


def user(me: realmap.Process, number: int) -> None:
    """Has parts of its buffers looked at, one after the other."""
    kinds = (realmap.MemoryType.HEAP, realmap.MemoryType.SHARED_MEMORY, realmap.MemoryType.IPC)
    mine = [me.map(length, type=kinds[at % 3]) for at, length in enumerate(SIZES[number])]
    while True:
        for at, buffer in enumerate(mine):
            start = len(buffer) // (3 + (at + number) % 4) if len(buffer) > 50_000 else 0
            me.call("look", buffer.slice(start, max(1, len(buffer) // (2 + at % 2)) - 1), 0.4 + 0.1 * number)


def top_and_lands() -> dict[str, str]:
    """Both of the same kernel."""
    with tempfile.TemporaryDirectory() as folder:
        with realmap.boot(syscalls=[look], lazy_unmap=1 << 19, path=f"{folder}/{PATH}") as kernel:
            for number in range(len(SIZES)):
                kernel.spawn(user, number)
            wanted = sum(map(len, SIZES))
            while kernel.stats()["mappings"] < wanted or len(kernel.snapshot().mirrors) < 5:
                time.sleep(0.05)
            time.sleep(3)
            screen = asyncio.run(screenshot(kernel.path))
            taken = kernel.snapshot()
            drawing = svg(taken, programs=programs(taken))
        return {name: text.replace(folder, "/tmp") for name, text in (("top", screen), ("lands", drawing))}


async def screenshot(path: str) -> str:
    """`realmap top` on a screen of SIZE, when it has seen some seconds."""
    app = Top(path, 0.5)
    async with app.run_test(size=SIZE) as pilot:
        while app.shown < 16 or app.view is None or len(app.view.snapshot.mirrors) < 5:
            await pilot.pause(0.1)
        await pilot.press("down")
        return app.export_screenshot(title="realmap top")


def access() -> None:
    """The crossover."""
    target = INTO / "access.svg"
    command = [sys.executable, "-m", "realmap", "bench", "--quick", "access", "--plot", str(target)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    write("access", target.read_text())


def write(name: str, text: str) -> None:
    """A picture that loads nothing from elsewhere: the fonts are those of whoever looks at it."""
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.S)
    text = re.sub(r"@font-face \{.*?\}\s*", "", text, flags=re.S)
    text = text.replace("font-family: Fira Code, monospace", "font-family: 'Fira Code', 'DejaVu Sans Mono', monospace")
    text = "\n".join(line.rstrip() for line in text.strip().splitlines()) + "\n"
    target = INTO / f"{name}.svg"
    target.write_text(text)
    print(f"{target}: {len(text)} bytes")


def main(names: list[str]) -> None:
    """The named ones, or all of them."""
    known = ("demo", "top", "lands", "access")
    unknown = set(names) - set(known)
    if unknown:
        sys.exit(f"no such picture: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    wanted: Any = names or known
    if "demo" in wanted:
        demo()
    if {"top", "lands"} & set(wanted):
        for name, text in top_and_lands().items():
            write(name, text)
    if "access" in wanted:
        access()


main(sys.argv[1:])
