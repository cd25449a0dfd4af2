"""A TCP proxy that cuts its connections, or lets them stall."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tests.scripted_server import listening


@dataclass
class Proxy:
    """A TCP proxy; once `cut_after` bytes have gone up, every connection is cut, or stalls."""

    address: str
    cut_after: int | None = None
    stalls: bool = False
    passed: int = 0
    full: asyncio.Event = field(default_factory=asyncio.Event)


@asynccontextmanager
async def proxying(upstream: str) -> AsyncIterator[Proxy]:
    """A proxy in front of the http:// address `upstream`."""
    host, _, port = upstream.removeprefix("http://").partition(":")
    proxy = Proxy("")

    async def up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            proxy.passed += len(data)
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
            asyncio.ensure_future(up(reader, far_writer)),
            asyncio.ensure_future(down(far_reader, writer)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            far_writer.transport.abort()
            writer.transport.abort()
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async with listening(serve) as address:
        proxy.address = address
        yield proxy
