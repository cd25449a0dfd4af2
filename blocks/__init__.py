"""Configured doors to the world: account, service, checkpoint store, rollout client."""

import os
import sys
from typing import NoReturn
from urllib.parse import urlsplit

import httpx
from prefect.client.orchestration import get_client
from prefect.logging.handlers import APILogWorker
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_KEY,
    PREFECT_API_URL,
    PREFECT_SERVER_ALLOW_EPHEMERAL_MODE,
)

from hotload.clients.trigger import authorization_of
from hotload.errors import ServiceUnavailableError

__all__ = [
    "SERVER_FAILURES",
    "account",
    "checkpoint_store",
    "hot_load_service",
    "leave_server",
    "quit_without_server",
    "require_server",
    "rollout_client",
    "server_door",
]

START = (
    "start one with `env $(cat deployments/sqlite.env) prefect server start`, or set "
    "PREFECT_API_URL to one that runs"
)
KEY = "set PREFECT_API_AUTH_STRING or PREFECT_API_KEY as this server asks for it"
SERVER = "Prefect server"
SERVER_FAILURES = (httpx.HTTPError,)
"""What Prefect's own client raises where its server is gone, or answers with an error for long."""
AGAIN = "once it answers, start the command again: what is done is not repeated"
LAST_LINES_SECONDS = 10.0
TEXT_CHARS = 200


def server_door() -> tuple[str, str | None]:
    """Name the Prefect server's address and the header that lets us in, as Prefect's own settings
    have them.

    Raises:
        ServiceUnavailableError: no server is named; a temporary one ends with its process.
    """
    url = PREFECT_API_URL.value()
    if not url:
        raise ServiceUnavailableError(SERVER, None, f"PREFECT_API_URL is not set; {START}")
    key, pair = PREFECT_API_KEY.value(), PREFECT_API_AUTH_STRING.value()
    secrets = [one.get_secret_value() if one else None for one in (key, pair)]
    return url, authorization_of(*secrets)


async def require_server() -> None:
    """Ask the Prefect server, which keeps the blocks, whether it is there; before anything else.

    Raises:
        ServiceUnavailableError: it is not; says in one line what was asked and what to start.
    """
    url = PREFECT_API_URL.value()
    if not (url or PREFECT_SERVER_ALLOW_EPHEMERAL_MODE.value()):
        raise ServiceUnavailableError(SERVER, None, f"PREFECT_API_URL is not set; {START}")
    address = _without_password(url) if url else "the temporary server"
    try:
        async with get_client() as client:
            trouble = await client.api_healthcheck()
    # RuntimeError: a temporary server that did not start.
    except (RuntimeError, httpx.HTTPError, httpx.InvalidURL) as error:
        trouble = error
    if trouble is None:
        return
    if isinstance(trouble, httpx.HTTPStatusError):
        status = trouble.response.status_code
        reason = f"{address} answers HTTP {status}; {KEY if status in (401, 403) else START}"
    else:
        text = " ".join(str(trouble).split())[:TEXT_CHARS]
        reason = f"{address} does not answer ({type(trouble).__name__}: {text}); {START}"
    raise ServiceUnavailableError(SERVER, None, reason)


def quit_without_server(error: Exception) -> NoReturn:
    """End this process with 1 and one line: its Prefect server has gone while it ran.

    At once, since at an ordinary end Prefect offers each of its events to that server for seconds.
    """
    text = " ".join(str(error).split())[:TEXT_CHARS]
    line = f"{SERVER}: it went away or cannot answer ({type(error).__name__}: {text}); {AGAIN}"
    _end_process(f"error: {line}", 1)


def leave_server(exit_code: int) -> int:
    """Hand the Prefect server the last events and lines of the log; returns `exit_code`.

    Where it does not take them within ten seconds, or Ctrl-C comes first, this process ends here:
    at an ordinary end Prefect waits for as long as the server needs.
    """
    try:
        # Prefect's queues are of one family: this empties the one of events, too.
        ended = APILogWorker.drain_all(timeout=LAST_LINES_SECONDS)
        assert isinstance(ended, tuple)  # only inside an event loop is it a coroutine
        is_empty = not ended[1]
    except KeyboardInterrupt:
        is_empty = False
    if not is_empty:
        _end_process(f"{SERVER}: it has not taken the last lines of the log", exit_code)
    return exit_code


def _end_process(line: str, exit_code: int) -> NoReturn:
    """End this process at once, with a last line for whoever started it."""
    sys.stdout.flush()
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
    os._exit(exit_code)


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    if not parts.netloc:
        return url.rpartition("@")[2]
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
