"""`Seat`: what a server and the kernel tell each other, by a socket of their own, and the page beside it.

kernel   Opened, Granted, Revoked, Gone, Refused ──▶   each a datagram, with its descriptors
server   ◀── Served, Gone                     lost where the kernel does not read: the next one says it all again
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

import msgspec

from realmap.host import files
from realmap.wire import channel, messages
from realmap.wire.news import News, Told
from realmap.wire.seat import GRANTS, WORDS, SeatPage

_decode = msgspec.msgpack.Decoder(News).decode
_encode = msgspec.msgpack.Encoder().encode


class Seat:
    """This process's end. `number`: as the kernel at the path `kernel` counts seats."""

    def __init__(self, number: int, kernel: str, sock: int, page: int) -> None:
        """Both descriptors stay the caller's. OSError: no descriptor, or no memory."""
        self.number, self.kernel = number, kernel
        self._page = SeatPage(page, writable=True)
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, os.dup(sock))
        self.sock.setblocking(False)
        #: Of the page: how many calls are at work, and wait, for those who choose a server. Nobody's after `close`.
        self.words: memoryview | list[int] = self._page.words
        #: How many of its grants were heard of.
        self._heard = 0

    @property
    def has_news(self) -> bool:
        """Whether something was granted or revoked since `hear`: then that comes before a call is looked at."""
        return self.words[GRANTS] != self._heard

    def hear(self) -> Iterator[tuple[News, list[int]]]:
        """What there is to hear now. Each one's descriptors are closed afterwards, but for those that were taken out.

        EOFError: the kernel has ended, or has given the seat up.
        """
        self._heard = self.words[GRANTS]
        while True:
            try:
                data, descriptors = files.receive(self.sock, channel.DATAGRAM, messages.MAX_DESCRIPTORS)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                raise EOFError(str(error)) from None
            try:
                if not data:
                    raise EOFError("the kernel has ended")
                yield _decode(data), descriptors
            finally:
                channel.close_all(descriptors)

    def tell(self, message: Told) -> bool:
        """Says it, where the kernel has room for it now. False: it is longer than the kernel takes."""
        data = _encode(message)
        if len(data) > channel.CHUNK:
            return False
        with contextlib.suppress(OSError):
            channel.send_one(self.sock, data)
        return True

    def leave(self) -> None:
        """No new sessions come from here on; those that there are go on until `close`."""
        with contextlib.suppress(OSError):  # the kernel has ended
            self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """The kernel sees that nobody sits here any more. Again: nothing."""
        self.words = [0] * WORDS  # for calls that end later
        files.shut(self.sock)
        self._page.close()
