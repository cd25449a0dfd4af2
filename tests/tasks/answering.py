"""An inference server that answers every request as a test's function says, or never."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self

from tests.blocks.scripted_inference import DONE, MODEL, http, last, token


@dataclass(frozen=True)
class Asked:
    """One request: the how manyth it is, from 0, and what it says."""

    number: int
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def prompt(self) -> str:
        """The prompt, or the last message's content."""
        if "messages" in self.body:
            return str(self.body["messages"][-1]["content"])
        return str(self.body["prompt"])

    @property
    def session(self) -> str:
        """Its session."""
        return self.headers["x-session-affinity"]


Reply = Callable[[Asked], Awaitable[bytes]]


def saying(text: str, *models: str) -> bytes:
    """A good answer, one token a character; from `models`, one after the other."""
    served = models or (MODEL,)
    pieces = [
        token(number, each, served[min(number, len(served) - 1)])
        for number, each in enumerate(text)
    ]
    return http(b"".join(pieces) + last(list(range(len(text))), served[-1]) + DONE)


NO_IDS = http(token(1, "a", token_id=None) + last([]) + DONE)  # fails for good, at once


async def never() -> bytes:
    """No answer, ever."""
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


class Answering:
    """The server; keeps what it was asked."""

    def __init__(self, reply: Reply) -> None:
        self.asked: list[Asked] = []
        self.port = 0
        self._reply = reply
        self._connections: set[asyncio.Task[None]] = set()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(asyncio.current_task())  # type: ignore[arg-type]
        try:
            await self._serve(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        asked = Asked(len(self.asked), headers, body)
        self.asked.append(asked)
        writer.write(await self._reply(asked))
        await writer.drain()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        """Serve until the block ends."""
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        async with server:
            try:
                yield self
            finally:
                for connection in self._connections:
                    connection.cancel()
                await asyncio.gather(*self._connections, return_exceptions=True)
