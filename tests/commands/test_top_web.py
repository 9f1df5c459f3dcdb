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
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import click
import psutil
import pytest
from conftest import BOUND, PAGE, wait_until

import realmap
from realmap.cli.top.web import PAGES, _listen, command, may_ask
from realmap.observe.picture import lit

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def server(path: str, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`realmap top --web` as a real process, and its address."""
    child = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "realmap", "top", "--kernel", path, "--web", "--port", "0", *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # these tests may run under nohup
    )  # fmt: skip
    assert child.stdout is not None
    try:
        line = child.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, line + child.communicate(timeout=BOUND)[1]
        yield child, found[0]
    finally:
        child.kill()
        child.communicate()


@contextmanager
def served(path: str, *options: str, ends_by: int = signal.SIGTERM, said: str = "") -> Iterator[str]:
    """The same, which is ended in the end; its address."""
    with server(path, *options) as (child, url):
        yield url
        child.send_signal(ends_by)
        assert child.communicate(timeout=BOUND) == ("", said)
        assert child.returncode == 0


def fetch(url: str, path: str = "", key: str | None = None, **headers: str) -> tuple[int, dict[str, str], str]:
    """What comes of a path below the address that was printed. `key`: another than what is in there, or none ("")."""
    base, _, own = url.partition("?key=")
    url = base + path + (f"?key={own if key is None else key}" if key != "" else "")
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=BOUND) as answer:
            return answer.status, dict(answer.headers), answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read().decode()


def test_the_page_and_who_gets_it(kernel: realmap.KernelHandle) -> None:
    with served(kernel.path) as url:
        assert url.startswith("http://127.0.0.1:")
        status, headers, text = fetch(url)
        assert status == 200
        assert "realmap top" in text
        base = url.partition("?")[0]
        assert f'"{base}static/js/textual.js"' in text
        assert f'ws://{base[7:]}ws"' in text
        assert "default-src 'self'" in headers["Content-Security-Policy"]
        # From the first page on, the browser has the key as a cookie, which no script reads and no other page sends.
        cookie, *rules = headers["Set-Cookie"].split("; ")
        assert {"HttpOnly", "SameSite=Strict"} <= set(rules)
        assert fetch(url, "static/css/xterm.css", key="", Cookie=cookie)[0] == 200
        # Another user of this machine, who knows the port.
        for path in ("", "ws", "static/css/xterm.css", "download/x"):
            for key in ("", "x", "ä"):
                status, headers, text = fetch(url, path, key=quote(key), Cookie=cookie[:-1])
                assert (status, "Set-Cookie" in headers) == (403, False)
                assert "with its key" in text
        # Another page of the same browser, and one whose name was bent to this machine.
        assert fetch(url, "ws", Origin="http://elsewhere.example")[0] == 403
        assert fetch(url, Host="elsewhere.example")[0] == 403
        # Through a tunnel, it is called by another port.
        assert "ws://localhost:9999/ws" in fetch(url, Host="localhost:9999")[2]


@pytest.mark.slow
def test_other_machines_are_warned_of(kernel: realmap.KernelHandle) -> None:
    said = "other machines reach it, too; what they are sent is not encrypted\n"
    with served(kernel.path, "--host", "0.0.0.0", said=said) as url:
        assert fetch(url, Host="box.example:1")[0] == 200
        assert fetch(url, key="", Host="box.example:1")[0] == 403


async def open_pages(url: str, count: int, then: Callable[[], None]) -> int:
    """Opens so many pages' sockets; what the one beyond them gets, as a status. `then`: while they are open."""
    address = url.replace("?", "ws?").replace("http:", "ws:")
    async with aiohttp.ClientSession() as session:
        pages = [await session.ws_connect(address) for _ in range(count)]
        for page in pages:
            await page.receive(BOUND)
        try:
            await session.ws_connect(address)
            status = 101
        except aiohttp.WSServerHandshakeError as error:
            status = error.status
        then()
        for page in pages:
            with suppress(ConnectionError):
                await page.close()
    return status


@pytest.mark.slow
def test_a_control_c_that_all_of_them_get(kernel: realmap.KernelHandle) -> None:
    """As in a terminal: the server ends the pages, one of which has hardly begun."""
    with server(kernel.path) as (child, url):

        async def interrupted() -> None:
            async with aiohttp.ClientSession() as session:
                shown, begun = [await session.ws_connect(url.replace("?", "ws?")) for _ in range(2)]
                await shown.receive(BOUND)
                os.killpg(child.pid, signal.SIGINT)
                for page in (shown, begun):
                    while not page.closed:
                        await page.receive(BOUND)

        asyncio.run(interrupted())
        assert child.communicate(timeout=BOUND) == ("", "")
        assert child.returncode == 0


@pytest.mark.slow
def test_a_page_that_nobody_has_clicked_into_shows_the_keys(kernel: realmap.KernelHandle) -> None:
    async def shows(words: bytes) -> None:
        async with aiohttp.ClientSession() as session:
            page = await session.ws_connect(url.replace("?", "ws?"))
            async with asyncio.timeout(BOUND):
                while words not in (await page.receive()).data:
                    pass
            await page.close()

    with served(kernel.path) as url:
        asyncio.run(shows(b"Quit"))


@pytest.mark.slow
def test_so_many_pages(kernel: realmap.KernelHandle) -> None:
    with served(kernel.path, ends_by=signal.SIGHUP) as url:
        assert asyncio.run(open_pages(url, PAGES, lambda: None)) == 503
        assert fetch(url)[0] == 200


@pytest.mark.slow
def test_pages_end_with_a_server_that_is_killed(kernel: realmap.KernelHandle) -> None:
    ours: list[psutil.Process] = []
    with server(kernel.path) as (child, url):

        def kill() -> None:
            ours.extend(psutil.Process(child.pid).children(recursive=True))
            child.kill()
            child.wait()

        assert asyncio.run(open_pages(url, 1, kill)) == 101
    assert ours
    wait_until(lambda: not any(each.is_running() for each in ours), "the end of the page's process")


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
        ["sh", "-c", command(["--kernel", odd]).replace(sys.executable, "printf '%s\\n'", 1)],
        capture_output=True,
        text=True,
    )
    assert echoed.stdout.splitlines()[5] == odd
    assert echoed.stdout.startswith("-P\n")  # what lies in the directory it is started in is not run


def test_another_port_is_advised_where_that_helps() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(click.ClickException, match=r"Address already in use; try --port 0$"):
            _listen(*taken.getsockname())
    with pytest.raises(click.ClickException, match=r"Cannot assign requested address$"):
        _listen("192.0.2.1", 0)  # no machine's own


@pytest.mark.slow
def test_a_port_that_is_taken(kernel: realmap.KernelHandle) -> None:
    with served(kernel.path) as url:
        port = url.partition("/?")[0].rsplit(":")[-1]
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
            base = url.partition("?")[0]
            assert [asked for asked in browser.asked.values() if not asked.startswith((base, "data:"))] == []
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


def test_every_address_of_ipv6_is_every_one_of_ipv4_too() -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("there is no IPv6 here")
    with _listen("::", 0) as listening:
        socket.create_connection(("127.0.0.1", listening.getsockname()[1]), BOUND).close()
