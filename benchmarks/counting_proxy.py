"""Count the HTTP calls that a process makes to a server: a proxy on loopback that reads along."""

import asyncio
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from urllib.parse import urlsplit

# A JSON body has no line break of its own, so only a request's first line, right behind the body of
# the request before, can end like this.
REQUEST_LINE = re.compile(rb"(GET|POST|PUT|PATCH|DELETE) (/\S*) HTTP/1\.1\r$")
IDS = re.compile(r"[0-9a-f]{8}-[0-9a-f-]{27}")
CHUNK_BYTES = 1 << 16


@contextmanager
def counting_proxy(server: str) -> Iterator[tuple[str, list[str]]]:
    """Forward to `server`; yields the proxy's address and the calls so far, as `POST /api/logs/`.

    Events and logs that are watched travel over websockets, which are no calls.
    """
    calls: list[str] = []
    started: Future[tuple[int, Callable[[], None]]] = Future()
    thread = threading.Thread(target=lambda: asyncio.run(_serve(server, calls, started)))
    thread.start()
    port, stop = started.result()
    try:
        yield f"http://127.0.0.1:{port}", calls
    finally:
        stop()
        thread.join()


async def _serve(
    server: str, calls: list[str], started: Future[tuple[int, Callable[[], None]]]
) -> None:
    target, loop, stopped = urlsplit(server), asyncio.get_running_loop(), asyncio.Event()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward, back = await asyncio.open_connection(target.hostname, target.port)
        directions = (_forward(reader, back, calls), _forward(onward, writer, None))
        await asyncio.gather(*directions, return_exceptions=True)

    listening = await asyncio.start_server(connect, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    started.set_result((port, lambda: loop.call_soon_threadsafe(stopped.set)))
    await stopped.wait()
    listening.close()


async def _forward(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, calls: list[str] | None
) -> None:
    """Copy one direction to its end, and note the requests in it."""
    line = b""
    try:
        while data := await reader.read(CHUNK_BYTES):
            if calls is not None:
                *lines, line = (line + data).split(b"\n")
                calls += [named for one in lines if (named := _call(one))]
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()


def _call(line: bytes) -> str | None:
    """`POST /api/logs/` of a request's first line; identifiers become `*`."""
    found = REQUEST_LINE.search(line)
    if found is None or found[2].endswith((b"/in", b"/out")):
        return None
    return f"{found[1].decode()} {IDS.sub('*', found[2].decode())}"
