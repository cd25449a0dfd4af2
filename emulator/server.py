"""A running emulator: in the foreground of a program, or in a thread of a test."""

from __future__ import annotations

import asyncio
import threading
from types import TracebackType
from typing import Any, Self

from uvicorn.protocols.http.h11_impl import H11Protocol

import agent.server
from agent.server import Server, bind
from emulator.api.app import create_app
from emulator.control.settings import EmulatorConfig


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


class RunningEmulator:
    """An emulator that answers at `url` until `stop`; also a context manager."""

    def __init__(self, config: EmulatorConfig) -> None:
        self._socket, self.url = bind(config.port)
        settled = threading.Event()
        self._server = Server(create_app(config), settled.set, Protocol)
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


def run(config: EmulatorConfig) -> int:
    """Serve until interrupted; 0 when it was ended, 2 when it could not start."""
    app = create_app(config)
    return agent.server.serve_app("emulator", app, port=config.port, http=Protocol)
