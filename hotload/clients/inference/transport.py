"""Requests to the inference endpoints, on the aiohttp transport, without the client around it."""

from __future__ import annotations

import aiohttp
import httpx
import orjson

from hotload.rollout import completions_api

ERROR_BODY_LIMIT_BYTES = 64 << 10
NO_ANSWER = (httpx.HTTPError, aiohttp.ClientError, OSError, UnicodeError)
"""What the transport raises when there is no answer, or no whole one (`UnicodeError`: a host name
that cannot be one)."""


class Wire:
    """A transport with what is the same for every request: origin, headers, timeouts.

    Requests go straight to it. What httpx's client adds (merging, redirects, cookies) is not used
    here and costs a third of the CPU of a request.
    """

    def __init__(
        self,
        transport: httpx.AsyncBaseTransport,
        origin: str,
        headers: dict[str, str],
        timeout: httpx.Timeout,
    ) -> None:
        self._transport = transport
        self._origin = origin
        self._urls: dict[str, httpx.URL] = {}
        fixed = {**headers, "Content-Type": "application/json"}
        self._headers = httpx.Headers(fixed, encoding="ascii").raw
        self._extensions = {"timeout": timeout.as_dict()}

    async def post(
        self, path: str, body: bytes, headers: list[tuple[bytes, bytes]]
    ) -> httpx.Response:
        """The response to one POST, its body still to be read; it must be closed."""
        url = self._urls.get(path) or self._urls.setdefault(path, httpx.URL(self._origin + path))
        # Given as a stream, httpx leaves host and length to aiohttp, at half the cost.
        request = httpx.Request(
            "POST",
            url,
            headers=[*self._headers, *headers],
            stream=httpx.ByteStream(body),
            extensions=self._extensions,
        )
        request.headers.encoding = "ascii"
        request.read()
        return await self._transport.handle_async_request(request)


async def head_of(response: httpx.Response) -> bytes:
    """The first 64 KiB of a body, decoded; the rest is not read."""
    head = b""
    async for piece in response.aiter_bytes():
        head += piece
        if len(head) >= ERROR_BODY_LIMIT_BYTES:
            break
    return head[:ERROR_BODY_LIMIT_BYTES]


def names_in(body: bytes) -> str:
    """`code type` of an error body, for a reader; other text is only said to be so (protocol
    §3).
    """
    try:
        return completions_api.error_names(orjson.loads(body))
    except orjson.JSONDecodeError:
        return "an empty body" if not body.strip() else "a body that is not JSON"
