"""Peers that misbehave on a real socket: a proxy that cuts, a server that answers anything."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def listening(serve: Serve) -> AsyncIterator[str]:
    """A TCP server on loopback that hands every connection to `serve`; yields its http://
    address."""
    tasks: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            tasks.discard(task)
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


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
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            far_writer.transport.abort()
            writer.transport.abort()

    async with listening(serve) as address:
        proxy.address = address
        yield proxy


@dataclass
class RawServer:
    """Answers every HTTP request with `answers[n]`, the last one for ever; keeps what was asked."""

    address: str = ""
    answers: list[bytes] = field(default_factory=list)
    requests: list[bytes] = field(default_factory=list)
    silent: bool = False
    endless: bytes = b""


def http(
    status: str, body: bytes = b"", content_type: str = "application/json", extra: str = ""
) -> bytes:
    """One whole HTTP answer, after which the connection closes."""
    head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Connection: close\r\n{extra}\r\n".encode() + body


async def _read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    if b"100-continue" in head:
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return head + await reader.readexactly(int(line.partition(b":")[2]))
    return head


@asynccontextmanager
async def answering() -> AsyncIterator[RawServer]:
    """A hand-written HTTP server for answers no proper server gives."""
    raw = RawServer()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raw.requests.append(await _read_request(reader, writer))
        if raw.silent:
            await reader.read()
            return
        answer = raw.answers.pop(0) if len(raw.answers) > 1 else raw.answers[0]
        if raw.requests[-1].startswith(b"HEAD "):
            answer = answer.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
        writer.write(answer)
        await writer.drain()
        while raw.endless:
            writer.write(raw.endless)
            await writer.drain()

    async with listening(serve) as address:
        raw.address = address
        yield raw
