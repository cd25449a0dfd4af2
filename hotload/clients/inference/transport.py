"""POST requests to one origin, on aiohttp: its connections, and what all requests share."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Self

import aiohttp
import orjson

from hotload.clients.access import tls_context
from hotload.rollout.failures import error_names

ERROR_BODY_LIMIT_BYTES = 64 << 10
KEPT_SECONDS = 5.0  # a server may close an idle connection just as it is used again
NO_ANSWER = (aiohttp.ClientError, OSError, UnicodeError)
"""What is raised when there is no answer, or not all of one (`UnicodeError`: a host name that
cannot be one)."""


class HttpTransport:
    """The connections to one origin, with the headers and timeouts of every request.

    The origin may carry a path, below which every request goes.

    Redirects are not followed, cookies not kept, proxies not used. Made and used in one event loop.

    Args:
        connect_timeout_seconds: for a connection, and before that for a free one of `connections`.
        read_timeout_seconds: between two pieces of an answer; `None` sets no limit.
    """

    def __init__(
        self,
        origin: str,
        headers: Mapping[str, str],
        *,
        connect_timeout_seconds: float,
        read_timeout_seconds: float | None,
        connections: int,
    ) -> None:
        self._origin = origin
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=connections, ssl=tls_context(), keepalive_timeout=KEPT_SECONDS
            ),
            headers={**headers, "Content-Type": "application/json"},
            timeout=aiohttp.ClientTimeout(
                connect=connect_timeout_seconds,
                sock_connect=connect_timeout_seconds,
                sock_read=read_timeout_seconds,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def post(
        self, path: str, body: bytes, headers: Mapping[str, str] | None = None
    ) -> aiohttp.ClientResponse:
        """Send one POST and return its response, the body still to be read; a context manager.

        Raises:
            Exception: one of `NO_ANSWER`.
        """
        url = self._origin + path
        return await self._session.post(url, data=body, headers=headers, allow_redirects=False)


async def head_of(
    response: aiohttp.ClientResponse, limit_bytes: int = ERROR_BODY_LIMIT_BYTES
) -> bytes:
    """Read the first bytes of a body, decoded; the rest is not read."""
    head = bytearray()
    async for piece in response.content.iter_any():
        head += piece
        if len(head) >= limit_bytes:
            break
    return bytes(head[:limit_bytes])


def names_in(body: bytes) -> str:
    """Return `code type` of an error body, for a reader; other text is only said to be so
    (protocol §3).
    """
    try:
        return error_names(orjson.loads(body))
    except orjson.JSONDecodeError:
        return "an empty body" if not body.strip() else "a body that is not JSON"
