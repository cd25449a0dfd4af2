"""One HTTP call to the service's control side, and what its answer means (protocol §2, §3).

The class of an error says who must act; its text is the head of the answer, the key masked in it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import httpx

from hotload.clients.access import tls_context
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
    operation: str,
    method: str,
    url: str,
    *,
    key: str,
    headers: Mapping[str, str],
    body: object,
    timeout_seconds: float,
    limit_bytes: int,
) -> tuple[int, str]:
    """Send one request; returns status and text.

    In anything but a good answer `key` is masked wherever the server repeats it; a good answer is
    data, and stays as it is.

    Of a good answer at most `limit_bytes` are read, of any other 64 KiB; redirects are not
    followed. A client for each call: calls are few, and none outlives the loop it was made in.

    Raises:
        ServiceUnavailableError: no complete answer within `timeout_seconds`.
        ProtocolError: a good answer is larger than `limit_bytes`; 0 reads none.
    """
    sent = {"Authorization": f"Bearer {key}", "Accept-Encoding": "identity", **headers}
    try:
        async with (
            asyncio.timeout(timeout_seconds),
            httpx.AsyncClient(
                verify=tls_context(), timeout=timeout_seconds, headers=sent
            ) as client,
            client.stream(method, url, json=body) as response,
        ):
            status = response.status_code
            limit = limit_bytes if response.is_success else ERROR_LIMIT_BYTES
            data = await _read(response, limit)
    except TimeoutError:
        reason = f"not finished within {timeout_seconds:g} s"
        raise ServiceUnavailableError(operation, None, reason) from None
    except httpx.RequestError as error:
        reason = redact(f"{type(error).__name__}: {error}", [key])[:DETAIL_CHARS]
        raise ServiceUnavailableError(operation, None, reason) from None
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


def raise_for(status: int, operation: str, text: str, other: type[ServiceError]) -> None:
    """Return for 2xx; else the class says who must act, `other` where the status does not.

    Raises:
        ServiceError: one of its subclasses, with the first 2 KiB of the answer.
    """
    detail = " ".join(text[:DETAIL_CHARS].split()) or "empty answer"
    match meaning_of(status):
        case StatusMeaning.GOOD:
            return
        case StatusMeaning.TIMEOUT | StatusMeaning.BUSY | StatusMeaning.SERVER_ERROR:
            raise ServiceUnavailableError(operation, status, detail)
        case StatusMeaning.NO_ACCESS | StatusMeaning.NOT_FOUND:
            raise ServiceRefusedError(operation, status, detail)
        case StatusMeaning.REDIRECT:
            raise ProtocolError(operation, status, "a redirect: set base_url to where it leads")
        case _:
            raise other(operation, status, detail)


def parse_json(operation: str, text: str, key: str, error: type[ServiceError]) -> Any:
    """Parse the JSON of a good answer; `key` is masked in what an error shows of another.

    Raises:
        ServiceError: `error`, when it is HTML, empty, or nested beyond measure.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        head = " ".join(redact(text, [key])[:HEAD_CHARS].split()) or "nothing"
        raise error(operation, 200, f"found {head}, expected JSON") from None


def advice_for(error: ServiceError) -> str:
    """Advise the operator on an answer."""
    return {
        401: "Use a key that may call the control plane; an inference-only key may not",
        402: "Settle the account's billing",
        403: "Give the key's owner rights on this service",
        404: "Compare account, model and deployment with the vendor's names",
    }.get(error.status_code or 0, "Compare base_url, and see whether the service is up")
