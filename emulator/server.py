"""A running emulator: in the foreground of a program, or in a thread of a test."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from emulator.api.app import create_app
from emulator.control.settings import EmulatorConfig

HOST = "127.0.0.1"
SHUTDOWN_SECONDS = 1


class Gathering:
    """A transport that sends what is written in one turn of the loop in one system call.

    The server writes the head, each event and the end of an answer apart; sending is the larger
    part of a short answer's cost.
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
        """Note that a client connected."""
        super().connection_made(Gathering(transport))  # type: ignore[arg-type]


class Server(uvicorn.Server):
    """uvicorn that says when it answers, and why it does not."""

    def __init__(self, config: EmulatorConfig, on_settled: Callable[[], None]) -> None:
        self._app = create_app(config)
        super().__init__(
            uvicorn.Config(
                self._app,
                http=Protocol,
                log_level="critical",
                access_log=False,
                lifespan="on",
                timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            )
        )
        self._on_settled = on_settled

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start; `on_settled` is called whether or not it answers now."""
        try:
            await super().startup(sockets=sockets)
        except SystemExit:
            self.should_exit = True  # its way to say that the application did not start
        finally:
            self._on_settled()

    def check_started(self) -> None:
        """Return if it answers, or did.

        Raises:
            RuntimeError: it did not start; the cause is attached.
        """
        if not self.started:
            cause: BaseException | None = getattr(self._app.state, "failure", None)
            raise RuntimeError("the emulator did not start") from cause


class RunningEmulator:
    """An emulator that answers at `url` until `stop`; also a context manager."""

    def __init__(self, config: EmulatorConfig) -> None:
        self._socket, self.url = _bind(config.port)
        settled = threading.Event()
        self._server = Server(config, settled.set)
        work = self._server.serve([self._socket])
        self._thread = threading.Thread(
            target=asyncio.run, args=[work], name="emulator", daemon=True
        )
        self._thread.start()
        settled.wait()
        try:
            self._server.check_started()
        except RuntimeError:
            self.stop()
            raise

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


def serve(config: EmulatorConfig) -> RunningEmulator:
    """Serve an emulator in a thread of this process, answering when this returns.

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
    listening, url = _bind(config.port)
    with listening:

        def settled() -> None:
            if server.started:
                announce(url)

        server = Server(config, settled)
        asyncio.run(server.serve([listening]))
    server.check_started()


def _bind(port: int) -> tuple[socket.socket, str]:
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
    except OSError:
        listening.close()
        raise
    return listening, f"http://{HOST}:{listening.getsockname()[1]}"
