"""A running emulator: in the foreground of a program, or in a thread of a test."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from emulator.app import create_app
from emulator.settings import EmulatorConfig

HOST = "127.0.0.1"
SHUTDOWN_SECONDS = 1


class Gathering:
    """A transport that sends what is written in one turn of the loop in one system call.

    The server writes the head, each event and the end of an answer apart; sending is the larger part of a
    short answer's cost.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._pieces: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send `data` at the end of this turn."""
        if not self._pieces:
            asyncio.get_running_loop().call_soon(self._flush)
        self._pieces.append(data)

    def close(self) -> None:
        """Send what is left, then close."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        pieces, self._pieces = self._pieces, []
        if pieces and not self._transport.is_closing():
            self._transport.write(b"".join(pieces))


class Protocol(H11Protocol):
    """uvicorn's HTTP/1.1 over a gathering transport."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client connected."""
        super().connection_made(Gathering(transport))  # type: ignore[arg-type]


class RunningEmulator:
    """An emulator that answers at `url` until `stop`; also a context manager."""

    def __init__(self, config: EmulatorConfig) -> None:
        self._socket = _bind(config.port)
        self.url = f"http://{HOST}:{self._socket.getsockname()[1]}"
        self._app = create_app(config)
        self._server = _server(self._app)
        self._thread = threading.Thread(target=self._run, name="emulator", daemon=True)
        self._ended = threading.Event()
        self._thread.start()
        while not self._server.started and not self._ended.wait(0.005):
            pass
        if not self._server.started:
            self.stop()
            raise RuntimeError("the emulator did not start") from failure_of(self._app)

    def stop(self) -> None:
        """End it, and wait until everything it wrote is removed."""
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _run(self) -> None:
        try:
            asyncio.run(self._server.serve([self._socket]))
        finally:
            self._ended.set()


def serve(config: EmulatorConfig) -> RunningEmulator:
    """An emulator in a thread of this process, answering when this returns.

    Raises:
        RuntimeError: the base model cannot be loaded; the cause is attached.
        OSError: the port is taken.
    """
    return RunningEmulator(config)


def run(config: EmulatorConfig, announce: Callable[[str], None]) -> None:
    """Serve until interrupted; `announce` gets the address once it answers.

    Raises:
        RuntimeError: the base model cannot be loaded; the cause is attached.
        OSError: the port is taken.
    """
    app = create_app(config)
    with _bind(config.port) as listening:
        server = _server(app)
        url = f"http://{HOST}:{listening.getsockname()[1]}"

        async def serving() -> None:
            running = asyncio.create_task(server.serve([listening]))
            while not server.started and not running.done():
                await asyncio.sleep(0.005)
            if server.started:
                announce(url)
            await running

        asyncio.run(serving())
    if not server.started:
        raise RuntimeError("the emulator did not start") from failure_of(app)


def failure_of(app: Starlette) -> BaseException | None:
    """Why an application did not start."""
    failure: BaseException | None = getattr(app.state, "failure", None)
    return failure


def _server(app: Starlette) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=Protocol,
            log_level="critical",
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
    )


def _bind(port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
    except OSError:
        listening.close()
        raise
    return listening
