"""One HTTP call to the service's control side, and what its answer means (protocol §2, §3).

The class of an error says who must act; its text is the head of the answer, the key masked in it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import httpx

from hotload.clients.access import Access, tls_context
from hotload.clients.redaction import redact
from hotload.errors import (
    ProtocolError,
    ServiceError,
    ServiceRefusedError,
    ServiceUnavailableError,
)
from hotload.http_status import StatusMeaning, meaning_of

ERROR_LIMIT_BYTES = 64 << 10
DETAIL_CHARS = 2048
HEAD_CHARS = 200
PIECE_BYTES = 64 << 10


async def ask(
    access: Access,
    operation: str,
    method: str,
    path: str,
    *,
    headers: Mapping[str, str],
    body: object,
    timeout_seconds: float,
    limit_bytes: int,
    transport: httpx.AsyncBaseTransport | None = None,
) -> tuple[int, str]:
    """Send one request to `path` of the API; returns status and text.

    In anything but a good answer the key is masked wherever the server repeats it; a good answer is
    data, and stays as it is.

    Of a good answer at most `limit_bytes` are read, of any other 64 KiB; redirects are not
    followed. A client for each call: calls are few, and none outlives the loop it was made in.
    `transport` carries the call; None is the network.

    Raises:
        ServiceUnavailableError: no complete answer within `timeout_seconds`.
        ServiceRefusedError: there is no key, or the address is not one.
        ProtocolError: a good answer is larger than `limit_bytes`; 0 reads none.
    """
    url, key = access.origin(operation) + path, access.key(operation)
    sent = {"Authorization": f"Bearer {key}", "Accept-Encoding": "identity", **headers}
    try:
        async with (
            asyncio.timeout(timeout_seconds),
            httpx.AsyncClient(
                verify=tls_context(),
                timeout=timeout_seconds,
                headers=sent,
                transport=transport,
            ) as client,
            client.stream(method, url, json=body) as response,
        ):
            status = response.status_code
            limit = limit_bytes if response.is_success else ERROR_LIMIT_BYTES
            data = await _read(response, limit)
    except TimeoutError:
        reason = f"not finished within {timeout_seconds:g} s"
        raise ServiceUnavailableError(operation, None, reason, access.remedy(None)) from None
    except httpx.RequestError as error:
        reason = redact(f"{type(error).__name__}: {error}", [key])[:DETAIL_CHARS]
        raise ServiceUnavailableError(operation, None, reason, access.remedy(None)) from None
    if 200 <= status < 300 and len(data) > limit:
        raise ProtocolError(operation, status, f"the answer is larger than {limit} bytes")
    text = data.decode("utf-8", "replace")
    return status, text if 200 <= status < 300 else redact(text, [key])


async def _read(response: httpx.Response, limit_bytes: int) -> bytes:
    """At most `limit_bytes` of the body, and one piece more if there is more; nothing for 0."""
    data = bytearray()
    if limit_bytes:
        async for piece in response.aiter_bytes(PIECE_BYTES):
            data += piece
            if len(data) > limit_bytes:
                break
    return bytes(data)


def raise_for(
    status: int, operation: str, text: str, other: type[ServiceError], advice: str = ""
) -> None:
    """Return for 2xx; else the class says who must act, `other` where the status does not.

    Raises:
        ServiceError: one of its subclasses, with the first 2 KiB of the answer, and with `advice`
            unless the answer is about what was sent.
    """
    detail = " ".join(text[:DETAIL_CHARS].split()) or "empty answer"
    match meaning_of(status):
        case StatusMeaning.GOOD:
            return
        case StatusMeaning.TIMEOUT | StatusMeaning.BUSY | StatusMeaning.SERVER_ERROR:
            raise ServiceUnavailableError(operation, status, detail, advice)
        case StatusMeaning.NO_ACCESS | StatusMeaning.NOT_FOUND:
            raise ServiceRefusedError(operation, status, detail, advice)
        case StatusMeaning.REDIRECT:
            raise ProtocolError(operation, status, "a redirect: set base_url to where it leads")
        case _:
            raise other(operation, status, detail, advice if other is ServiceRefusedError else "")


def parse_json(access: Access, operation: str, text: str, error: type[ServiceError]) -> Any:
    """Parse the JSON of a good answer; the key is masked in what an error shows of another.

    Raises:
        ServiceError: `error`, when it is HTML, empty, or nested beyond measure.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        head = " ".join(redact(text, [access.key(operation)])[:HEAD_CHARS].split()) or "nothing"
        reason = f"found {head}, expected JSON"
        raise error(operation, 200, reason, access.remedy(200)) from None
