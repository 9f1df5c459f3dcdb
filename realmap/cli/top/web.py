"""The live view in a browser: textual-serve runs `realmap top` for each page that is open.

Its page asks a font service for a font, and its socket is open to whatever page the browser shows besides; neither
is wanted for something that shows memory on this machine. So the page comes with a policy that lets it load nothing
from elsewhere (it has the font itself); only a page of ours, by a name of ours, gets an answer; and only to whoever
has the address with its key, which is printed for the one who started this. The browser keeps the key as a cookie.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import secrets
import shlex
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import click
from aiohttp import web
from textual_serve.server import Server

#: How long the end waits for the pages' processes, and for browsers that keep their sockets open. Seconds.
GRACE = 3.0
#: How many pages may be open at a time: each is a process.
PAGES = 16
POLICY = "default-src 'self' 'unsafe-inline' data: blob:; connect-src 'self' ws://{host}; frame-ancestors 'none'"


def command(options: Sequence[str]) -> str:
    """What a shell runs for each page. -P: nothing of the directory that it is started in is imported.

    A Ctrl-C in the terminal, which comes to all of them, is the server's: it ends them in order.
    """
    return "trap '' INT; exec " + shlex.join([sys.executable, "-P", "-m", "realmap", "top", *options])


def may_ask(host: str, origin: str | None, everybody: bool) -> bool:
    """Whether a request is from a page of ours: its `Host` is this machine's loopback, its `Origin`, if any, that host.

    A page of somebody else's whose name was bent to this machine (DNS rebinding) has its own name as host.
    `everybody`: it listens for other machines, too, and may be called by any name.
    """
    try:
        name = urlsplit(f"//{host}").hostname or ""
        own = origin is None or urlsplit(origin).netloc == host
    except ValueError:  # no name at all
        return False
    try:
        local = ipaddress.ip_address(name).is_loopback
    except ValueError:
        local = name == "localhost"
    return (local or everybody) and own


class Page(Server):
    """The server of textual-serve, with the page and its socket guarded, under whatever name it is called by."""

    everybody = False

    def __init__(self, command: str, **options: Any) -> None:
        super().__init__(command, **options)
        #: Who has it may look.
        self.key = secrets.token_urlsafe(16)
        self._open: set[asyncio.Task[Any]] = set()
        # A browser sends a host's cookies to all of its ports.
        self._cookie = f"realmap-{secrets.token_hex(4)}"

    async def _make_app(self) -> web.Application:
        app = await super()._make_app()
        app.middlewares.append(self._guard)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if not may_ask(request.host, request.headers.get("Origin"), self.everybody):
            raise web.HTTPForbidden(text="realmap top: this page is not for others")
        given = request.query.get("key", "")
        if not any(self._is_key(each) for each in (given, request.cookies.get(self._cookie, ""))):
            raise web.HTTPForbidden(text="realmap top: open the whole address that it printed, with its key")
        # No await lies between here and where it is used: through a tunnel the page has another port.
        self.public_url = f"http://{request.host}"
        response: web.StreamResponse = await handler(request)
        if not response.prepared:
            if given:
                response.set_cookie(self._cookie, self.key, httponly=True, samesite="Strict")
            response.headers["Referrer-Policy"] = "no-referrer"
            response.headers["Content-Security-Policy"] = POLICY.format(host=request.host)
            response.headers["Cache-Control"] = "no-store"
        return response

    def _is_key(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self.key.encode())

    async def handle_websocket(self, request: web.Request) -> web.WebSocketResponse:
        """A page's process, as long as the page is open."""
        if len(self._open) >= PAGES:
            raise web.HTTPServiceUnavailable(text=f"realmap top: {PAGES} pages are open already")
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            answer: web.WebSocketResponse = await super().handle_websocket(request)
            return answer
        finally:
            self._open.remove(task)

    async def on_shutdown(self, app: web.Application) -> None:
        """Ends the pages' processes, and waits for that."""
        for task in self._open:
            task.cancel()
        if self._open:
            await asyncio.wait(self._open, timeout=GRACE)

    async def on_startup(self, app: web.Application) -> None:
        """Says nothing: the address has been printed."""


def serve(options: Sequence[str], host: str, port: int) -> None:
    """Serves it until Ctrl-C, SIGTERM or SIGHUP. `options`: of each page. ClickException: it cannot listen there."""
    listening = _listen(host, port)
    where, port = listening.getsockname()[:2]
    name = f"[{where}]" if ":" in where else where
    page = Page(command(options), host=where, port=port, title="realmap top")
    page.everybody = not ipaddress.ip_address(where).is_loopback
    click.echo(f"realmap top: http://{name}:{port}/?key={page.key} (Ctrl-C ends it)")
    if page.everybody:
        click.echo("other machines reach it, too; what they are sent is not encrypted", err=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    web.run_app(page._make_app(), sock=listening, print=None, access_log=None, shutdown_timeout=GRACE)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()  # :: is 0.0.0.0, too
        return socket.create_server(address, family=family, dualstack_ipv6=both)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or "no name of a host"
        # In use, or one of the low ones, which are root's.
        hint = "; try --port 0" if getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES) else ""
        raise click.ClickException(f"cannot listen at {host} port {port}: {why.partition(' (')[0]}{hint}") from None
