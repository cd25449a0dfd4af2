"""An HTTP server that answers byte for byte as a script says, on a real socket."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Self

JSON, EVENTS = "application/json", "text/event-stream"
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass(frozen=True)
class Request:
    """One request, the `number`th from 0; `headers` by their names in lower case."""

    number: int
    path: str
    headers: dict[str, str]
    content: bytes

    @property
    def body(self) -> dict[str, Any]:
        """The content as JSON."""
        return json.loads(self.content)

    @property
    def prompt(self) -> str:
        """The prompt, or the last message's content."""
        if "messages" in self.body:
            return str(self.body["messages"][-1]["content"])
        return str(self.body["prompt"])

    @property
    def session(self) -> str:
        """The session it belongs to."""
        return self.headers["x-session-affinity"]


# Bytes, or a function of the request: `async def` with one `return`, or with a `yield` a piece.
# One that raises ConnectionResetError resets the connection.
Reply = bytes | Callable[[Request], Awaitable[bytes] | AsyncIterator[bytes]]


def http(
    body: bytes = b"",
    status: int = 200,
    content_type: str = EVENTS,
    length: int | None = None,
    **headers: str,
) -> bytes:
    """A whole answer, after which the connection closes; `length` is what it says of its body."""
    lines = [f"HTTP/1.1 {status} X", f"Content-Type: {content_type}"]
    lines += [f"Content-Length: {len(body) if length is None else length}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def never(request: Request | None = None) -> bytes:
    """No answer, ever."""
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


class ScriptedServer:
    """Answers each request with the next reply, with the last for ever; keeps what it was sent."""

    def __init__(self, *replies: Reply) -> None:
        self.replies = list(replies)
        self.requests: list[Request] = []
        self.address = ""

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self.address.rpartition(":")[2])

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        """Serve until the block ends."""
        async with listening(self._serve) as self.address:
            yield self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        fields = (line.split(": ", 1) for line in head[1:] if line)
        headers = {name.lower(): value for name, value in fields}
        if headers.get("expect") == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        content = await reader.readexactly(int(headers.get("content-length", 0)))
        method, path, _ = head[0].split()
        request = Request(len(self.requests), path, headers, content)
        self.requests.append(request)
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        try:
            if isinstance(reply, bytes):
                if method == "HEAD":
                    reply = reply.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
                writer.write(reply)
            elif isinstance(answer := reply(request), AsyncIterator):
                async for piece in answer:
                    writer.write(piece)
                    await writer.drain()
            else:
                writer.write(await answer)
            await writer.drain()
        except ConnectionResetError:
            writer.transport.abort()


@asynccontextmanager
async def listening(serve: Serve) -> AsyncIterator[str]:
    """Hand every connection on a port of loopback to `serve`; yields its http:// address."""
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
        # A client may connect at this very moment. asyncio fails an accepted connection whose
        # server is closed before its handler has begun, some turns of the loop later: let it begin.
        for listener in server.sockets:
            asyncio.get_running_loop().remove_reader(listener.fileno())
        for _ in range(10):
            await asyncio.sleep(0)
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def endless(piece: bytes, seconds: float) -> AsyncIterator[str]:
    """Serve a good answer to everything that goes on with a piece every few seconds, for ever."""
    tasks: set[asyncio.Task[None] | None] = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        try:
            writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            while True:
                writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                await writer.drain()
                await asyncio.sleep(seconds)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in filter(None, tasks):
            task.cancel()
        await asyncio.gather(*filter(None, tasks))
