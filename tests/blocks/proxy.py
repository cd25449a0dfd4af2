"""A TCP proxy that cuts its connections, resets them, lets them stall, or says it is busy."""

import asyncio
import re
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tests.scripted_server import http, listening

REQUEST = re.compile(rb"(GET|POST|PATCH|PUT|DELETE) /")
BUSY = http(b'{"exception_message": "Service Unavailable"}', 503, "application/json")


@dataclass
class Proxy:
    """A TCP proxy; once `cut_after` bytes have gone up, every connection is cut, or stalls.

    `resets` cuts with an RST instead of an end of stream. Of `busy_every` HTTP requests one is
    answered with 503 and not passed on; `refused` counts those.
    """

    address: str
    cut_after: int | None = None
    resets: bool = False
    stalls: bool = False
    busy_every: int | None = None
    passed: int = 0
    asked: int = 0
    refused: int = 0
    full: asyncio.Event = field(default_factory=asyncio.Event)


@asynccontextmanager
async def proxying(upstream: str) -> AsyncIterator[Proxy]:
    """A proxy in front of the http:// address `upstream`."""
    host, _, port = upstream.removeprefix("http://").partition(":")
    proxy = Proxy("")

    async def up(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, back: asyncio.StreamWriter
    ) -> None:
        while data := await reader.read(1 << 16):
            proxy.passed += len(data)
            if proxy.busy_every is not None and REQUEST.match(data):
                proxy.asked += 1
                if proxy.asked % proxy.busy_every == 0:
                    proxy.refused += 1
                    back.write(BUSY)
                    await back.drain()
                    back.write_eof()  # the answer arrives before the connection is cut
                    while await reader.read(1 << 16):
                        pass
                    return
            if proxy.cut_after is not None and proxy.passed > proxy.cut_after:
                proxy.full.set()
                if proxy.stalls:
                    await asyncio.Event().wait()
                return
            writer.write(data)
            await writer.drain()

    async def down(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        ways = [
            asyncio.ensure_future(up(reader, far_writer, writer)),
            asyncio.ensure_future(down(far_reader, writer)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            far_writer.transport.abort()
            if proxy.resets:  # what closes without lingering sends an RST
                writer.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
            writer.transport.abort()
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async with listening(serve) as address:
        proxy.address = address
        yield proxy
