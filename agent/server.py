"""An ASGI application on a port: a socket that is bound first, and a word once it answers."""

from __future__ import annotations

import asyncio
import socket
import sys
from argparse import ArgumentParser
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

SHUTDOWN_SECONDS = 1
LOOPBACK = "127.0.0.1"


def add_address(parser: ArgumentParser) -> None:
    """Let a command line say where its application answers."""
    parser.add_argument("--host", default=LOOPBACK, help="where it answers (%(default)s)")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")


class Server(uvicorn.Server):
    """uvicorn that says when it answers, and why it does not."""

    def __init__(
        self,
        app: ASGIApp,
        on_settled: Callable[[], None],
        http: type[asyncio.Protocol] | str = "auto",
    ) -> None:
        self._app = app
        super().__init__(
            uvicorn.Config(
                app,
                http=http,
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
            state = getattr(self._app, "state", None)
            cause: BaseException | None = getattr(state, "failure", None)
            raise RuntimeError("it did not start") from cause


def bind(port: int, host: str = LOOPBACK) -> tuple[socket.socket, str]:
    """Bind a port, or a free one for 0; returns the socket and its address.

    Raises:
        OSError: the port is taken, or there is no such port or host.
    """
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        listening.close()
        raise OSError(f"{host}:{port}: {error}") from None
    return listening, f"http://{host}:{listening.getsockname()[1]}"


def serve_app(
    program: str,
    app: ASGIApp,
    *,
    port: int,
    host: str = LOOPBACK,
    http: type[asyncio.Protocol] | str = "auto",
) -> int:
    """Serve until interrupted, as `program`, which says its address once it answers.

    Returns 0 when it was ended, 2 when it could not start; it then says why.
    """
    try:
        listening, url = bind(port, host)
        with listening:

            def settled() -> None:
                if server.started:
                    sys.stdout.write(f"{program}: {url}\n")
                    sys.stdout.flush()

            server = Server(app, settled, http)
            asyncio.run(server.serve([listening]))
        server.check_started()
    except KeyboardInterrupt:
        return 0
    except (RuntimeError, OSError) as error:
        cause = f": {error.__cause__}" if error.__cause__ else ""
        sys.stderr.write(f"{program}: {error}{cause}\n")
        return 2
    return 0
