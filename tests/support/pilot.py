"""The live view on a screen of Textual's pilot; and a kernel for it that has something to show: a fixture, for who
imports it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from conftest import BOUND, PAGE, wait_until

import realmap
from realmap.cli.top.app import Top

Steps = Callable[[Top, Any], Awaitable[None]]


def screen_text(app: Top) -> str:
    """What is on the screen, as lines."""
    return "\n".join(strip.text for strip in app.screen._compositor.render_strips())


def papers(app: Top) -> set[str]:
    """The background colours on the screen."""
    found = set()
    for strip in app.screen._compositor.render_strips():
        for segment in strip:
            if segment.style is not None and segment.style.bgcolor is not None:
                found.add(segment.style.bgcolor.get_truecolor().hex)
    return found


async def until(pilot: Any, holds: Callable[[], object], what: str) -> None:
    """Waits for something to be so on the screen."""
    end = time.monotonic() + BOUND
    while not holds():
        assert time.monotonic() < end, f"{what} did not happen:\n{screen_text(pilot.app)}"
        await pilot.pause(0.02)


def drive(path: str, steps: Steps, size: tuple[int, int] = (80, 24), interval: float = 0.1) -> None:
    """Runs the app on a screen of that size, and `steps` once it has shown something."""

    async def run() -> None:
        app = Top(path, interval, others=not path)
        async with app.run_test(size=size) as pilot:
            await until(pilot, lambda: app.view is not None or not path, "the first view")
            await pilot.pause()
            await steps(app, pilot)

    asyncio.run(run())


def busy(me: realmap.Process, buffers: int) -> None:
    """A user that maps, has its buffers mirrored, and goes on until it is killed."""
    kinds = (realmap.MemoryType.HEAP, realmap.MemoryType.SHARED_MEMORY)
    mine = [me.map(PAGE * (1 + at * 7 % 40), type=kinds[at % 2]) for at in range(buffers)]
    while True:
        for buffer in mine:
            me.call("sha256", buffer)
            time.sleep(0.002)  # there are other tests on this machine


@pytest.fixture
def loaded(kernel: realmap.KernelHandle) -> Iterator[realmap.KernelHandle]:
    """A kernel with two users at work, beside who is there already."""
    before = kernel.stats()["processes"]
    users = [kernel.spawn(busy, count) for count in (3, 8)]
    wait_until(lambda: kernel.stats()["mappings"] == 11, "the users' mappings")
    yield kernel
    for user in users:
        user.kill()
        user.join(BOUND)
    wait_until(lambda: kernel.stats()["processes"] == before, "the end of the users")
