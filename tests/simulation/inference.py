"""The inference side of the emulator, in process, behind the shape of an aiohttp session."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import aiohttp

from hotload.clients.inference.client import InferenceClient
from tests.simulation.doors import scope_of
from tests.simulation.loop import PROCESS

if TYPE_CHECKING:
    from tests.simulation.fleet import Fleet


class Answer:
    """A response whose body arrives while it is read."""

    def __init__(self, work: asyncio.Task[None], messages: asyncio.Queue[Any], start: Any) -> None:
        self._work, self._messages = work, messages
        self.status: int = start["status"]
        self.raw_headers = tuple(start["headers"])
        self.content = self

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._work.cancel()

    async def iter_chunked(self, _: int) -> AsyncIterator[bytes]:
        whole = 0
        while True:
            message = await self._messages.get()
            if message is None:
                declared = dict(self.raw_headers).get(b"content-length")
                if declared is not None and int(declared) != whole:
                    raise aiohttp.ClientPayloadError("the connection was closed within the answer")
                return
            whole += len(message)
            if message:
                yield message

    def iter_any(self) -> AsyncIterator[bytes]:
        return self.iter_chunked(0)


class Session:
    """Sends requests to the emulator's application."""

    def __init__(self, fleet: Fleet, headers: Mapping[str, str]) -> None:
        self._fleet, self._headers = fleet, dict(headers)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    async def post(
        self, path: str, body: bytes, headers: Mapping[str, str] | None = None
    ) -> Answer:
        process = PROCESS.get()
        if process is not None and process.is_buried:
            raise asyncio.CancelledError
        messages: asyncio.Queue[Any] = asyncio.Queue()
        given = {**self._headers, **(headers or {}), "Content-Type": "application/json"}
        raw = [(name.encode(), value.encode()) for name, value in given.items()]
        gone = asyncio.Event()
        is_read = False

        async def receive() -> dict[str, Any]:
            nonlocal is_read
            if not is_read:
                is_read = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        started: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                if not started.done():
                    started.set_result(message)
            else:
                messages.put_nowait(message.get("body", b""))

        async def answer() -> None:
            try:
                await self._fleet.app(scope_of("POST", path, raw), receive, send)
            finally:
                gone.set()
                messages.put_nowait(None)
                if not started.done():
                    started.set_exception(aiohttp.ServerDisconnectedError())

        work = asyncio.get_running_loop().create_task(answer())
        start = await started
        name = process.name if process else "world"
        self._fleet.world.note(f"{name} inference {self._fleet.name} {start['status']}")
        return Answer(work, messages, start)


@dataclass(frozen=True, slots=True)
class SimulatedInference(InferenceClient):
    """The client of the program, its connections to a service of a world."""

    fleet: Any = None

    @classmethod
    def into(cls, fleet: Fleet) -> SimulatedInference:
        return cls(fleet.access, fleet=fleet)

    def _transport(self, read_timeout_seconds: float, connections: int) -> Any:
        return Session(self.fleet, self._headers())
