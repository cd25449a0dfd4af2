"""One HTTP call to an inference server, and what its answer means."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx

from agent.engines.reloading import EngineAwayError, EngineError
from hotload.clients.access import tls_context

RELOAD_SECONDS = 1800.0
CONTROL_SECONDS = 60.0
HEAD_CHARS = 300
ANSWER_LIMIT_BYTES = 1 << 20


async def call(
    url: str,
    method: str,
    path: str,
    body: object = None,
    *,
    timeout_seconds: float = CONTROL_SECONDS,
) -> Any:
    """Send a call; return the JSON of a good answer, or its text where that is none.

    Raises:
        EngineAwayError: nobody listens there.
        EngineError: any other answer than a good one, one above 1 MiB, not all of it in time, or
            an object with a false `success`.
    """
    said = f"{method} {path.partition('?')[0]}"
    try:
        async with (
            asyncio.timeout(timeout_seconds),
            httpx.AsyncClient(timeout=None, trust_env=False, verify=tls_context()) as client,
            client.stream(method, f"{url.rstrip('/')}{path}", json=body) as answer,
        ):
            data = bytearray()
            async for piece in answer.aiter_bytes():
                data += piece
                if len(data) > ANSWER_LIMIT_BYTES:
                    raise EngineError(f"{said}: more than {ANSWER_LIMIT_BYTES} bytes")
    except TimeoutError:
        raise EngineError(f"{said}: no whole answer within {timeout_seconds:g} s") from None
    except httpx.ConnectError as error:
        raise EngineAwayError(f"{said}: {error}") from None
    except httpx.HTTPError as error:
        raise EngineError(f"{said}: {type(error).__name__}: {error}") from None
    text = data.decode("utf-8", "replace")
    head = " ".join(text[:HEAD_CHARS].split())
    if not answer.is_success:
        raise EngineError(f"{said}: {answer.status_code}: {head}")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if isinstance(found, dict) and found.get("success", True) is not True:
        raise EngineError(f"{said}: {head}")
    return found


async def version_at(url: str, path: str) -> str | None:
    """Read `weight_version` from what a server tells of itself.

    Raises:
        EngineError: as `call`; or it tells none.
    """
    found = await call(url, "GET", path)
    if not isinstance(found, dict) or "weight_version" not in found:
        raise EngineError(f"GET {path}: no weight_version in the answer")
    version = found["weight_version"]
    return None if version is None else str(version)
