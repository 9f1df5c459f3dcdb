"""asyncio over a Unix socket: an echo server and its client, as the documentation of streams has them.

Both sides read with readexactly(), write with write() and drain(). 32 bytes there and back.

    call COUNT      one after the other, on one connection
    hundred COUNT   a hundred at a time, each on a connection of its own, by gather()
"""

import asyncio
import functools
from multiprocessing.connection import Connection

from _protocol import PREFIX, at_end, partner, serve, timed

ADDRESS = f"\0{PREFIX}asyncio"  # in Linux's abstract names: nothing is left behind
REQUEST = bytes(32)
TOGETHER = 100

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(await reader.readexactly(len(REQUEST)))
        await writer.drain()


def answer(channel: Connection) -> None:
    async def forever() -> None:
        server = await asyncio.start_unix_server(echo, ADDRESS, backlog=2 * TOGETHER)
        channel.send(None)
        await server.serve_forever()

    asyncio.run(forever())


@functools.cache
def prepared() -> tuple[asyncio.Runner, list[Stream]]:
    partner(answer).channel.recv()
    runner = asyncio.Runner()
    at_end.callback(runner.close)

    async def connect() -> list[Stream]:
        return [await asyncio.open_unix_connection(ADDRESS) for _ in range(TOGETHER)]

    return runner, runner.run(connect())


async def request(stream: Stream) -> None:
    reader, writer = stream
    writer.write(REQUEST)
    await writer.drain()
    if await reader.readexactly(len(REQUEST)) != REQUEST:
        raise ValueError("a wrong answer")


def call(count: int) -> int:
    runner, streams = prepared()

    async def one_by_one() -> None:
        for _ in range(count):
            await request(streams[0])

    return timed(lambda: runner.run(one_by_one()), 1, warm=0)


def hundred(count: int) -> int:
    runner, streams = prepared()
    rounds = -(-count // TOGETHER)

    async def together() -> None:
        for _ in range(rounds):
            await asyncio.gather(*map(request, streams))

    return timed(lambda: runner.run(together()), 1, warm=0) * count // (rounds * TOGETHER)


if __name__ == "__main__":
    serve({"call": call, "hundred": hundred})
