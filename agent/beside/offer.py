"""What an agent gives its peers, by their key: files of the snapshot that it loads or holds."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import BinaryIO

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from agent.beside.following import Following
from agent.beside.peers import ASKER_HEADER, CHUNK_BYTES, FILES_PATH, Peers, Reply, patience
from agent.failures import json_response

SENT_AT_ONCE = 4
HELD_SECONDS = 1.0  # for which an asker is kept waiting, in place of asking again


class _Sending(StreamingResponse):
    """A file on its way; it gives its place up when it is there, or has taken too long."""

    def __init__(self, file: BinaryIO, size_bytes: int, slots: asyncio.Semaphore) -> None:
        headers = {"content-length": str(size_bytes)}
        super().__init__(_pieces(file), headers=headers, media_type="application/octet-stream")
        self._file, self._slots, self._seconds = file, slots, patience(size_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._seconds):
                    await super().__call__(scope, receive, send)
        finally:
            self._slots.release()
            self._file.close()


class _News:
    """Wakes all that wait in the event loop, from any thread."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event = asyncio.Event()

    def listen(self) -> None:
        """Let what is told from now on be heard in this loop."""
        self._loop = asyncio.get_running_loop()

    def tell(self) -> None:
        """Wake those that wait now."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._wake)

    async def wait(self) -> None:
        """Return at the next news."""
        await self._event.wait()

    def _wake(self) -> None:
        self._event.set()
        self._event = asyncio.Event()


async def _pieces(file: BinaryIO) -> AsyncIterator[bytes]:
    while piece := await asyncio.to_thread(file.read, CHUNK_BYTES):
        yield piece


def offer(peers: Peers, following: Following) -> Route:
    """Make the route that gives files: those that are coming are waited for a moment."""
    disk = following.replica.peered
    assert disk is not None
    slots = asyncio.Semaphore(SENT_AT_ONCE)

    news = _News()
    disk.on_news = news.tell

    def refuse(answer: Reply) -> Response:
        return json_response({}, answer.value)

    async def give(request: Request) -> Response:
        if not peers.accepts(request.headers.get("authorization", "")):
            return json_response({}, 401)
        if request.headers.get(ASKER_HEADER) == peers.name:
            return refuse(Reply.OWN)
        identity, file = request.path_params["identity"], request.path_params["file"]
        if following.replica.is_past(identity) and disk.offered(identity, file) is None:
            return refuse(Reply.GONE)
        if not disk.is_coming(identity, file):
            following.look()
        news.listen()
        end = time.monotonic() + (0 if "now" in request.query_params else HELD_SECONDS)
        while (path := disk.offered(identity, file)) is None:
            if following.stands_by(identity):
                return refuse(Reply.GONE)
            if (left := end - time.monotonic()) <= 0:
                return refuse(Reply.COMING if disk.is_coming(identity, file) else Reply.UNKNOWN)
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await news.wait()
        try:
            async with asyncio.timeout(HELD_SECONDS):
                await slots.acquire()
        except TimeoutError:
            return refuse(Reply.BUSY)
        try:
            opened = path.open("rb")
        except OSError:  # it went in this moment
            slots.release()
            return refuse(Reply.UNKNOWN)
        return _Sending(opened, os.fstat(opened.fileno()).st_size, slots)

    return Route(f"{FILES_PATH}/{{identity}}/{{file}}", give, methods=["GET"])
