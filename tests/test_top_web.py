"""The live view in a browser: what the server gives to whom, and the page in a real one."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from conftest import BOUND, PAGE, wait_until

import realmap
from realmap.cli.top.web import command, may_ask
from realmap.observe.picture import lit

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def served(path: str, *options: str) -> Iterator[str]:
    """`realmap top --web` as a real process; its address."""
    child = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "realmap", "top", "--kernel", path, "--web", "--port", "0", *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    try:
        line = child.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, line + child.communicate(timeout=BOUND)[1]
        yield found[0]
        child.send_signal(signal.SIGTERM)
        out, said = child.communicate(timeout=BOUND)
        assert (child.returncode, out) == (0, "")
        assert said.startswith("every user of this machine who knows the port")
    finally:
        child.kill()
        child.communicate()


def fetch(url: str, **headers: str) -> tuple[int, dict[str, str], str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=BOUND) as answer:
            return answer.status, dict(answer.headers), answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, {}, ""


def test_the_page_and_who_gets_it(kernel: realmap.KernelHandle) -> None:
    with served(kernel.path) as url:
        assert url.startswith("http://127.0.0.1:")
        status, headers, text = fetch(url)
        assert status == 200
        assert "realmap top" in text
        assert f'"{url}static/js/textual.js"' in text
        assert f"ws://{url[7:]}ws" in text
        assert "default-src 'self'" in headers["Content-Security-Policy"]
        assert fetch(f"{url}static/css/xterm.css")[0] == 200
        # Another page of the same browser, and one whose name was bent to this machine.
        assert fetch(f"{url}ws", Origin="http://elsewhere.example")[0] == 403
        assert fetch(url, Host="elsewhere.example")[0] == 403
        # Through a tunnel, it is called by another port.
        assert "ws://localhost:9999/ws" in fetch(url, Host="localhost:9999")[2]


@pytest.mark.parametrize(
    ("host", "origin", "everybody", "may"),
    [
        ("127.0.0.1:8765", None, False, True),
        ("localhost:1", "http://localhost:1", False, True),
        ("[::1]:8765", "http://[::1]:8765", False, True),
        ("localhost:1", "http://localhost:2", False, False),
        ("localhost:1", "null", False, False),
        ("box.example:1", "http://box.example:1", False, False),
        ("box.example:1", "http://box.example:1", True, True),
        ("box.example:1", "http://other.example", True, False),
        ("", None, False, False),
    ],
)
def test_who_may_ask(host: str, origin: str | None, everybody: bool, may: bool) -> None:
    assert may_ask(host, origin, everybody) is may


def test_the_command_is_quoted() -> None:
    odd = "/tmp/a b;$(touch x)'.sock"
    echoed = subprocess.run(
        ["sh", "-c", command(odd, 0.5).replace(sys.executable, "printf '%s\\n'", 1)], capture_output=True, text=True
    )
    assert echoed.stdout.splitlines()[5] == odd
    assert echoed.stdout.startswith("-P\n")  # what lies in the directory it is started in is not run


def test_a_port_that_is_taken(kernel: realmap.KernelHandle) -> None:
    with served(kernel.path) as url:
        port = url.rstrip("/").rsplit(":")[-1]
        done = subprocess.run(
            [sys.executable, "-m", "realmap", "top", "--kernel", kernel.path, "--web", "--port", port],
            capture_output=True, text=True, timeout=BOUND,
        )  # fmt: skip
        assert done.returncode == 1
        assert "try --port 0" in done.stderr
        assert "Traceback" not in done.stderr


# ---- in a real browser --------------------------------------------------------------------


class Browser:
    """Chromium's one page, through its DevTools."""

    def __init__(self, sock: aiohttp.ClientWebSocketResponse) -> None:
        self._sock = sock
        self._id = 0
        #: The addresses that the page asked for, by request, but for those that the browser stopped for its policy.
        self.asked: dict[str, str] = {}

    async def do(self, method: str, **params: Any) -> dict[str, Any]:
        """A command, and its answer; what the page asks for meanwhile is noted."""
        self._id += 1
        await self._sock.send_json({"id": self._id, "method": method, "params": params})
        while True:
            message = json.loads((await self._sock.receive(BOUND)).data)
            event, told = message.get("method"), message.get("params", {})
            if event == "Network.requestWillBeSent":
                self.asked[told["requestId"]] = told["request"]["url"]
            if event == "Network.loadingFailed" and told.get("blockedReason") == "csp":
                del self.asked[told["requestId"]]
            if message.get("id") == self._id:
                return dict(message.get("result", {}))

    async def until(self, script: str) -> None:
        """Waits until it is true in the page."""
        for _ in range(int(BOUND / 0.1)):
            found = await self.do("Runtime.evaluate", expression=script)
            if found["result"].get("value"):
                return
            await asyncio.sleep(0.1)
        raise AssertionError(f"{script} did not come true")

    async def colours(self) -> set[str]:
        """Those on a screenshot of it."""
        from matplotlib import image

        data = (await self.do("Page.captureScreenshot", format="png"))["data"]
        pixels = image.imread(io.BytesIO(base64.b64decode(data)))[:, :, :3]
        seen = {tuple(round(float(part) * 255) for part in each) for each in set(map(tuple, pixels.reshape(-1, 3)))}
        return {"#" + bytes(each).hex() for each in seen}

    async def press(self, key: str) -> None:
        """Down and up."""
        await self.do("Input.dispatchKeyEvent", type="keyDown", key=key, text=key)
        await self.do("Input.dispatchKeyEvent", type="keyUp", key=key)


async def watch(url: str, debugger: str) -> None:
    async with aiohttp.ClientSession() as session:
        async with session.get(debugger.replace("ws://", "http://").split("/devtools")[0] + "/json") as answer:
            pages = [page for page in await answer.json() if page["type"] == "page"]
        async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=1 << 26) as sock:
            browser = Browser(sock)
            await browser.do("Network.enable")
            await browser.do("Page.enable")
            await browser.do("Page.navigate", url=url)
            await browser.until("document.body && document.body.classList.contains('-first-byte')")
            for _ in range(100):
                if lit(1) in await browser.colours():
                    break
                await asyncio.sleep(0.1)
            assert lit(1) in await browser.colours()  # the mirror is lit
            assert [asked for asked in browser.asked.values() if not asked.startswith((url, "data:"))] == []
            await browser.do("Runtime.evaluate", expression="document.querySelector('textarea').focus()")
            await browser.press("q")
            await browser.until("document.body.classList.contains('-closed')")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_in_a_real_browser(kernel: realmap.KernelHandle, me: realmap.Process, tmp_path: Path) -> None:
    with served(kernel.path) as url, me.map(16 * PAGE) as buffer:
        me.call("keep", "web", buffer.slice(PAGE, 4 * PAGE))
        errors = tmp_path / "chromium"
        with open(errors, "wb") as said:
            browser = subprocess.Popen(
                [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,600",
                 "--remote-debugging-port=0", f"--user-data-dir={tmp_path / 'profile'}", "about:blank"],
                stderr=said, stdout=said, start_new_session=True,
            )  # fmt: skip
        try:
            found: list[str] = []
            wait_until(lambda: found.extend(re.findall(r"ws://\S+", errors.read_text())) or found, "the browser")
            asyncio.run(watch(url, found[0]))
        finally:
            os.killpg(browser.pid, signal.SIGKILL)
            browser.wait()
        me.call("read_kept", "web")
